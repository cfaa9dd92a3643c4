"""Supervisor: the processes of an elastic run on one machine; those that die are started again.

The store at which the members of the run agree outlives all of them. Where processes are forked, it is served by a fork
of its own, so that the supervisor keeps a single thread, and can fork at any time: a process that is started again is
there in a moment, and shares the memory of the data. Elsewhere a thread of the supervisor serves it.
"""

import logging
import os
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from resist.errors import UserError
from resist.members.secret import VARIABLE
from resist.members.store_server import StoreServer
from resist.training.forks import Child, Forked
from resist.training.launcher import (
    FAREWELL_S,
    INTERRUPTED,
    POLL_S,
    collected_signals,
    end_now,
    local_environment,
    loopback_listener,
    new_process,
    num_threads,
)

log = logging.getLogger(__name__)

# How members end a run that has done all its steps.
DONE = "all steps are done"
# Ends of processes without a completed round between them after which nothing is started again: so many for each
# process that the run began with, and some.
MOST_ENDS, SOME_ENDS = 2, 3
# Exit status of a process that cannot take part, and how often a process may end so before it is given up.
INVALID, MOST_INVALID = 2, 3
STORE_S = 5.0  # seconds in which the store has to answer


@dataclass
class Supervised:
    """The processes of an elastic run on this machine, by their numbers here.

    Args:
        start: Starts the process of a number again.
        rounds: Returns the number of rounds that are done.
        how: Returns how the members have ended the run, or None where they have not.
        serves: Returns False where the store at which the members agree has ended.
        timeout_s: Seconds that processes may take to end.
        out: The run directory.

    Attributes:
        children: The latest process of each number.
        received: Signals that ask the run to end.
    """

    start: Callable[[int], Child]
    rounds: Callable[[], int]
    how: Callable[[], str | None]
    serves: Callable[[], bool]
    timeout_s: float
    out: Path
    children: dict[int, Child] = field(default_factory=dict[int, Child])
    received: list[int] = field(default_factory=list[int])
    _statuses: list[int] = field(default_factory=list[int])  # of processes that are not started again
    _ends: int = 0  # since the last completed round
    _known_rounds: int = 0
    _invalid: Counter[int] = field(default_factory=Counter[int])  # ends with status INVALID of each number
    _ended: set[int] = field(default_factory=set[int])
    _deadline: float = float("inf")

    def watch(self) -> int:
        """Wait until all have ended, and start again those that die. Returns the exit status."""
        passed_on = 0
        while (running := self._running()) and time.monotonic() < self._deadline:
            if len(self.received) > passed_on:
                passed_on = len(self.received)
                again = passed_on > 1 and self.received[-1] == signal.SIGINT
                self._end_within(0.0 if again else self.timeout_s, running)
            for number, child in list(self.children.items()):
                if number not in self._ended and (code := child.poll()) is not None:
                    self._note_end(number, code)
            time.sleep(POLL_S)
        stuck = self._running()
        for child in stuck:
            end_now(child)
        for number, child in self.children.items():
            if number not in self._ended:
                self._statuses.append(code := child.wait())
                self._report(number, code if child not in stuck else 0)
        return self._status(stuck=len(stuck))

    def _running(self) -> list[Child]:
        return [child for child in self.children.values() if child.poll() is None]

    def _report(self, number: int, code: int) -> None:
        """Report an end that the process could not report itself."""
        if code < 0 and not self.received:
            if sys.stdout.isatty():  # its live display may have hidden the cursor
                print("\x1b[?25h", end="", flush=True)
            print(f"resist: process {number}: ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)

    def _end_within(self, seconds: float, running: Sequence[Child]) -> None:
        for child in running:
            child.send_signal(signal.SIGTERM)
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _note_end(self, number: int, code: int) -> None:
        """Start a process again that has ended, unless the run ends."""
        self._report(number, code)
        if code in (0, INTERRUPTED) or self.received or not self.serves() or self.how() is not None:
            self._ended.add(number)
            self._statuses.append(code)
            self._deadline = min(self._deadline, time.monotonic() + FAREWELL_S)  # members end at about the same time
            return
        rounds = self.rounds()
        if rounds > self._known_rounds:
            self._known_rounds, self._ends = rounds, 0
        self._ends += 1
        self._invalid[number] += code == INVALID
        most = MOST_ENDS * len(self.children) + SOME_ENDS
        if self._ends <= most and not (code == INVALID and rounds == 0):
            if self._invalid[number] < MOST_INVALID:
                self.children[number] = self.start(number)
            else:  # the others go on
                self._ended.add(number)
            return
        self._ended.add(number)
        self._statuses.append(code)
        if self._ends > most:
            print(
                f"resist: processes have ended {self._ends} times without a completed round; none is started again",
                file=sys.stderr,
                flush=True,
            )
        self._end_within(FAREWELL_S, self._running())

    def _status(self, *, stuck: int) -> int:
        if self.received:
            return INTERRUPTED if INTERRUPTED in self._statuses else 128 + self.received[0]  # some have saved all
        if stuck:
            some = "a process was" if stuck == 1 else f"{stuck} processes were"
            print(f"resist: {some} killed, not having ended with the others", file=sys.stderr)
        if self.how() == DONE:
            return 0
        if INTERRUPTED in self._statuses:  # a signal came to a process itself
            return INTERRUPTED
        if self.how() is None and self.out.exists():
            log.warning("no process is left; continue with resist train `resume=%s`", self.out)
        return next((code for code in self._statuses if code > 0 and code != INTERRUPTED), 1)


def supervise(
    arguments: Sequence[str],
    workers: int,
    timeout_s: float,
    out: Path,
    ended: str,
    *,
    fork: Callable[[], object] | None = None,
) -> int:
    """Run the processes of an elastic run, and serve their store.

    Signals are passed on as `resist.training.launcher.launch` does.

    Args:
        arguments: The command line of a process, without the program's name.
        workers: Number of processes to start.
        timeout_s: Seconds that they may take to end after a signal, or after the first of them has ended.
        out: The run directory.
        ended: The key in the store that says that the run has ended.
        fork: A function that does the same as `resist` with `arguments`, for forks. Default: new Python processes.

    Returns:
        The exit status: 0 if the run is done, 75 if it was interrupted and has saved.
    """
    forked = fork if fork is not None and num_threads() == 1 else None
    listener, secret = loopback_listener(), secrets.token_hex()
    host, port = listener.getsockname()[:2]
    lifeline, kept_open = os.pipe()

    def environment(number: int) -> dict[str, str]:
        shared = local_environment(number, workers, (host, port), lifeline) | {VARIABLE: secret}
        return {name: value for name, value in shared.items() if name not in ("RANK", "WORLD_SIZE")}

    def serve() -> None:
        server = StoreServer(host, port, secret.encode(), listener)
        os.read(lifeline, 1)  # until the supervisor ends; then the others save and end, for which they need it
        end = time.monotonic() + timeout_s
        while server.connections and time.monotonic() < end:
            time.sleep(POLL_S)
        server.close()

    def start(number: int) -> Child:
        if forked is None:
            return new_process(arguments, environment(number), lifeline)
        return Forked(forked, environment(number), (kept_open,))

    server = StoreServer(host, port, secret.encode(), listener) if forked is None else None
    # Another process, because the threads of the server would forbid further forks of this one.
    store = None if forked is None else Forked(serve, environment(0), (kept_open,))
    group = Supervised(
        start=start,
        rounds=lambda: _rounds(out),
        how=lambda: _value(host, port, secret.encode(), ended),
        serves=lambda: store is None or store.poll() is None,
        timeout_s=timeout_s,
        out=out,
    )
    try:
        if store is not None:
            listener.close()
        with collected_signals() as group.received:
            for number in range(workers):
                group.children[number] = start(number)
            return group.watch()
    finally:
        for child in (*group.children.values(), *([store] if store is not None else [])):
            end_now(child)
        os.close(kept_open)
        os.close(lifeline)
        if server is not None:
            server.close()
        listener.close()


def _value(host: str, port: int, secret: bytes, key: str) -> str | None:
    """The value of a key in the store, or None where it has none or cannot be reached."""
    from resist.members.store_client import SecretStore  # imports torch

    try:
        store = SecretStore(host, port, secret, STORE_S)
        try:
            return store.get(key).decode() if store.check([key]) else None
        finally:
            store.close()
    except (UserError, RuntimeError):
        return None


def _rounds(out: Path) -> int:
    """Number of records of a run."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
