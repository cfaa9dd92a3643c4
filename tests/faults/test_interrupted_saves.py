"""A save cut off by SIGKILL at any byte, or by a full disk, is never taken for a checkpoint; the older one stays."""

import gc
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from injection import ARGUMENTS
from safetensors.torch import load_file
from torch import Tensor

from resist.cli import main
from resist.job import Job
from resist.planning.strategy import Strategy, resist
from resist.runs.checkpoint import Checkpoints
from resist.runs.restore import restore
from resist.runs.saved import newest, verify
from support import make, train, weights

STEPS = 2


def strategy() -> Strategy:
    return resist(2, STEPS, min_depth=0)


class Meter:
    """Counts what a process writes: each byte, and each rename as one. Kills the process when `limit` is reached."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.done, self.files = limit, 0, dict[str, int]()

    def take(self, number: int) -> int:
        """How many of `number` may still be written."""
        return number if self.limit is None else min(number, self.limit - self.done)

    def add(self, number: int, name: str) -> None:
        self.done += number
        self.files[name] = self.files.get(name, 0) + number
        if self.limit is not None and self.done >= self.limit:
            os.kill(os.getpid(), signal.SIGKILL)


def install(meter: Meter) -> None:
    """In this process, every file that is opened through pathlib for writing goes through the meter."""

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            allowed = meter.take(len(view))
            written = super().write(view[:allowed])
            meter.add(written or 0, Path(str(self.name)).name)
            return written or 0

    def opened(path: Path, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if "w" not in mode:
            return original_open(path, mode, *arguments, **named)
        buffered = io.BufferedWriter(Raw(path, "w"))
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")

    def metered(rename: Any, name: str) -> Any:
        def renamed(path: Path, target: Path) -> Any:
            meter.add(meter.take(1), f"before {name}")
            result = rename(path, target)
            meter.add(meter.take(1), f"after {name}")
            return result

        return renamed

    original_open = pathlib.Path.open
    pathlib.Path.open = opened  # type: ignore[assignment]
    pathlib.Path.rename = metered(pathlib.Path.rename, "rename")  # type: ignore[method-assign]
    pathlib.Path.replace = metered(pathlib.Path.replace, "replace")  # type: ignore[method-assign]


def save(job: Job, optimizers: list[torch.optim.Optimizer], folder: Path) -> None:
    checkpoints = Checkpoints(folder, job.transport)
    checkpoints.begin(job, tuple(optimizers), {})
    checkpoints.finish()


def saved_in_a_fork(job: Job, optimizers: list[torch.optim.Optimizer], folder: Path, limit: int | None) -> int:
    """Save in a process of its own that is killed at `limit`. Returns its wait status."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            meter = Meter(limit)
            install(meter)
            save(job, optimizers, folder)
            (folder.parent / "written.json").write_text(json.dumps(meter.files))
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(process, 0)[1]


def restored(folder: Path, path: Path) -> dict[str, Tensor]:
    """The full network of a checkpoint."""
    at = verify(path)["round"]
    job, optimizers = make(strategy(), resume_at=(at, at * STEPS))
    restore(job, tuple(optimizers), path)
    return weights(job)


def positions(files: dict[str, int], number: int) -> Iterator[int]:
    """Half of them anywhere, half in a file (or at a rename) that is drawn first: small ones get their share."""
    chance = random.Random(0)
    total, starts, passed = sum(files.values()), list[tuple[int, int]](), 0
    for size in files.values():
        starts.append((passed, size))
        passed += size
    yield from (total, total - 1)  # just after the renaming, and just before
    for turn in range(number - 2):
        start, size = (0, total) if turn % 2 else chance.choice(starts)
        yield start + chance.randint(1, size)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # with the threads of pytest-xdist, which have no locks
