"""Tests of the GPU benchmark: every part runs at a tiny size on the CPU, and what it writes is there at once."""

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import gpu
import gpu_links
import gpu_training
from gpu_data import read_parts, write_parts
from gpu_part import TINY, UNDER_WAY, Findings, Settings
from pool import Pool
from resist.data import Images


def settings(out: Path, *arguments: str) -> Settings:
    """The settings of a tiny run, as the command line gives them."""
    return gpu.settings_of(gpu.parse(["--tiny", "--out", str(out), *arguments]), "speed")


def run(part: str, given: Settings) -> dict[str, Any]:
    """Run a part in this process, and return what is on disk."""
    assert gpu.run_here(part, given) == 0
    return json.loads((given.out / UNDER_WAY).read_text())


def images(num: int, seed: int) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (num, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Images(pixels, torch.arange(num) % 10, 10, (0.5,) * 3, (0.2,) * 3, pad=4, flip=True)


def test_cifar10_comes_back_from_parts_below_a_size(tmp_path: Path) -> None:
    train, test = images(50, 0), images(20, 1)
    files = write_parts(train, test, tmp_path, most_bytes=100_000)
    assert [file.name for file in files] == ["cifar10-1-of-3.npz", "cifar10-2-of-3.npz", "cifar10-3-of-3.npz"]
    assert all(file.stat().st_size < 100_000 for file in files)
    again, test_again = read_parts(tmp_path)
    assert torch.equal(again.images, train.images)
    assert (again.digest(), test_again.digest()) == (train.digest(), test.digest())
    assert (again.pad, again.flip, again.num_classes) == (4, True, 10)
    with pytest.raises(SystemExit, match="is there already"):
        write_parts(train, test, tmp_path)
    part = dict(np.load(files[1]))
    np.savez_compressed(files[1], **{**part, "images": part["images"] ^ 1})
    with pytest.raises(SystemExit, match="not those of one data set"):
        read_parts(tmp_path)
    files[1].unlink()
    with pytest.raises(SystemExit, match=r"lacks cifar10-2-of-3\.npz"):
        read_parts(tmp_path)
    with pytest.raises(SystemExit, match="has no parts"):
        read_parts(tmp_path / "elsewhere")


@pytest.mark.slow
def test_speed_compares_the_job_with_plain_torch(tmp_path: Path) -> None:
    line = run("speed", settings(tmp_path))
    assert set(line["images_s"]) == {"job", "plain", "full"}
    rates = line["all_images_s"]
    assert all(len(values) == TINY.repetitions for values in rates.values())
    percent = [100 * (plain / job - 1) for job, plain in zip(rates["job"], rates["plain"], strict=True)]
    assert line["slower_percent"] == pytest.approx(np.median(percent))
    assert line["reached"] == (line["slower_percent"] <= 5)
    assert line["synchronization"]["later_s"] > 0
    assert {"date", "commit", "machine", "gpu", "torch", "python"} <= line.keys()


@pytest.mark.nightly  # test_footprint compares the same prediction with the allocator
def test_the_measured_step_is_the_predicted_one(tmp_path: Path) -> None:
    rows = run("memory", settings(tmp_path))["bytes"]
    assert [(row["strategy"], row["batch_size"]) for row in rows] == [
        ("resist", 1), ("local_sgd", 1), ("resist", 4), ("local_sgd", 4),
    ]  # fmt: skip
    # On the CPU both are the bytes of live tensors.
    assert [row["allocated"] for row in rows] == pytest.approx([row["predicted"] for row in rows], rel=1e-3)


@pytest.mark.slow
def test_on_a_gpu_the_counters_of_its_allocator_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code for GPUs, with the CPU in the place of one and an allocator that counts a megabyte for each call."""
    seen: list[str] = []

    def stub(name: str, value: object = None) -> None:
        def call(*_: object) -> object:
            seen.append(name)
            return value

        monkeypatch.setattr(torch.cuda, name, call)

    stub("memory_allocated", 1_000_000)
    stub("max_memory_allocated", 3_500_000)
    stub("max_memory_reserved", 4_000_000)
    stub("memory_reserved", 4_000_000)
    stub("mem_get_info", (70_000_000, 80_000_000))
    for name in ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats"):
        stub(name)
    monkeypatch.setattr(Settings, "on_gpu", True)
    line = run("memory", settings(tmp_path))
    assert [(row["allocated"], row["reserved"]) for row in line["bytes"]] == [(2_500_000, 4_000_000)] * 4
    assert all(row["error_percent"] == pytest.approx(100 * (row["predicted"] / 2_500_000 - 1)) for row in line["bytes"])
    assert line["outside_torch_bytes"] == 6_000_000
    assert seen[:4] == ["set_device", "empty_cache", "memory_allocated", "reset_peak_memory_stats"]
    assert seen.index("synchronize") < seen.index("max_memory_reserved")


@pytest.mark.slow
@pytest.mark.parametrize(("part", "more"), [("resist", ()), ("local-sgd", ("--no-compile",))])
def test_training_ends_with_its_time_and_has_been_recorded_on_the_way(
    part: str, more: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parts(images(64, 0), images(20, 1), tmp_path / "parts")
    given = settings(tmp_path, "--data", str(tmp_path / "parts"), "--train-s", "0.5", *more)
    seen: list[dict[str, Any]] = []
    original = Findings.add

    def add(found: Findings, **values: object) -> None:
        original(found, **values)
        seen.append(json.loads((tmp_path / UNDER_WAY).read_text()))

    monkeypatch.setattr(Findings, "add", add)
    line = run(part, given)
    assert line["rounds"] >= 1
    assert line["trained_s"] >= 0.5
    assert line["epochs"] == pytest.approx(4 * TINY.batch_size * TINY.local_steps * line["rounds"] / 64)
    assert set(line["percent"]) == {"averaged", "re-estimated"}
    assert next(once["rounds"] for once in seen if "rounds" in once) == 1
    assert "percent" not in seen[-2]


def test_the_rate_rises_and_falls_with_the_time() -> None:
    rates = [gpu_training.rate(progress, 0.1) for progress in (0.0, 0.01, 0.05, 0.5, 0.9, 1.0)]
    assert rates[0] > 0
    assert rates[:3] == sorted(rates[:3])
    assert rates[2] == pytest.approx(0.1)
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0, abs=1e-12)


def pair(given: Settings) -> dict[str, Any]:
    found = Findings(given.out, "links") if torch.distributed.get_rank() == 0 else None
    gpu_links.rounds(given, found)
    return found.values if found else {}


@pytest.mark.slow
def test_two_processes_get_the_weights_of_one(pool: Pool, tmp_path: Path) -> None:
    line, _ = pool.run(2, pair, replace(settings(tmp_path), began=time.monotonic()))
    assert [(row["backend"], row["strategy"]) for row in line["rounds"]] == [
        ("gloo", "resist"), ("gloo", "local_sgd"), ("gloo", "ddp"),
    ]  # fmt: skip
    assert line["agree"] is True
    assert all(row["difference"] < 1e-5 for row in line["rounds"][:2])
    assert "two GPUs" in line["nccl"]


def limit_from(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Let the limit of a part begin when it has written a file, however slow the machine is."""

    def is_written() -> bool:
        return file.exists() and file.read_text().endswith("\n")

    class Process(subprocess.Popen[bytes]):
        def wait(self, timeout: float | None = None) -> int:
            while timeout is not None and self.poll() is None and not is_written():
                time.sleep(0.01)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Process)


