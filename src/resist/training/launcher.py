"""Local launcher: start, monitor and clean up the worker processes of one machine.

It replaces torch's elastic agent, which gives a process that hangs 30 s before it kills it, whatever the timeout of the
job, and which ends the other processes before they have reported what they lost.

On Linux the workers of a CPU run are forked from the launcher: importing torch takes seconds, and it is done once. A
process may only be forked safely while it has a single thread and has not initialized CUDA. So workers on GPUs, and all
workers where this process has other threads, are new Python processes.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resist.errors import UserError
from resist.runs.config import TrainConfig
from resist.runs.directory import COMMAND, command
from resist.training.forks import Child, Forked, ending_signals

# Seconds between two looks at the processes.
POLL_S = 0.05
# When one has failed, the others need a moment to notice and to report it. Those that still run after it are killed.
FAREWELL_S = 15.0
# Exit status of a process that was ended by a signal and has saved everything.
INTERRUPTED = 75
# Environment variable: the number of a pipe that the launcher holds open. The pipe closes when the launcher ends.
LIFELINE = "RESIST_LIFELINE"
# Environment variable: 0 starts new Python processes instead of forks.
FORK = "RESIST_FORK"
# Most processes on a machine: some for each core, but so many are always allowed.
PER_CORE, ALWAYS = 8, 64
# Environment variables that would make a job of one machine use another network.
FOREIGN = ("GLOO_DEVICE_TRANSPORT", "NCCL_COMM_ID", "NCCL_SOCKET_FAMILY", "NCCL_HOSTID")
_prepared = False  # whether `prepare_fork` came before the import of torch


def launched() -> bool:
    """Return True in a process that torchrun or `launch` has started."""
    return bool(os.environ.get("RANK") and os.environ.get("WORLD_SIZE"))


def num_processes(config: TrainConfig) -> int:
    """Number of processes on this machine: `processes`, else one per GPU, or on the CPU one per worker up to a bound.

    Raises:
        UserError: `processes` exceeds what the cores of this machine can share.
    """
    from resist.data.readers import num_cores  # imports torch, which `prepare_fork` has to come before

    workers, given, cores = config.method.workers, config.machine.processes, num_cores()
    most = max(ALWAYS, PER_CORE * cores)
    if given is not None and given > most:
        raise UserError(
            f"`processes={given}` is too large for {cores} cores; give at most {most}: a process trains several workers"
        )
    if given is not None:
        return given
    if config.machine.device != "cpu":
        import torch

        if torch.cuda.is_available():
            return min(workers, torch.cuda.device_count())
    return min(workers, most)


def prepare_fork() -> bool:
    """Prepare this process, before it imports torch, to be forked later.

    Returns:
        True where its workers may be forked: on Linux, unless torch had been imported before the first call.
    """
    global _prepared
    if sys.platform != "linux" or os.environ.get(FORK) == "0" or ("torch" in sys.modules and not _prepared):
        return False
    _prepared = True
    # Both are read during the import. OpenBLAS, which comes with numpy, otherwise starts its threads there.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return True


def launch(
    arguments: Sequence[str],
    processes: int,
    timeout_s: float,
    workers: int,
    *,
    fork: Callable[[], object] | None = None,
) -> int:
    """Run `resist` with `arguments` in several processes of this machine and wait for them.

    The processes print for themselves. When one fails, the others get a moment to report it and are then killed. On
    SIGTERM, SIGINT, SIGHUP or SIGUSR1 all of them get SIGTERM, and are killed if that takes longer than `timeout_s` (or
    at a second SIGINT). SIGHUP stays ignored where it was, as under nohup.

    Args:
        arguments: The command line, without the program's name.
        processes: Number of processes to start.
        timeout_s: Seconds that the processes may take to end after a signal, or after the first of them has ended.
        workers: Number of workers of the job, for messages.
        fork: A function that does the same as `resist` with `arguments`. The processes are forks of this one that call
            it, if this process has a single thread. Default: they are new Python processes.

    Returns:
        The exit status: that of the first process that failed (1 where a signal ended it), or 128 plus the number of a
        signal that ended the job before it could save.
    """
    from resist.sync.process_group import loopback_store

    forked = fork if fork is not None and num_threads() == 1 else None
    listener = loopback_listener()
    lifeline, kept_open = os.pipe()
    children: list[Child] = []
    store = None
    try:
        with collected_signals() as received:
            for rank in range(processes):
                environment = _environment(rank, processes, listener.getsockname(), lifeline)
                if forked is None:
                    children.append(new_process(arguments, environment, lifeline))
                else:
                    children.append(Forked(forked, environment, (listener.fileno(), kept_open)))
            # Its server is a thread, so it comes after the forks. Connections wait in the listener until then.
            store = loopback_store(listener)
            return _watch(children, received, timeout_s, workers)
    finally:
        for child in children:
            end_now(child)
        os.close(kept_open)
        os.close(lifeline)
        listener.close()
        del store  # the processes need it until here


def new_process(arguments: Sequence[str], environment: Mapping[str, str], lifeline: int) -> "subprocess.Popen[bytes]":
    """Start `resist` in a new process of this machine.

    Args:
        arguments: The command line, without the program's name.
        environment: The environment of the process.
        lifeline: Open file that it inherits.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "resist", *arguments],
        env=environment,
        pass_fds=(lifeline,),
        start_new_session=True,  # Ctrl-C reaches the launcher only, which passes it on once
    )