@pytest.mark.parametrize("number_of_positions", [9, pytest.param(100, marks=pytest.mark.nightly)])
def test_a_save_that_is_killed_at_any_byte_leaves_the_older_checkpoint_or_the_whole_new_one(
    tmp_path: Path, number_of_positions: int
) -> None:
    job, optimizers = make(strategy())
    train(job, optimizers, STEPS)
    save(job, optimizers, tmp_path / "older")
    expected = {1: weights(job)}
    train(job, optimizers, STEPS)
    expected[2] = weights(job)
    shutil.copytree(tmp_path / "older", tmp_path / "whole" / "checkpoints")
    assert saved_in_a_fork(job, optimizers, tmp_path / "whole" / "checkpoints", None) == 0
    files = json.loads((tmp_path / "whole" / "written.json").read_text())
    written = {".process-0.safetensors.partial", ".job.json.partial"}
    assert files.keys() == written | {
        f"{when} {call}" for when in ("before", "after") for call in ("replace", "rename")
    }

    rounds: list[int] = []
    for number, limit in enumerate(positions(files, number_of_positions)):
        folder = tmp_path / f"{number:05}" / "checkpoints"
        shutil.copytree(tmp_path / "older", folder)
        assert saved_in_a_fork(job, optimizers, folder, limit) == signal.SIGKILL, limit
        path, skipped = newest(folder)
        assert path is not None
        assert skipped == [], limit
        rounds.append(verify(path)["round"])
        found = restored(folder, path)
        assert all(torch.equal(found[name], value) for name, value in expected[rounds[-1]].items()), limit
        if number % 5 == 0:
            save(job, optimizers, folder)  # a run that goes on saves again, over what is left
            path, skipped = newest(folder)
            assert path is not None
            assert path.name in ("round-000002", "round-000002-0001")  # beside a sound one of the same round
            assert skipped == []
            assert not [p for p in folder.iterdir() if p.name.startswith(".")]
        shutil.rmtree(folder)
    assert set(rounds) == {1, 2}  # positions on both sides of the rename


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of 64 KiB until it is made larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this system does not let root mount a tmpfs")
    yield disk
    gc.collect()  # errors that pytest has caught hold frames, and these hold files
    subprocess.run(["umount", disk], check=True)


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Exit status and lines on stderr of `resist` in this process."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0), capsys.readouterr().err.splitlines()


ONE_PROCESS = (*ARGUMENTS[:-1], "1", "--batchnorm", "average")


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_older_checkpoint_stays(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "train", *ONE_PROCESS, "--out", str(tmp_path / "undisturbed")) == (0, [])
    size = sum(file.stat().st_size for file in (tmp_path / "undisturbed" / "checkpoints" / "round-000006").iterdir())
    resize(small_disk, str(int(1.6 * size)))
    out = small_disk / "run"
    status, lines = run(capsys, "train", *ONE_PROCESS, "--out", str(out))
    assert status == 2
    assert len(lines) == 1, lines
    assert "could not be written" in lines[0]
    assert "No space left" in lines[0]
    assert "--resume" in lines[0]
    assert newest(out / "checkpoints") == (out / "checkpoints" / "round-000002", [])
    status, lines = run(capsys, "train", "--resume", str(out))  # still full
    assert status == 2
    assert len(lines) == 1, lines
    assert newest(out / "checkpoints") == (out / "checkpoints" / "round-000002", [])
    resize(small_disk, str(8 * size))
    assert run(capsys, "train", "--resume", str(out)) == (0, [])
    found, expected = (load_file(path / "model.safetensors") for path in (out, tmp_path / "undisturbed"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "24k", *(pytest.param(f"{n}k", marks=pytest.mark.nightly) for n in (8, 16))])
def test_a_disk_too_small_for_the_metrics_is_one_line(
    small_disk: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    resize(small_disk, size)
    arguments = [*ONE_PROCESS, "--local-steps", "1", "--checkpoint-rounds", "99"]
    status, lines = run(capsys, "train", *arguments, "--out", str(small_disk / "run"))
    assert status == 2
    assert len(lines) == 1, lines
    assert "cannot be written" in lines[0]
