"""Forks of the launcher, which are used like a `subprocess.Popen`."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

# Signals that ask the launcher to end the job, as far as the system has them. Batch systems send SIGUSR1 before a time
# limit, as with `sbatch --signal=USR1@300`.
ENDING = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1") if hasattr(signal, name))


def ending_signals() -> list[signal.Signals]:
    """The signals that ask a job to end, without SIGHUP where it is ignored, as under nohup."""
    return [number for number in ENDING if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]


class Child(Protocol):
    """The part of `subprocess.Popen` that the launcher uses."""

    @property
    def pid(self) -> int: ...
    def poll(self) -> int | None: ...
    def wait(self) -> int: ...
    def send_signal(self, sig: int, /) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """A fork of this process that runs `action()` in a session of its own, used like `subprocess.Popen`.

    Args:
        action: What the process runs; it ends with the status of a SystemExit that this raises.
        environment: The environment of the process.
        closed: Open files of this process that the fork closes.

    Attributes:
        pid: The number of the process.
        returncode: Exit status, negative for a signal; None while the process runs.
    """

    def __init__(
        self,
        action: Callable[[], object],
        environment: Mapping[str, str],
        closed: Sequence[int],
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        # A signal that comes before the fork has reset its handlers waits, and then ends it.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _run_fork(action, environment, closed)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        status = self._wait(0)
        assert status is not None
        return status

    def send_signal(self, sig: int, /) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def _run_fork(action: Callable[[], object], environment: Mapping[str, str], closed: Sequence[int]) -> None:
    """Become an independent process, run `action` and end. Never returns: the stack above belongs to the launcher."""
    status = 1
    try:
        try:
            os.setsid()
            for number in ENDING:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
            for number in closed:
                os.close(number)
            os.environ.clear()
            os.environ.update(environment)
            _set_num_threads(environment["OMP_NUM_THREADS"])
            action()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
        # As at the end of the interpreter, which a fork does not reach: non-daemon threads, exit functions, output.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _set_num_threads(setting: str) -> None:
    """Apply OMP_NUM_THREADS, which OpenMP has read before the fork."""
    import torch

    with contextlib.suppress(ValueError):  # a list of numbers for nested loops begins with the one for torch
        torch.set_num_threads(max(1, int(setting.partition(",")[0])))