def loopback_listener() -> socket.socket:
    """Listen at the loopback address; on machines without IPv4, at that of IPv6."""
    reasons: list[str] = []
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.ExitStack() as stack:
            try:
                listener = stack.enter_context(socket.create_server((host, 0), family=family))
                # The interface may be down.
                with socket.create_connection(listener.getsockname()[:2], timeout=5), listener.accept()[0]:
                    pass
            except OSError as error:
                reasons.append(f"{host}: {error.strerror or error}")
                continue
            stack.pop_all()
            return listener
    raise UserError(
        f"the processes of this machine cannot meet at its loopback interface ({'; '.join(reasons)}); set it up "
        "(ip link set lo up), or give `processes=1`"
    )


def num_threads() -> int:
    """Number of threads of this process, including those that libraries have started."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.exists() else 2


def watch_launcher() -> bool:
    """Send this process SIGTERM when the launcher that started it ends for any reason.

    Returns:
        True if a launcher has started it.
    """
    if LIFELINE not in os.environ:
        return False

    def wait(pipe: int) -> None:
        with contextlib.suppress(OSError):
            os.read(pipe, 1)  # nothing is ever written; it returns when the launcher's end is closed
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, args=(int(os.environ.pop(LIFELINE)),), daemon=True).start()
    return True


def _environment(rank: int, processes: int, address: tuple[Any, ...], lifeline: int) -> dict[str, str]:
    """Environment of one process: the variables that torchrun sets, with everything on this machine's loopback."""
    required = {
        "RANK": rank,
        "WORLD_SIZE": processes,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the launcher serves the store, which outlives every worker
        "TORCHELASTIC_RESTART_COUNT": 0,
    }
    shared = local_environment(rank, processes, address, lifeline)
    return shared | {name: str(value) for name, value in required.items()}


def local_environment(number: int, processes: int, address: tuple[Any, ...], lifeline: int) -> dict[str, str]:
    """Environment of a process of this machine, but for its number in the job.

    Args:
        number: Its number on this machine.
        processes: Number of processes of this machine.
        address: Host and port of the store.
        lifeline: Open file that closes when the launcher ends.
    """
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    # Set whatever the user's environment says for jobs of several machines: this one is to be reached by nobody else.
    required = {
        "LOCAL_RANK": number,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": address[0],
        "MASTER_PORT": address[1],
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": f"={loopback}",
        "TP_SOCKET_IFNAME": loopback,
        LIFELINE: lifeline,
        COMMAND: json.dumps(command()),
    }
    defaults = {
        # Processes that share the cores must not each start a thread for all of them.
        "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // processes),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # resist reports these errors itself
    }
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    text = {name: str(value) for name, value in defaults.items()} | kept
    return text | {name: str(value) for name, value in required.items()}


