"""Supervisor: the processes of an elastic run on one machine; those that die are started again.

The supervisor serves the store at which the members of the run agree, and outlives all of them. The first processes are
forks where that is possible. Those that are started later are new processes of Python, because the store has threads:
they take seconds to begin, and meanwhile the others train.
"""

import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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

# Ends of processes without a completed round between them after which nothing is started again.
MOST_ENDS = 5
INVALID = 2  # exit status of a process that cannot take part


@dataclass
class Supervised:
    """The processes of an elastic run on this machine, by their numbers here.

    Args:
        start: Starts the process of a number again.
        rounds: Returns the number of rounds that are done.
        over: Returns True where the members have ended the run.
        timeout_s: Seconds that processes may take to end.

    Attributes:
        children: The latest process of each number.
        received: Signals that ask the run to end.
    """

    start: Callable[[int], Child]
    rounds: Callable[[], int]
    over: Callable[[], bool]
    timeout_s: float
    children: dict[int, Child] = field(default_factory=dict[int, Child])
    received: list[int] = field(default_factory=list[int])
    _statuses: list[int] = field(default_factory=list[int])  # of processes that are not started again
    _ends: int = 0  # since the last completed round
    _known_rounds: int = 0
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
                self._statuses.append(child.wait())
        return self._status(stuck=len(stuck))

    def _running(self) -> list[Child]:
        return [child for child in self.children.values() if child.poll() is None]

    def _end_within(self, seconds: float, running: Sequence[Child]) -> None:
        for child in running:
            child.send_signal(signal.SIGTERM)
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _note_end(self, number: int, code: int) -> None:
        """Start a process again that has ended, unless the run ends."""
        if code < 0 and not self.received:
            print(f"resist: process {number}: ended by {signal.Signals(-code).name}", file=sys.stderr, flush=True)
        if code in (0, INTERRUPTED) or self.received or self.over():
            self._ended.add(number)
            self._statuses.append(code)
            self._deadline = min(self._deadline, time.monotonic() + FAREWELL_S)  # members end at about the same time
            return
        rounds = self.rounds()
        if rounds > self._known_rounds:
            self._known_rounds, self._ends = rounds, 0
        self._ends += 1
        if self._ends <= MOST_ENDS and not (code == INVALID and rounds == 0):
            self.children[number] = self.start(number)
            return
        self._ended.add(number)
        self._statuses.append(code)
        if self._ends > MOST_ENDS:
            print(
                f"resist: processes have ended {self._ends} times without a completed round; none is started again",
                file=sys.stderr,
                flush=True,
            )
        self._end_within(FAREWELL_S, self._running())

    def _status(self, *, stuck: int) -> int:
        if self.received:
            return INTERRUPTED if INTERRUPTED in self._statuses and not stuck else 128 + self.received[0]
        if stuck:
            print(f"resist: {stuck} processes were killed, because they did not end by themselves", file=sys.stderr)
        if 0 in self._statuses and not self._ends > MOST_ENDS:
            return 0
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
    address = listener.getsockname()
    lifeline, kept_open = os.pipe()
    server: StoreServer | None = None

    def environment(number: int) -> dict[str, str]:
        shared = local_environment(number, workers, address, lifeline) | {VARIABLE: secret}
        return {name: value for name, value in shared.items() if name not in ("RANK", "WORLD_SIZE")}

    group = Supervised(
        start=lambda number: new_process(arguments, environment(number), lifeline),
        rounds=lambda: _rounds(out),
        over=lambda: server is not None and server.has(ended),
        timeout_s=timeout_s,
    )
    group.children = {}
    try:
        with collected_signals() as group.received:
            for number in range(workers):
                if forked is None:
                    group.children[number] = group.start(number)
                else:
                    group.children[number] = Forked(forked, environment(number), (listener.fileno(), kept_open))
            # Its threads come after the forks. Connections wait in the listener until then.
            server = StoreServer(str(address[0]), int(address[1]), secret.encode(), listener)
            return group.watch()
    finally:
        for child in group.children.values():
            end_now(child)
        os.close(kept_open)
        os.close(lifeline)
        if server is not None:
            server.close()
        listener.close()


def _rounds(out: Path) -> int:
    """Number of records of a run."""
    try:
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0
