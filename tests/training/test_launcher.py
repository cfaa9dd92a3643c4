"""The launcher with small scripts instead of workers: it ends and leaves no process behind, whatever they do."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resist.errors import UserError
from resist.training import launcher
from resist.training.launcher import LIFELINE, launch

STATUSES: dict[str, tuple[str, int, str]] = {
    "all is well": ("pass", 0, ""),
    "one fails": ("sys.exit(3 * (rank == 1))", 3, ""),
    "all fail": ("sys.exit(2)", 2, ""),
    "one is killed": (
        "os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else sys.exit(1)", 1,
        "process 1 (worker 1): ended by SIGKILL",
    ),
    "one hangs": (
        "time.sleep(100) if rank == 2 else sys.exit(1)", 1,
        "process 2 (workers 2, 3): killed, because it did not end by itself",
    ),
    "one is stopped": (
        "os.kill(os.getpid(), signal.SIGSTOP * (rank == 0)); sys.exit(100)", 100,
        "process 0 (worker 0): killed, because it did not end by itself",
    ),
    "one does not end": (
        "time.sleep(100 * (rank == 1))", 1, "process 1 (worker 1): killed, because it did not end by itself"
    ),
    "one starts another, and hangs": (
        "subprocess.run(['sleep', '100']) if rank == 1 else sys.exit(1)", 1, "process 1 (worker 1): killed, because it"
    ),
}  # fmt: skip


def patience(script: str) -> float:
    """Seconds to wait for a script: few where it has to be killed, else as many as a busy machine may need."""
    return 3.0 if "100" in script else 60.0


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[subprocess.Popen[bytes]]]:
    """Make `launch` start a script; returns the list of the processes that it starts."""

    def use(script: str) -> list[subprocess.Popen[bytes]]:
        started: list[subprocess.Popen[bytes]] = []
        head = "import os, signal, subprocess, sys, time\nrank = int(os.environ['RANK'])\n"

        class Scripts:
            @staticmethod
            def Popen(command: list[str], **options: Any) -> subprocess.Popen[bytes]:  # noqa: N802
                started.append(subprocess.Popen([sys.executable, "-S", "-c", head + script], **options))
                return started[-1]

        monkeypatch.setattr(launcher, "subprocess", Scripts)
        monkeypatch.setattr(launcher, "FAREWELL_S", patience(script))
        return started

    return use


@pytest.mark.slow
@pytest.mark.parametrize("case", STATUSES)
def test_it_ends_with_the_status_of_the_failure_and_reports_what_no_process_can(
    scripted: Callable[[str], list[subprocess.Popen[bytes]]], capfd: pytest.CaptureFixture[str], case: str
) -> None:
    script, status, message = STATUSES[case]
    started = scripted(script)
    assert launch([], 3, patience(script), 4) == status
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == bool(message)
    assert message in "".join(lines)
    assert all(process.returncode is not None for process in started)


@pytest.mark.slow
def test_a_process_that_fails_before_it_is_connected_is_named(
    scripted: Callable[[str], list[subprocess.Popen[bytes]]], capfd: pytest.CaptureFixture[str]
) -> None:
    scripted("sys.exit(1) if rank == 1 else time.sleep(100)")
    assert launch([], 3, 2.0, 3) == 1
    assert capfd.readouterr().err.splitlines() == [
        "resist: process 1 (worker 1): ended with status 1",
        "resist: process 0 (worker 0), process 2 (worker 2): killed, because it did not end by itself",
    ]


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("signal.signal(15, lambda *_: sys.exit(75)); open('ready', 'a').write('x'); time.sleep(100)", 75),
        ("open('ready', 'a').write('x'); time.sleep(100)", 128 + signal.SIGTERM),
        ("signal.signal(15, signal.SIG_IGN); open('ready', 'a').write('x'); time.sleep(100)", 128 + signal.SIGTERM),
    ],
    ids=["they save", "they end at once", "they ignore it"],
)
def test_a_signal_is_passed_on_to_all(
    scripted: Callable[[str], list[subprocess.Popen[bytes]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    script: str, status: int,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    started = scripted(script)

    ready = tmp_path / "ready"

    def send() -> None:
        while not ready.exists() or len(ready.read_text()) < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    assert launch([], 3, 1.0 if "SIG_IGN" in script else 60.0, 3) == status
    assert all(process.returncode is not None for process in started)


def test_a_hangup_is_ignored_under_nohup(scripted: Callable[[str], list[subprocess.Popen[bytes]]]) -> None:
    scripted("os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.5)")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch([], 2, 60.0, 2) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_workers_do_not_outlive_the_launcher(tmp_path: Path) -> None:
    """A launcher that is killed closes its end of the pipe, and the workers get SIGTERM."""
    script = (
        "import os, sys, time, resist.training.launcher as launch\n"
        "launch.watch_launcher()\n"
        "print('ready', flush=True)\n"
        "time.sleep(100)\n"
    )
    ours, theirs = os.pipe()[::-1]
    worker = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, LIFELINE: str(theirs)}, pass_fds=(theirs,),
        stdout=subprocess.PIPE,
    )  # fmt: skip
    os.close(theirs)
    assert worker.stdout is not None
    assert worker.stdout.readline() == b"ready\n"
    os.close(ours)
    assert worker.wait(30) == -signal.SIGTERM
    worker.stdout.close()


FORKS = """
import json, os, signal, subprocess, sys, time
from resist.errors import UserError
from resist.training import launcher
assert launcher.prepare_fork()
import torch
import resist.sync.distributed