def _watch(children: Sequence[Child], received: list[int], timeout_s: float, workers: int) -> int:
    """Wait until all processes have ended, and kill those that are late. Returns the exit status of the job."""
    ends, passed_on = [float("inf")], 0
    failed: dict[int, int] = {}
    done = False
    while (running := [child for child in children if child.poll() is None]) and time.monotonic() < min(ends):
        if len(received) > passed_on:
            for child in running:
                child.send_signal(signal.SIGTERM)
            if passed_on == 0:
                ends.append(time.monotonic() + timeout_s)
            elif received[-1] == signal.SIGINT:
                ends.append(0.0)
            passed_on = len(received)
        if not failed and (failed := _failures(children)):
            ends.append(time.monotonic() + FAREWELL_S)
        if not done and (done := any(child.poll() == 0 for child in children)):  # a job ends everywhere at once
            ends.append(time.monotonic() + timeout_s)
        time.sleep(POLL_S)
    failed = failed or _failures(children)
    stuck = [rank for rank, child in enumerate(children) if child.poll() is None]
    ended = _failures(children)  # the first ones, and those that failed after them
    for rank in stuck:
        end_now(children[rank])
    obeyed = [rank for rank, code in ended.items() if received and code == -signal.SIGTERM]
    if stuck and len(received) > 1:
        print("resist: ended now; the round under way is not saved", file=sys.stderr)
    else:
        _report({rank: code for rank, code in ended.items() if rank not in obeyed}, stuck, workers, len(children))
    if len(obeyed) == len(children):
        print("resist: interrupted before the first round", file=sys.stderr)
    if received and (stuck or any(code != INTERRUPTED for code in failed.values())):
        return 128 + received[0]
    return next((code for code in failed.values() if code > 0), 1) if failed or stuck else 0


def _failures(children: Sequence[Child]) -> dict[int, int]:
    """Exit codes other than 0 of the processes that have ended, by rank."""
    return {rank: code for rank, child in enumerate(children) if (code := child.poll())}


def _report(failed: dict[int, int], stuck: list[int], workers: int, processes: int) -> None:
    """Print a line about each end that the processes could not report themselves."""
    from resist.sync.transport import hosted_workers, workers_of

    def named(ranks: list[int]) -> str:
        return ", ".join(f"process {rank} ({workers_of(rank, hosted_workers(workers, processes))})" for rank in ranks)

    for code in sorted({code for code in failed.values() if code < 0}):
        if sys.stdout.isatty():  # its live display may have hidden the cursor
            print("\x1b[?25h", end="", flush=True)
        ended = [rank for rank, status in failed.items() if status == code]
        print(f"resist: {named(ended)}: ended by {signal.Signals(-code).name}", file=sys.stderr)
    if stuck:
        for rank, code in failed.items() if len(failed) < len(stuck) else ():
            if code > 0:  # its own message need not name the process, and no other process noticed
                print(f"resist: {named([rank])}: ended with status {code}", file=sys.stderr)
        print(f"resist: {named(stuck)}: killed, because it did not end by itself", file=sys.stderr)


def end_now(child: Child) -> None:
    """Kill a process and those that it has started, even when it is stopped, and wait for it."""
    if child.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # unlike SIGTERM this reaches a stopped process
        child.kill()  # a fork that has no session yet
        child.wait()


@contextlib.contextmanager
def collected_signals() -> Iterator[list[int]]:
    """Collect the signals that ask this process to end in a list, instead of ending it."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python handles signals in the main thread only
        yield received
        return
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in ending_signals()}
    before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how a fork ended
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
