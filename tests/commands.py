"""`resist` in processes that are forked from one that has imported everything.

Most of the work of a short command is to import torch. A forked command runs the same code as a started one, with its
own session, environment, folder and output. Its workers are forks of it, as those of a command that was started are.

    commands.run("train", "--epochs", "1")        # a subprocess.CompletedProcess
    running = commands.start("train")             # used like a subprocess.Popen

A `prelude` is a function that the command calls first; it imports what it needs, and it may wrap functions of the
package: what is to happen in the middle of a run then happens at its place, however busy the machine is.
"""

import contextlib
import ctypes
import inspect
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

POLL_S = 0.02

# Ports below those that systems give out by themselves, a range for each process of pytest-xdist.
_PORTS = iter(range(15000 + 500 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:]) % 15000, 32000))


def free_port() -> str:
    """A port of this machine that no test gets twice, and that no other program takes by chance."""
    for port in _PORTS:
        with socket.socket() as attempt, contextlib.suppress(OSError):
            attempt.bind(("127.0.0.1", port))
            return str(port)
    raise OSError("no free port")


class Command:
    """A command that runs, with text on `stdout` and `stderr`, which `communicate` returns."""

    def __init__(self, server: "Commands", pid: int, output: Path, errors: Path) -> None:
        self.pid, self.output, self.errors = pid, output, errors
        self.returncode: int | None = None
        self.unforeseen = False  # whether it may end with "internal error"
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.call(poll=self.pid)
        return self.returncode

    def wait(self, timeout: float = 200) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired("resist", timeout, self.output.read_text(), self.errors.read_text())
            time.sleep(POLL_S)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        self.wait(timeout)
        out, err = (file.read_text(errors="surrogateescape") for file in (self.output, self.errors))
        assert "internal error" not in err or self.unforeseen, err
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it and wait for it; the workers that it has started end when they notice."""
        self.send_signal(signal.SIGKILL)
        while self.poll() is None:
            time.sleep(POLL_S)


class Commands:
    """The process that the commands are forked from, started at the first one."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory()
        self._started: list[Command] = []
        self._number = 0

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._server is not None:
            self.end_all()
        if self._server is not None:
            try:
                self._server.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.communicate()
        self._folder.cleanup()

    def start(
        self, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None,
        prelude: Callable[[], None] | None = None,
    ) -> Command:  # fmt: skip
        """Start `resist` with these arguments; env: added to the environment of this process."""
        self._number += 1
        output, errors = (Path(self._folder.name) / f"{self._number}.{name}" for name in ("out", "err"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        pid = self.call(
            arguments=[str(argument) for argument in arguments], environment=environment, output=str(output),
            folder=str(cwd or Path.cwd()), errors=str(errors),
            prelude=f"{textwrap.dedent(inspect.getsource(prelude))}\n{prelude.__name__}()" if prelude else "",
        )  # fmt: skip
        self._started.append(Command(self, pid, output, errors))
        return self._started[-1]

    def run(
        self, *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None,
        prelude: Callable[[], None] | None = None,
    ) -> "subprocess.CompletedProcess[str]":  # fmt: skip
        command = self.start(*arguments, cwd=cwd, env=env, prelude=prelude)
        out, err = command.communicate()
        assert command.returncode is not None
        return subprocess.CompletedProcess(["resist", *map(str, arguments)], command.returncode, out, err)

    def left(self) -> int:
        """Number of processes that commands have started and left behind."""
        return self.call(left=[command.pid for command in self._started if command.returncode is None])

    def end_all(self) -> None:
        """Kill all commands, and all processes that they have left behind."""
        for command in self._started:
            command.kill()
        if self._started:
            self.call(kill=[])
        self._started.clear()

    def call(self, **request: Any) -> Any:
        if self._server is None:
            server = [sys.executable, __file__]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
            environment.pop("RESIST_FORK", None)
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(server, stdin=pipe, stdout=pipe, env=environment, text=True, bufsize=1)
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        try:
            self._server.stdin.write(json.dumps(request) + "\n")
            return json.loads(self._server.stdout.readline())
        except BaseException:  # such as the timeout of a test: the next answer would be that to this request
            self._server.kill()
            self._server.communicate()
            self._server = None
            for command in self._started:
                if command.returncode is None:
                    command.returncode = -signal.SIGKILL
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(command.pid, signal.SIGKILL)
            self._started.clear()
            raise


def serve() -> None:
    """Answer requests, each a line of JSON on stdin, until stdin is closed."""
    from resist.training.launcher import Forked

    requests, answers = os.fdopen(os.dup(0), "r"), os.fdopen(os.dup(1), "w")
    with contextlib.suppress(OSError, AttributeError):  # what a command leaves behind becomes a child of this process
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    commands: dict[int, Forked] = {}
    while line := requests.readline():
        request = json.loads(line)
        if "poll" in request:
            answer = commands[request["poll"]].poll()
        elif "left" in request:
            answer = len(children() - set(request["left"]))
        elif "kill" in request:
            answer = kill_children()
        else:
            environment = request.pop("environment")
            command = Forked(partial(run, **request), environment, [requests.fileno(), answers.fileno()])
            commands[command.pid], answer = command, command.pid
        print(json.dumps(answer), file=answers, flush=True)


def kill_children() -> None:
    """Kill what ended commands have left behind, so that no later test counts it, and wait for all."""
    while True:
        for pid in children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children() -> set[int]:
    """Processes whose parent is this one, without those that have ended."""
    import psutil

    return {child.pid for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE}


def run(arguments: list[str], folder: str, output: str, errors: str, prelude: str) -> None:
    """Run the command in a fork of this process."""
    for number, path in enumerate((os.devnull, output, errors)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0), 0o644)
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    sys.argv = ["resist", *arguments]
    exec(prelude, {})
    main(arguments)


if __name__ == "__main__":
    from resist.training.launcher import prepare_fork

    assert prepare_fork() or sys.platform != "linux"

    import sklearn.datasets  # noqa: F401  # which a run on digits imports
    import torch._dynamo  # noqa: F401  # which every optimizer imports

    import resist.training.train  # noqa: F401
    from resist.cli import main

    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(["train", "--help"])  # which imports what reads arguments
    serve()
