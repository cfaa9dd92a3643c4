"""`resist` as a process that is forked from this one, which has imported everything already, instead of started.

Most of a short run's work is to import torch, five times over. A forked process runs the same code as a started one;
what it does not do is to take the interpreter down at its end. `command` needs a caller without threads: locks that
these hold would stay locked.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as `resist.training.launcher` says to those that it starts

import sklearn.datasets  # noqa: F401  # which a run on digits imports
import torch._dynamo  # noqa: F401  # which every optimizer imports

import resist.training.train  # noqa: F401  # which a process imports when it trains
from resist.cli import main
from resist.training import launcher

INJECT = Path(__file__).parent / "inject" / "sitecustomize.py"
POLL_S = 0.05


class Forked(launcher.Forked):
    """A fork in the place of the `subprocess.Popen` of a launcher. command: `python -m resist ...`."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str], pass_fds: Sequence[int] = (), **_: Any
    ) -> None:
        super().__init__(partial(_run, command[3:], pass_fds), env, ())


def _run(arguments: Sequence[str], kept: Sequence[int]) -> None:
    for number in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, *kept}:
        with contextlib.suppress(OSError):
            os.close(number)
    launcher.subprocess = _Subprocess  # type: ignore[assignment]
    exec(compile(INJECT.read_text(), str(INJECT), "exec"), {"__name__": "sitecustomize"})
    main(arguments)


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
    end = time.monotonic() + limit_s
    while process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            process.wait()
            return None
        time.sleep(POLL_S)
    return process.returncode
