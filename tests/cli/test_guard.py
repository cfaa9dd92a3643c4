"""How a command ends: one line and a documented status for every error, the traceback of a bug in a file."""

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from commands import Commands
from resist import cli
from resist.cli import guard, main
from resist.cli.plan import PlanConfig
from resist.errors import AgreedError, UserError, WorkerLostError

SMALL = [
    "--workers", "2", "--min-depth", "0", "--model-args", "depths=1,1,3,1", "width=4", "--batch-size", "32",
    "--local-steps", "2", "--epochs", "0.1", "--num-evals", "1", "--batchnorm", "average", "--device", "cpu",
]  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[], object]], None]:
    """Put a function in the place of `resist plan`; temporary files are below `tmp_path`."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return lambda action: monkeypatch.setitem(cli.COMMANDS, "plan", (PlanConfig, lambda *_: action() or 0))


def raising(error: BaseException) -> Callable[[], None]:
    def action() -> None:
        raise error

    return action


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(list(arguments) or ["plan"])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def recurse() -> None:
    recurse()


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("`lr=-1` is too small"), 2, "--lr -1 is too small"),
        (AgreedError("diverged"), 2, "diverged"),
        (WorkerLostError("lost"), 1, "lost"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory: this machine has no more; lower --batch-size, raise --grad-accum-steps"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. x"), 2, "out of memory: CUDA out of m"),
        (
            RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
            2,
            "out of memory: CUDA error: out of",
        ),
        (
            RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors"),
            2,
            "CUDA error: no kernel image is available for execution on the device; this torch has no code for the GPU: "
            "install one that was built for it, or give --device cpu",
        ),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 2, "out of memory: "),
        (OSError(errno.ENOSPC, "No space left on device", "a b"), 2, "a b: No space left on device; make room"),
        (OSError(errno.EACCES, "Permission denied", "a"), 2, "a: Permission denied; check its permissions"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "Too many open files; raise the limit of open files"),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), 2, "matplotlib is missing; install"),
    ],
)
def test_known_errors_have_a_line_and_a_status(capsys, command, error, status: int, text: str) -> None:
    command(raising(error))
    found, out, err = ended(capsys)
    assert (found, out, err.count("\n")) == (status, "", 1)
    assert text in err


@pytest.mark.internal_error
@pytest.mark.parametrize(
    ("action", "text"),
    [
        (raising(KeyError("x\n")), r"internal error: KeyError: 'x\n'; the traceback is in "),
        (raising(RuntimeError("first\nsecond")), "internal error: RuntimeError: first; the traceback is in "),
        (raising(AssertionError()), "internal error: AssertionError; the traceback is in "),
        (raising(FileNotFoundError(2, "No such file or directory", "a")), "internal error: FileNotFoundError: "),
        (raising(BrokenPipeError(32, "Broken pipe")), "internal error: BrokenPipeError: "),  # not standard output's
        (recurse, "internal error: RecursionError: "),
    ],
)
def test_an_error_that_nobody_foresaw_is_kept_in_a_file(capsys, command, tmp_path, monkeypatch, action, text) -> None:
    command(action)
    files = []
    for _ in range(2):
        status, out, err = ended(capsys)
        assert (status, out, err.count("\n")) == (70, "", 1)
        assert err.startswith(f"resist: {text}")
        files.append(Path(err.split("traceback is in ")[1].removesuffix("; please report it\n")))
        assert "Traceback (most recent call last)" in files[-1].read_text()
        assert files[-1].parent == tmp_path
    assert files[0] != files[1]
    monkeypatch.setenv("RESIST_DEBUG", "1")
    _, _, err = ended(capsys)
    assert "Traceback (most recent call last)" in err


@pytest.mark.internal_error
def test_a_traceback_is_kept_in_the_run_directory_and_no_other_is_overwritten(capsys, command, tmp_path) -> None:
    run = tmp_path / "run"

    def action() -> None:
        guard.keep_errors_in(run)
        raise KeyError

    command(action)
    assert str(run) not in ended(capsys)[2]
    run.mkdir()
    (run / "config.json").touch()
    (run / "error.txt").write_text("an earlier one")
    assert f"{run}/error-2.txt" in ended(capsys)[2]
    assert (run / "error.txt").read_text() == "an earlier one"
    (run / "error-2.txt").unlink()
    (run / "error.txt").unlink()
    assert f"{run}/error.txt" in ended(capsys)[2]


@pytest.mark.internal_error
def test_an_error_in_another_thread_is_a_line_and_the_command_goes_on(capsys, command) -> None:
    def action() -> None:
        thread = threading.Thread(target=raising(KeyError("x")))
        thread.start()
        thread.join()
        print("done")

    command(action)
    status, out, err = ended(capsys)
    assert (status, out, err.count("\n")) == (0, "done\n", 1)
    assert "internal error: KeyError: 'x'" in err


def break_a_round() -> None:
    """A prelude: an error in the second synchronization of worker 1."""
    import resist.job

    synchronize = resist.job.Job.synchronize

    def broken(job, *arguments):
        if job.round == 1 and job.workers[0].index == 1:
            raise LookupError("nobody foresaw this")
        return synchronize(job, *arguments)

    resist.job.Job.synchronize = broken


@pytest.mark.slow
def test_a_worker_that_ends_with_an_internal_error_names_the_file(commands: Commands, tmp_path: Path) -> None:
    running = commands.start("train", *SMALL, "--out", tmp_path / "a b", prelude=break_a_round)
    running.unforeseen = True
    _, err = running.communicate()
    assert running.returncode in (70, 1)  # 1 where the process that lost contact ended before
    assert err.count("internal error: LookupError: nobody foresaw this; the traceback is in ") == 1
    assert "Traceback" not in err
    assert "LookupError: nobody foresaw this" in (tmp_path / "a b" / "error.txt").read_text()


def without_reader() -> None:
    """A prelude: standard output is a pipe whose reader has ended."""
    import os

    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


def on_a_full_disk() -> None:
    """A prelude: standard output is a file on a full disk."""
    import os

    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


FULL = "resist: standard output cannot be written: No space left on device; give it another file, or make room\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prelude", "ended", "reason"),
    [
        (without_reader, (141, ""), "Broken pipe"),
        pytest.param(on_a_full_disk, (2, FULL), "No space left on device", marks=pytest.mark.nightly),
    ],
    ids=["without reader", "full disk"],
)
def test_a_lost_standard_output_ends_a_list_and_no_run(
    commands: Commands, tmp_path: Path, prelude: Callable[[], None], ended: tuple[int, str], reason: str
) -> None:
    for arguments in (("plan",), ("--help",), ("train", "--help")):
        done = commands.run(*arguments, prelude=prelude)
        assert (done.returncode, done.stderr) == ended
    run = tmp_path / "run"
    done = commands.run("train", *SMALL, "--out", run, prelude=prelude)
    text = f"resist: standard output is lost ({reason}); the command goes on without it\n"
    assert (done.returncode, done.stderr) == (0, text)
    assert (run / "model.safetensors").exists()


NAME = os.fsdecode(b"caf\xe9 \n")


@pytest.mark.slow
def test_a_name_that_is_not_utf8_is_printed_by_every_command(commands: Commands, tmp_path: Path) -> None:
    def strict() -> None:
        import sys

        sys.stdout.reconfigure(encoding="utf-8", errors="strict")  # as in a locale of UTF-8

    run, shown = tmp_path / NAME, f"{tmp_path}/caf\\xe9 \\x0a"
    for arguments in (["train", *SMALL, "--out", run], ["report", run], ["evaluate", run], ["watch", run],
                      ["export", run, "--to", "safetensors"], ["report", run, "-o", tmp_path / os.fsdecode(b"\xff.md")],
                      ["train", "--resume", run]):  # fmt: skip
        done = commands.run(*arguments, prelude=strict)
        assert (done.returncode, done.stderr) == (0, ""), arguments
    assert "caf\\xe9 " in (run / "report.html").read_text()
    done = commands.run("train", "--out", run, prelude=strict)
    assert (done.returncode, done.stderr) == (
        2, f"resist: --out $'{shown}' exists already and is never overwritten; give another directory, or remove it\n"
    )  # fmt: skip


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_text_can_be_printed_in_every_encoding(encoding: str) -> None:
    code = (
        "import sys; from resist.cli.printing import open_streams, print_error; open_streams(lasting=True)\n"
        "text = 'a\\udce9 ■ é \\u4e2d'; print(text); print_error(text + '\\n\\x1b')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=True
    )
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    assert out.startswith("a\\xe9 ")
    assert err.startswith("resist: a\\xe9 ")
    assert err.endswith("\\n\\x1b\n")
    assert err.count("\n") == 1
    assert ("■ é 中" in out) == (encoding == "utf-8")
