"""Signals that ask a run to end after its round, and the line that says so at once."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from enum import Enum

from resist.training.forks import ending_signals

AGAIN = "Ctrl-C again to end now"


class Stage(Enum):
    """What a run does when a signal asks it to end, and what becomes of it then."""

    ROUND = "ending after this round"
    BETWEEN = "ending after the next round"  # the one before it is being tested and saved
    END = "ending: the last round is being tested and saved"
    SAVE = "ending: the round is being saved"  # another process has received a signal, or this one has just now


_ours = False  # whether signals of this process wake a thread of `interruption`


@contextlib.contextmanager
def interruption(announce: Callable[[], object] | None = None) -> Iterator[threading.Event]:
    """Set an event on a signal to end, instead of ending the process; a second Ctrl-C ends it at once.

    torch's launcher turns the second Ctrl-C into a SIGTERM, so that after a SIGINT either of them counts as one.

    Args:
        announce: Called at the first signal, in a thread: the main one may wait for another process at that moment, and
            Python would call it only after that.

    Yields:
        The event.
    """
    event, seen = threading.Event(), set[int]()

    def note(number: int, _frame: object) -> None:
        if seen and signal.SIGINT in (number, *seen):
            raise KeyboardInterrupt
        seen.add(number)
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, note) for number in ending_signals()}
    try:
        with _announced(announce, set(before)) if announce is not None else contextlib.nullcontext():
            yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _announced(announce: Callable[[], object], numbers: set[int]) -> Iterator[None]:
    """Call a function in a thread, once, as soon as one of these signals comes."""
    global _ours
    ours, theirs = socket.socketpair()

    def wait() -> None:
        while (number := ours.recv(1)[0]) not in numbers:
            if number == 0:
                return
        announce()

    theirs.setblocking(False)
    _ours, before = True, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _ours = False
        theirs.send(b"\0")
        thread.join()
        ours.close()
        theirs.close()


def _forget() -> None:
    """In a fork, as those that read data: its signals are not those of this process."""
    global _ours
    if _ours:
        _ours = False
        with contextlib.suppress(ValueError):  # of a fork of another thread
            signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def announcement(stage: Stage, recent: Collection[tuple[float, float, int]], since_s: float) -> str:
    """Say when a run will end that a signal asks to.

    Args:
        stage: What it does at this moment.
        recent: Seconds, training seconds and images of the last rounds.
        since_s: Seconds since the last of them.

    Returns:
        A line, with an estimate of the time up to the end of the round where one can be made.
    """
    left_s = None
    if recent and stage not in (Stage.END, Stage.SAVE):
        round_s = sum(training_s for _, training_s, _ in recent) / len(recent)
        left_s = round_s - since_s
        if stage is Stage.BETWEEN:
            left_s = round_s + max(0.0, left_s + max(seconds - training_s for seconds, training_s, _ in recent))
    if left_s is None or left_s < 0:  # there is no round yet, or this one takes longer
        return f"{stage.value}; {AGAIN}"
    about = f"{max(1.0, left_s):.0f} s" if left_s < 100 else f"{left_s / 60:.0f} min"
    return f"{stage.value} (about {about}); {AGAIN}"
