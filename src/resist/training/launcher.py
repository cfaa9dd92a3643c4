"""Start the processes of one machine, where nobody else has started them, watch them, and leave none behind.

Not torch's elastic agent: that gives a process which is stopped or hangs 30 s before it ends it, whatever the timeout
of the job, and ends the others before they have said what they lost.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from resist.runs.config import TrainConfig
from resist.sync.distributed import loopback_store
from resist.sync.transport import hosted_workers, workers_of

# Seconds between two looks at the processes.
LOOK_S = 0.05
# When one has failed, the others need a moment to notice and to say so. Who is still there then hangs, and is killed.
FAREWELL_S = 15.0
# Exit status of a process that was told to end and has saved everything.
INTERRUPTED = 75
# The number of a pipe that the launcher holds open: when it is closed, the launcher is gone.
LIFELINE = "RESIST_LIFELINE"


def launched() -> bool:
    """Whether this process was started by torchrun, or by `launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_processes(config: TrainConfig) -> int:
    """Processes for this machine: what was asked for, else one for each GPU, or one for each worker on the CPU."""
    workers = config.method.workers
    if config.machine.processes is not None:
        return config.machine.processes
    if config.machine.device != "cpu" and torch.cuda.is_available():
        return min(workers, torch.cuda.device_count())
    return workers


def launch(arguments: Sequence[str], processes: int, timeout_s: float, workers: int) -> int:
    """Run `resist` with `arguments` in that many processes of this machine and wait for them. Returns the exit status:
    that of the first process that failed (1 where a signal ended it), or 128 and the number of a signal that ended all
    before they could save.

    The processes print for themselves. When one fails, the others are given a moment and ended. On SIGTERM, SIGINT or
    SIGHUP all are told to end in order, and killed where that takes longer than `timeout_s` (or at a second SIGINT).
    """
    store, port = loopback_store()
    ours, theirs = os.pipe()[::-1]
    children: list[subprocess.Popen[bytes]] = []
    try:
        with _signals() as told:
            for rank in range(processes):
                children.append(subprocess.Popen(
                    [sys.executable, "-m", "resist", *arguments],
                    env=_environment(rank, processes, port, theirs),
                    pass_fds=(theirs,),
                    start_new_session=True,  # a Ctrl-C comes here only, and is passed on once
                ))  # fmt: skip
            return _watch(children, told, timeout_s, workers)
    finally:
        for child in children:
            _kill(child)
        os.close(ours)
        os.close(theirs)
        del store  # it has served until here


def watch_launcher() -> None:
    """In a process that `launch` started: end in order when the launcher is gone (killed, or out of memory)."""
    if LIFELINE not in os.environ:
        return

    def wait(pipe: int) -> None:
        with contextlib.suppress(OSError):
            os.read(pipe, 1)  # nobody writes: it returns when the other end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, args=(int(os.environ.pop(LIFELINE)),), daemon=True).start()


def _environment(rank: int, processes: int, port: int, lifeline: int) -> dict[str, str]:
    """What torch.distributed wants to know, as torchrun would say it. All of it stays on this machine."""
    theirs = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0,  # the meeting point is ours
        LIFELINE: lifeline,
    }  # fmt: skip
    usual = {
        # Processes that share the cores must not each start a thread for all of them.
        "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // processes),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # what it warns of, our own lines say
    }
    text = {name: str(value) for name, value in usual.items()} | dict(os.environ)
    return text | {name: str(value) for name, value in theirs.items()}


def _watch(children: list[subprocess.Popen[bytes]], told: list[int], timeout_s: float, workers: int) -> int:
    """Wait until all have ended, and end those that are late. Returns the exit status of the job."""
    ends, passed_on = [float("inf")], 0
    failed: dict[int, int] = {}
    done = False
    while (running := [child for child in children if child.poll() is None]) and time.monotonic() < min(ends):
        if len(told) > passed_on:
            for child in running:
                child.send_signal(signal.SIGTERM)
            if passed_on == 0:
                ends.append(time.monotonic() + timeout_s)
            elif told[-1] == signal.SIGINT:
                ends.append(0.0)
            passed_on = len(told)
        if not failed and (failed := _failures(children)):
            ends.append(time.monotonic() + FAREWELL_S)
        if not done and (done := any(child.poll() == 0 for child in children)):  # all come to their end together
            ends.append(time.monotonic() + timeout_s)
        time.sleep(LOOK_S)
    failed = failed or _failures(children)
    stuck = [rank for rank, child in enumerate(children) if child.poll() is None]
    for rank in stuck:
        _kill(children[rank])
    _say(failed, stuck, workers, len(children))
    if told and (stuck or any(code != INTERRUPTED for code in failed.values())):
        return 128 + told[0]
    return next((code for code in failed.values() if code > 0), 1) if failed or stuck else 0


def _failures(children: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Exit codes other than 0 of those that have ended, by number."""
    return {rank: child.returncode for rank, child in enumerate(children) if child.poll()}


def _say(failed: dict[int, int], stuck: list[int], workers: int, processes: int) -> None:
    """A line on what the processes could not say themselves."""

    def named(ranks: list[int]) -> str:
        return ", ".join(f"process {rank} ({workers_of(rank, hosted_workers(workers, processes))})" for rank in ranks)

    for code in sorted({code for code in failed.values() if code < 0}):
        if sys.stdout.isatty():  # it may have died with the cursor hidden by its display
            print("\x1b[?25h", end="", flush=True)
        ended = [rank for rank, own in failed.items() if own == code]
        print(f"resist: {named(ended)}: ended by {signal.Signals(-code).name}", file=sys.stderr)
    if stuck:
        for rank, code in failed.items() if len(failed) < len(stuck) else ():
            if code > 0:  # it has spoken, but may not have said which one it is, and nobody noticed
                print(f"resist: {named([rank])}: ended with status {code}", file=sys.stderr)
        print(f"resist: {named(stuck)}: killed, because it did not end by itself", file=sys.stderr)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """End a process and what it has started, also a stopped one, and wait for it."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # unlike SIGTERM this reaches one that was stopped
        child.wait()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Inside it, signals that ask this process to end are noted in the list instead."""
    told: list[int] = []
    note: Callable[[int, object], None] = lambda number, _frame: told.append(number)  # noqa: E731
    if threading.current_thread() is not threading.main_thread():  # Python leaves signals to the main one
        yield told
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