launcher.subprocess = None  # nothing but forks
torch.set_num_threads(1)
for script in json.load(sys.stdin):
    launcher.FAREWELL_S = patience = 3.0 if "100" in script else 60.0

    def work():
        rank = int(os.environ["RANK"])
        assert os.getsid(0) == os.getpid()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        exec(script)

    status = launcher.launch(["train"], 3, patience, 4, fork=work)
    print("status", status, file=sys.stderr, flush=True)
    try:
        os.waitpid(-1, 0)
        sys.exit("a process was left behind")
    except ChildProcessError:
        pass
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_forks_end_as_new_processes_do() -> None:
    """The same scripts in forks of a launcher: statuses, messages, sessions, signal handlers, and none left behind."""
    scripts = json.dumps([script for script, _, _ in STATUSES.values()])
    done = subprocess.run([sys.executable, "-c", FORKS], input=scripts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for case, (_, status, message) in STATUSES.items():
        if message:
            assert message in lines.pop(0), case
        assert lines.pop(0) == f"status {status}", case
    assert not lines


def test_a_job_of_one_machine_keeps_to_the_loopback_whatever_is_exported(
    scripted: Callable[[str], list[subprocess.Popen[bytes]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    exported = {"MASTER_ADDR": "192.0.2.1", "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0",
                "NCCL_SOCKET_IFNAME": "^lo,docker", "GLOO_DEVICE_TRANSPORT": "UV",
                "NCCL_COMM_ID": "192.0.2.1:1"}  # fmt: skip
    for name, value in exported.items():
        monkeypatch.setenv(name, value)
    kept = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": loopback, "TP_SOCKET_IFNAME": loopback,
            "NCCL_SOCKET_IFNAME": f"={loopback}"}  # fmt: skip
    scripted(f"sys.exit({kept!r} != {{name: os.environ[name] for name in {list(exported)} if name in os.environ}})")
    assert launch([], 1, 60.0, 1) == 0


def test_a_loopback_of_ipv6_alone_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutIPv4:
        def __getattr__(self, name: str) -> Any:
            return getattr(socket, name)

        @staticmethod
        def create_server(address: tuple[str, int], **options: Any) -> socket.socket:
            if address[0] == "127.0.0.1":
                raise OSError(99, "Cannot assign requested address")
            return socket.create_server(address, **options)

    monkeypatch.setattr(launcher, "socket", WithoutIPv4())
    if not socket.has_ipv6:
        pytest.skip("there is no IPv6 here")
    with launcher.loopback_listener() as listener:
        assert listener.getsockname()[0] == "::1"
    monkeypatch.setattr(WithoutIPv4, "create_server", lambda *_, **__: (_ for _ in ()).throw(OSError(99, "none")))
    with pytest.raises(UserError, match=r"cannot meet at its loopback interface \(127\.0\.0\.1: none; ::1: none\)"):
        launcher.loopback_listener()
