"""The lock of a run directory: who has it, when it is free, and what a process does that has lost it."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from resist.errors import UserError
from resist.runs import holder, lock
from resist.runs.config import TrainConfig
from resist.runs.directory import Run
from resist.runs.holder import Holder
from resist.runs.lock import RunLock

needs_flock = pytest.mark.skipif(lock.fcntl is None, reason="needs locks of the system")
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")

HOLD = """
import sys
from pathlib import Path
from resist.runs.lock import RunLock
RunLock(Path(sys.argv[1]), "train").acquire()
print("has it", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of waiting become tenths."""
    monkeypatch.setattr(lock, "BEAT_S", 0.05)
    monkeypatch.setattr(lock, "SETTLE_S", 0.1)
    monkeypatch.setattr(holder, "STALE_S", 0.6)
    monkeypatch.setattr(holder, "POLL_S", 0.02)


@pytest.fixture
def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has no locks."""
    monkeypatch.setattr(lock, "_lock", lambda fd: None)


@contextlib.contextmanager
def another(path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process of this machine that has the lock."""
    command = [sys.executable, "-S", "-c", HOLD, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        yield process
        process.kill()


def elsewhere(path: Path, age_s: float = 0.0, **changes: object) -> Holder:
    """Write the lock file of a process on another machine, whose last heartbeat is so old."""
    with open(path / lock.FILE, "wb") as file:
        made = replace(holder.this_process("train", file.fileno()), host="far", machine="other", process=7, **changes)
        holder.put(file.fileno(), made)
    os.utime(path / lock.FILE, (time.time() - age_s,) * 2)
    return made


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught, RunLock(path, "train"):
        pass
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path)) * 2
    return str(caught.value)


def content(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


@pytest.mark.parametrize("flock", [pytest.param(True, marks=needs_flock), pytest.param(False, marks=needs_fork)])
def test_a_second_process_is_refused_until_the_first_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool
) -> None:
    if not flock:
        monkeypatch.setattr(lock, "_lock", lambda fd: None)
    with another(tmp_path) as first:
        before = (tmp_path / lock.FILE).read_bytes()
        text = refusal(tmp_path)
        for part in (f"process {first.pid} on ", "since 20", "(resist train)", "stop it there"):
            assert part in text
        assert (tmp_path / lock.FILE).read_bytes() == before
        first.send_signal(signal.SIGSTOP)  # as long as it likes: it is on this machine, and alive
        os.utime(tmp_path / lock.FILE, (0, 0))
        assert f"process {first.pid} on " in refusal(tmp_path)
        first.kill()
        first.wait()
        start = time.monotonic()
        with RunLock(tmp_path, "train"):
            assert time.monotonic() - start < 0.9  # it does not settle
            assert json.loads((tmp_path / lock.FILE).read_text())["process"] == os.getpid()
    assert content(tmp_path) == []


@needs_flock
@needs_fork
@pytest.mark.filterwarnings("ignore:.*fork")
def test_a_fork_that_outlives_the_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Processes that read data are forks, and a fork has the open files of its parent."""
    held = RunLock(tmp_path, "train")
    held.acquire()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            held.release()  # it is not its own
            time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.2)
        assert refusal(tmp_path)
        held.release()
        with RunLock(tmp_path, "train"):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_lock_of_another_machine_lives_as_long_as_its_heartbeat(
    tmp_path: Path, without_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age_s in (0.0, -3600.0):  # the clock of the file system counts, and may have been set back
        made = elsewhere(tmp_path, age_s)
        ended = threading.Event()

        def beat(made: Holder = made, ended: threading.Event = ended) -> None:
            with open(tmp_path / lock.FILE, "r+b") as file:
                for number in range(1000):
                    if ended.wait(0.1):
                        return
                    holder.put(file.fileno(), replace(made, beat=number))

        thread = threading.Thread(target=beat)
        thread.start()
        assert "process 7 on far since" in refusal(tmp_path)
        ended.set()
        thread.join()
    elsewhere(tmp_path)
    start = time.monotonic()
    with RunLock(tmp_path, "train"):  # nothing comes for as long as is stated
        assert 0.3 < time.monotonic() - start < 5
    elsewhere(tmp_path, 3600.0)
    monkeypatch.setattr(holder, "STALE_S", 60.0)
    start = time.monotonic()
    with RunLock(tmp_path, "train"):  # a job that is queued again is not locked out, and does not wait
        assert time.monotonic() - start < 5


@needs_flock
def test_a_machine_that_has_lost_its_power_does_not_keep_a_lock_of_the_file_server(tmp_path: Path) -> None:
    assert lock.fcntl is not None
    elsewhere(tmp_path, 3600.0)
    with open(tmp_path / lock.FILE, "r+b") as served:
        lock.fcntl.flock(served, lock.fcntl.LOCK_EX)
        with RunLock(tmp_path, "train"):
            assert refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"host": 3}', "\x00" * 50])
def test_a_damaged_lock_file_does_not_lock_anyone_out(tmp_path: Path, text: str) -> None:
    (tmp_path / lock.FILE).write_text(text)
    with RunLock(tmp_path, "train"):
        pass
    assert content(tmp_path) == []


def test_a_copy_of_a_locked_directory_is_free(tmp_path: Path, without_flock: None) -> None:
    (tmp_path / "a").mkdir()
    with RunLock(tmp_path / "a", "train"):
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert content(tmp_path / "b") == [lock.FILE]
        with RunLock(tmp_path / "b", "train"):
            assert refusal(tmp_path / "a")


def test_a_process_that_slept_while_its_lock_was_taken_over_writes_nothing_more(tmp_path: Path) -> None:
    held = RunLock(tmp_path / "run", "train")
    run = Run(tmp_path / "run", TrainConfig(), lock=held)
    with contextlib.closing(run):
        run.append({"round": 1})
        run.state("running", 5)
        before = {file.name: file.read_bytes() for file in run.path.iterdir() if file.name != lock.FILE}
        assert run.taken_over() is None
        (run.path / lock.FILE).unlink()
        elsewhere(run.path)
        taken = (run.path / lock.FILE).read_bytes()
        with pytest.raises(UserError, match=r"was taken over by process 7 on far since .*; it ends here, and writes"):
            run.append({"round": 2})
        assert run.taken_over()
        run.state("failed", 5)
        held.release()
    assert (run.path / lock.FILE).read_bytes() == taken  # also without a heartbeat of ours in it
    (run.path / lock.FILE).unlink()
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == before


def test_of_two_that_take_over_a_stale_lock_at_the_same_time_one_has_it(
    tmp_path: Path, without_flock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SETTLE_S", 0.4)
    elsewhere(tmp_path, 3600.0)
    results: list[str] = []

    def take() -> None:
        try:
            RunLock(tmp_path, "train").acquire()
            results.append("has it")
        except UserError:
            results.append("refused")

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["has it", "refused"]


@needs_flock
def test_file_systems_without_locks_are_told_from_locks_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(number: int) -> Callable[[int, int], None]:
        def flock(fd: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        return flock

    for number, expected in ((errno.ENOLCK, None), (errno.EOPNOTSUPP, None), (errno.EWOULDBLOCK, False)):
        monkeypatch.setattr(lock.fcntl, "flock", failing(number))
        assert lock._lock(0) is expected
    monkeypatch.setattr(lock.fcntl, "flock", failing(errno.EIO))
    assert "lock cannot be written: Input/output error" in refusal(tmp_path)
    assert "lock cannot be written: No such file" in refusal(tmp_path / "none")


IMPORTS = """
import shutil, signal, sys
for name in ("SIGHUP", "SIGUSR1", "SIGCHLD", "SIGKILL", "pthread_sigmask"):
    delattr(signal, name)
sys.modules["fcntl"] = None
sys.platform = "win32"
import resist.runs.lock, resist.training.forks
assert resist.runs.lock.fcntl is None
assert {signal.SIGTERM, signal.SIGINT} == set(resist.training.forks.ENDING)
"""


def test_the_modules_can_be_imported_where_there_are_no_locks_and_few_signals() -> None:
    done = subprocess.run([sys.executable, "-S", "-c", IMPORTS], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
