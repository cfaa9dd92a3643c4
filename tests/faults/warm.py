"""`resist` as a process that is forked from this one, which has imported everything already, instead of started.

Most of a short run's work is to import torch, five times over. A forked process runs the same code as a started one,
with its own session, environment, signal handlers and files; what it does not do is to take the interpreter down at its
end. `command` needs a caller without threads: locks that these hold would stay locked.
"""

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `resist.training.launcher` says to those that it starts

import sklearn.datasets  # noqa: F401  # which a run on digits imports
import torch
import torch._dynamo  # which every optimizer imports

import resist.training.launcher
import resist.training.train  # which a process imports when it trains
from resist.cli import main

INJECT = Path(__file__).parent / "inject" / "sitecustomize.py"


class Forked:
    """What `resist.training.launcher` needs of a `subprocess.Popen`. command: `python -m resist ...`."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int] = (), **_: Any
    ) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_run(list(command[3:]), env, pass_fds))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("resist", timeout or 0.0)
            time.sleep(0.05)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], env: Mapping[str, str], kept: Sequence[int]) -> int:
    """The life of a forked process. Returns its exit status."""
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for number in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *kept}:
        with contextlib.suppress(OSError):
            os.close(number)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    resist.training.launcher.subprocess = _Subprocess  # type: ignore[assignment]
    status = 1
    try:
        exec(compile(INJECT.read_text(), str(INJECT), "exec"), {"__name__": "sitecustomize"})
        main(arguments)
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


class _Subprocess:
    """Stands for the module `subprocess` in `resist.training.launcher`."""

    Popen = Forked


def command(arguments: Sequence[str], env: Mapping[str, str], errors: Path, limit_s: float) -> int | None:
    """Run `resist` in a forked process, its stderr in the file `errors`. Its exit status; None: killed at the limit."""
    assert threading.active_count() == 1, "a process with threads cannot be forked safely"
    saved = [os.dup(1), os.dup(2)]
    with errors.open("wb") as file, open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            process = Forked([sys.executable, "-m", "resist", *arguments], env=env)
        finally:
            for number, copy in enumerate(saved, start=1):
                os.dup2(copy, number)
                os.close(copy)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None
