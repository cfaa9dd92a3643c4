"""Signals to end: the line that says so at once and only once, and what a second one does."""

import ctypes
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from commands import Commands
from resist.training.interruption import Stage, announcement, interruption

ROUNDS = [(6.0, 5.0, 10), (5.0, 5.0, 10), (5.0, 5.0, 10)]  # the first of them was tested, in one second
unix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals of Unix")


@pytest.mark.parametrize(
    ("stage", "recent", "since_s", "text"),
    [
        (Stage.ROUND, ROUNDS, 1.0, "ending after this round (about 4 s); Ctrl-C again to end now"),
        (Stage.ROUND, ROUNDS, 4.9, "ending after this round (about 1 s); Ctrl-C again to end now"),
        (Stage.ROUND, ROUNDS, 7.0, "ending after this round; Ctrl-C again to end now"),
        (Stage.ROUND, [], 7.0, "ending after this round; Ctrl-C again to end now"),
        (Stage.ROUND, [(600.0, 600.0, 10)], 0.0, "ending after this round (about 10 min); Ctrl-C again to end now"),
        (Stage.BETWEEN, ROUNDS, 5.5, "ending after the next round (about 6 s); Ctrl-C again to end now"),
        (Stage.BETWEEN, ROUNDS, 50.0, "ending after the next round (about 5 s); Ctrl-C again to end now"),
        (Stage.BETWEEN, [], 50.0, "ending after the next round; Ctrl-C again to end now"),
        (Stage.END, ROUNDS, 5.5, "ending: the last round is being tested and saved; Ctrl-C again to end now"),
        (Stage.SAVE, ROUNDS, 5.5, "ending: the round is being saved; Ctrl-C again to end now"),
    ],
)
def test_the_line_says_when(stage: Stage, recent: list[tuple[float, float, int]], since_s: float, text: str) -> None:
    assert announcement(stage, recent, since_s) == text


@unix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_it_is_said_once(name: str, request: pytest.FixtureRequest) -> None:
    said, number = list[float](), getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(number, before))  # nohup and a shell's background ignore some
    handlers = [signal.getsignal(one) for one in signal.valid_signals()]
    with interruption(lambda: said.append(time.monotonic())) as event:
        assert not event.is_set()
        start = time.monotonic()
        signal.pthread_kill(threading.get_ident(), number)
        while not said and time.monotonic() - start < 10:
            time.sleep(0.01)
        assert event.is_set()
        if name != "SIGINT":
            os.kill(os.getpid(), number)  # batch systems signal all processes, and so does the launcher
            time.sleep(0.1)
    assert len(said) == 1
    assert [signal.getsignal(one) for one in signal.valid_signals()] == handlers
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.skipif(sys.platform != "linux", reason="needs a lock of the C library")
def test_it_is_said_while_the_main_thread_waits_for_another_process() -> None:
    """That is a call of C, during which Python handles no signals."""
    library, mutex, said, in_time = ctypes.CDLL(None), ctypes.create_string_buffer(128), threading.Event(), [False]

    def interrupt() -> None:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        in_time[0] = said.wait(10)
        library.pthread_mutex_unlock(mutex)

    library.pthread_mutex_lock(mutex)
    with interruption(said.set) as event:
        thread = threading.Thread(target=interrupt)
        thread.start()
        library.pthread_mutex_lock(mutex)  # until the thread gives it back
        thread.join()
        assert in_time[0]
        assert event.is_set()


@unix
def test_a_second_ctrl_c_ends_at_once() -> None:
    with interruption(lambda: None) as event:
        os.kill(os.getpid(), signal.SIGINT)
        assert event.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@unix
@pytest.mark.filterwarnings("ignore:.*fork")
def test_signals_to_processes_that_read_data_are_not_those_of_the_run() -> None:
    """They are forks, and have the same handlers; torch ends them by SIGTERM."""
    said: list[int] = []
    with interruption(lambda: said.append(1)) as event:
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.1)
        os.kill(pid, signal.SIGTERM)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert not event.is_set()
    assert not said


@unix
def test_a_hangup_is_ignored_where_it_was() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruption() as event:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not event.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def warn_before_a_limit() -> None:
    """A prelude: SIGUSR1 to the launcher after the record of round 3; the round goes on when it has been passed on."""
    import os
    import signal
    import time

    from resist.runs.directory import Run
    from resist.training.recorder import Recorder

    append, ending, said = Run.append, Recorder.ending, []

    def appended(run, record):
        append(run, record)
        if record["round"] == 3:
            os.kill(os.getppid(), signal.SIGUSR1)
            while not said:
                time.sleep(0.01)

    Run.append = appended
    Recorder.ending = lambda *arguments: (ending(*arguments), said.append(1))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_a_warning_before_a_time_limit_saves_as_sigterm_does(commands: Commands, tmp_path: Path) -> None:
    options = ["--workers", "2", "--processes", "2", "--min-depth", "0", "--model-args", "depths=1,1,5,1", "width=4"]
    options += ["--batch-size", "32", "--local-steps", "2", "--epochs", "9", "--num-evals", "1", "--device", "cpu"]
    done = commands.run("train", *options, "--out", tmp_path / "run", prelude=warn_before_a_limit)
    assert (done.returncode, done.stderr) == (75, "")
    lines = done.stdout.splitlines()
    assert [line for line in lines if "Ctrl-C again to end now" in line] == [lines[-2]]
    assert lines[-2].startswith("ending after the next round (about ")
    assert lines[-1].startswith("interrupted after round 4; to continue: resist train --resume ")
    assert list((tmp_path / "run" / "checkpoints").glob("round-000004"))
    assert not (tmp_path / "run" / "lock").exists()