def test_a_part_is_killed_at_its_limit_and_what_it_found_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    found = json.dumps({"part": "speed", "images_s": 7})
    python.write_text(f"#!/bin/sh\necho '{found}' >{tmp_path}/{UNDER_WAY}\nsleep 60 &\necho $! >{tmp_path}/pid\nwait\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    limit_from(monkeypatch, tmp_path / "pid")
    arguments = ["--tiny", "--out", str(tmp_path), "--limit-s", "0.25", "speed"]
    line = gpu.run_apart("speed", arguments, gpu.parse(arguments))
    assert line == json.loads((tmp_path / "gpu.jsonl").read_text())
    assert (line["images_s"], line["ended"], line["limit_s"]) == (7, "killed at its limit", 0.25)
    assert not (tmp_path / UNDER_WAY).exists()
    with contextlib.suppress(psutil.NoSuchProcess):
        sleeping = psutil.Process(int((tmp_path / "pid").read_text()))
        while sleeping.status() != psutil.STATUS_ZOMBIE:  # a killed process may need some time to end
            time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speeds", "--tiny"], "no part 'speeds'"),
        (["--tiny", "--limit-s", "481"], "at most 480"),
        (["--tiny", "--train-s", "0"], "above 0"),
        (["speed"], "torch finds no CUDA device here"),
    ],
)
def test_wrong_arguments_get_a_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.parse(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_of_a_part_is_in_its_line(tmp_path: Path) -> None:
    given = replace(settings(tmp_path), tiny=False)
    with pytest.raises(SystemExit, match="training needs CIFAR-10"):
        gpu.run_here("resist", given)
    assert "training needs CIFAR-10" in json.loads((tmp_path / UNDER_WAY).read_text())["error"]
