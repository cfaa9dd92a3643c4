"""Liveness check: which processes respond, and which are still computing.

It runs when contact with a process is lost, so that the error message can name the process. Every process responds from
a thread of its own, through the store at which all processes have met, whatever its main thread does. A process that
was killed or stopped, or that is cut off from the network, does not respond. A process that responds that it is
computing is the one that the others wait for.

NCCL does not notice that a process has ended. So with NCCL each process also shows at the store, twice a second, that
it lives, and those that wait look at it.
"""

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from resist.sync.meeting import within

# Keys in the store.
REQUEST, STATE, BEAT = "resist/liveness/request", "resist/liveness/state/", "resist/liveness/beat/"
COMPUTING, WAITING, LEFT = "computing", "waiting", "left"
POLL_S = 0.5  # seconds between two looks for a request
RESPONSE_S = 5.0  # seconds that a response may take, on a busy machine
LAST_S = 3 * POLL_S  # seconds to wait for the last process after the response of another one
CALL_S = 2 * RESPONSE_S + LAST_S  # seconds after which a query is given up
SILENT = 5  # looks at a process, LOOK_S seconds apart, after which one that shows nothing new is lost
LOOK_S = 1.0


class Liveness:
    """State of this process for others to query, and queries about theirs.

    Args:
        store: A store of torch.distributed that all processes share.
        rank: The number of this process.
        size: The number of processes.

    Attributes:
        close: Ends the thread that responds.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._state = [COMPUTING]  # a list, since the thread may not hold a reference to self
        self._has_called = False
        self._beating = threading.Event()
        self._seen: dict[int, tuple[str, int]] = {}  # what each process has shown last, and how often
        self._looked = 0.0
        closed = threading.Event()
        arguments = (store, rank, self._state, closed, self._beating)
        self._thread = threading.Thread(target=_respond, args=arguments, daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, closed.set)  # the thread ends with the object

    def report_state(self, state: str) -> None:
        """Set the state that this process reports. After a `call` it stays.

        Args:
            state: COMPUTING or WAITING.
        """
        if not self._has_called:
            self._state[0] = state

    def beat(self) -> None:
        """Show the others from now on, again and again, that this process lives."""
        self._beating.set()

    def leave(self) -> None:
        """Show the others that this process is done, if it has called `beat`. Closes."""
        self.close()
        if self._beating.is_set():
            with contextlib.suppress(RuntimeError, TimeoutError):  # the store has ended
                within(RESPONSE_S, self._say_goodbye)

    def _say_goodbye(self) -> None:
        self._thread.join()  # it shows nothing after this
        self._store.set(f"{BEAT}{self._rank}", LEFT)

    def has_loss(self) -> bool:
        """Look whether a process is lost: it shows no life any more, or another one has lost contact with it.

        Call it every LOOK_S seconds while waiting for others, which all have called `beat`. Looks are counted, not
        seconds: after a pause of the whole machine no process is taken for lost.
        """
        if time.monotonic() - self._looked < LOOK_S / 2:  # two threads wait
            return False
        try:
            called, beats = within(RESPONSE_S, self._read)
        except (RuntimeError, TimeoutError):  # the store has ended, or is cut off
            return True
        self._looked = time.monotonic()
        for rank, beat in enumerate(beats):
            last, times = self._seen.get(rank, ("", 0))
            self._seen[rank] = beat, times + 1 if beat == last != LEFT else 0
        return called or any(times >= SILENT for _, times in self._seen.values())

    def _read(self) -> tuple[bool, list[str]]:
        """Whether contact was lost, and what the processes have shown last."""
        keys = [f"{BEAT}{rank}" for rank in range(self._size) if rank != self._rank]
        if keys and self._store.check(keys):
            return self._store.check([REQUEST]), [beat.decode() for beat in self._store.multi_get(keys)]
        present = [self._store.get(key).decode() if self._store.check([key]) else "" for key in keys]
        return self._store.check([REQUEST]), present

    def call(self) -> tuple[list[int], list[int]] | None:
        """Query all processes.

        Takes about RESPONSE_S + LAST_S seconds at most, and less if only one of them is missing. At least one process
        is expected to be missing or computing, since otherwise there is no reason to query.

        Returns:
            The processes that do not respond, and those that are computing. None if the store does not respond.
        """
        # A process that queries the others is not the one that they wait for, when they query it later either.
        self.report_state(WAITING)
        self._has_called = True
        missing = [rank for rank in range(self._size) if rank != self._rank]
        latest_response = start = time.monotonic()
        try:
            self._store.set(REQUEST, "")
            self._store.set(f"{STATE}{self._rank}", WAITING)
            # The last one is probably lost, so that it gets less time. It may still be about to respond.
            while missing and time.monotonic() < max(
                latest_response + LAST_S, start + RESPONSE_S if len(missing) > 1 else 0.0
            ):
                time.sleep(0.1)
                silent = [rank for rank in missing if not self._store.check([f"{STATE}{rank}"])]
                if silent != missing:
                    missing, latest_response = silent, time.monotonic()
            states = {r: self._store.get(f"{STATE}{r}").decode() for r in range(self._size) if r not in missing}
        except RuntimeError:
            return None
        return missing, [rank for rank, state in states.items() if state == COMPUTING]

    def cause(self, named: Callable[[Sequence[int]], str]) -> str:
        """Query all processes, and describe why contact was lost.

        Args:
            named: Names processes by their numbers.

        Returns:
            The end of an error message.
        """
        try:
            # A machine that is cut off does not even refuse: torch's store would wait for it without end.
            states = within(CALL_S, self.call)
        except TimeoutError:
            states = None
        if states is None:
            return "the rendezvous store (process 0 or the launcher) is unreachable"
        missing, working = states
        if missing:
            return f"no answer from {named(missing)}"
        if working:
            return f"{named(working)} did not come in time: it hangs, or needs a longer `timeout_s`"
        return (
            "all processes are alive but blocked; check the network between them and, in a loop of your own, that all "
            "call job.step equally often"
        )


class Watch(Protocol):
    """Looks at processes that come and go; see `resist.members.watch`.

    Attributes:
        bound_s: Seconds after which a silent process is lost.
    """

    bound_s: float

    @property
    def trouble(self) -> str:
        """Why what waits for all processes does not end, or ""."""
        ...

    def attach(self, abort: Callable[[str], None]) -> None:
        """Call a function with the reason, in another thread, as soon as what waits for all processes cannot end."""
        ...

    def detach(self, abort: Callable[[str], None]) -> None:
        """Undo `attach`."""
        ...


class GroupWatch:
    """A watch in place of `Liveness`, for the groups of one transport.

    Args:
        watch: The watch.
        abort: Closes the connections of the groups, with the reason.
    """

    def __init__(self, watch: Watch, abort: Callable[[str], None]) -> None:
        self._watch, self._abort = watch, abort
        watch.attach(abort)

    def report_state(self, state: str) -> None:
        """Do nothing: the watch looks at the life of a process, whatever it does."""

    def beat(self) -> None:
        """Do nothing: the watch shows that this process lives."""

    def leave(self) -> None:
        """See `close`: a process leaves a generation, not its groups."""
        self.close()

    def close(self) -> None:
        """Do not end anything in these groups any more."""
        self._watch.detach(self._abort)

    def has_loss(self) -> bool:
        """Return True where something is known that keeps operations from ending."""
        return bool(self._watch.trouble)

    def cause(self, named: Callable[[Sequence[int]], str]) -> str:
        """Return the end of an error message, at once. The members that agree next find out who is lost."""
        return self._watch.trouble or "the connection has ended"


def _respond(
    store: Any, rank: int, state: list[str], closed: threading.Event, beating: threading.Event, beats: int = 0
) -> None:
    try:
        while not closed.wait(POLL_S):
            if beating.is_set():
                beats += 1
                store.set(f"{BEAT}{rank}", str(beats))
            if store.check([REQUEST]):
                store.set(f"{STATE}{rank}", state[0])
                return
    except RuntimeError:  # the store has ended, and with it the job
        return
