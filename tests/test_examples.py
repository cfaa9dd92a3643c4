"""Tests of the examples: each runs in seconds and prints its result."""

import ast
import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from pool import Pool
from resist.models import build

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """Run an example in this process and return its output; a new process would import torch again."""
    file = next(EXAMPLES.glob(f"{name}_*.py"))
    monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
    runpy.run_path(str(file), run_name="__main__")
    return capsys.readouterr().out


def in_a_process(name: str, *arguments: object) -> str:
    """Run an example in a process of the pool, which has joined the others as torchrun makes it join them.

    A network of this package is small.
    """
    file, output = next(EXAMPLES.glob(f"{name}_*.py")), io.StringIO()
    sys.argv = [str(file), *map(str, arguments)]
    os.environ |= {"WORLD_SIZE": str(dist.get_world_size()), "LOCAL_RANK": str(dist.get_rank())}
    smaller = patch("resist.models.build", partial(build, depths=(1, 1, 5, 1), width=4))
    with contextlib.redirect_stdout(output), smaller:
        runpy.run_path(str(file), run_name="__main__")
    return output.getvalue()


def torchrun(name: str, *arguments: object) -> str:
    """Run an example under torchrun in two processes and return its output."""
    file = next(EXAMPLES.glob(f"{name}_*.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [*launcher, str(file), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_are_seven_short_and_numbered() -> None:
    assert [file.name[:2] for file in FILES] == [f"{number}_" for number in range(1, 8)]
    for file in FILES:
        text = file.read_text()
        assert len(text.splitlines()) <= 80, file
        doc = ast.get_docstring(ast.parse(text))
        assert doc, file
        assert f"examples/{file.name}" in doc, "the command to run it"


def test_plan_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes agree with docs/results.md; every block has a worker in every round."""
    output = run(monkeypatch, capsys, "1")
    rows = re.findall(r"worker \d  ([#.]+)$", output, re.MULTILINE)
    assert len(rows) == 12
    for round in range(3):
        assert all("#" in column for column in zip(*rows[4 * round : 4 * round + 4], strict=True))
    assert "ResIST        483.5  (370.1 shared part, 113.3 blocks)" in output
    assert "local SGD     993.5" in output
    run(monkeypatch, capsys, "1", "--workers", 2, "--blocks", 5, "--capacity", 3)


@pytest.mark.slow
def test_four_workers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(monkeypatch, capsys, "2", "--steps", 8, "--local-steps", 2)
    assert len(re.findall(r"^worker \d begins with blocks \(\d, \d\) of layer3:1-8: 64% of all", output, re.M)) == 4
    assert re.search(r"^round  4  loss \d\.\d{3}  full network .*% correct  next plan \(", output, re.M)
    assert re.search(r"^Sent in 4 rounds: .*shared \d+\.\d MB, blocks \d+\.\d MB, state \d+\.\d MB, eval", output, re.M)


CIFAR10 = ["--synthetic", "--network", "preact_small", "--max-steps", 5, "--local-steps", 2]


@pytest.mark.slow
def test_two_processes_on_cifar10(pool: Pool) -> None:
    """On noise: CIFAR-10 may be missing."""
    check_cifar10("".join(pool.run(2, in_a_process, "3", *CIFAR10)))


@pytest.mark.nightly  # tests/cli/test_cli.py has processes that are started as torchrun does
def test_torchrun_on_cifar10() -> None:
    check_cifar10(torchrun("3", *CIFAR10))


def check_cifar10(output: str) -> None:
    assert re.findall(r"^round (\d), step (\d) of 5: loss \d\.\d{3}$", output, re.M) == [("1", "2"), ("2", "4")]
    assert re.search(r"^2 workers: the full network is \d+\.\d% correct; \d+ MB sent$", output, re.M)


@pytest.mark.slow
def test_your_own_network(pool: Pool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three workers in one process and in three processes: the same accuracy."""
    here = run(monkeypatch, capsys, "4", "--steps", 40)
    assert "worker 2 holds 4 blocks of blocks:0-8" in here
    answers = [
        re.findall(r"^9 blocks, .*: (.*)% of 360 test images correct$", output, re.M)
        for output in (here, "".join(pool.run(3, in_a_process, "4", "--steps", 40)))
    ]
    assert len(answers[0]) == len(answers[1]) == 2
    for in_one, in_three in zip(*answers, strict=True):
        assert float(in_one) == pytest.approx(float(in_three), abs=1.0)
    assert float(answers[0][0]) > 50


@pytest.mark.slow
def test_unequal_workers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(monkeypatch, capsys, "5", "--rounds", 1, "--local-steps", 2, "--speeds", 1, 0.1)
    held = [int(number) for number in re.findall(r"(\d+) blocks ", output)]
    assert held[:2] == [8, 8]
    assert sum(held[2:]) == 16
    assert held[2] > held[3]


@pytest.mark.slow
def test_comparing_strategies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(monkeypatch, capsys, "6", "--rounds", 2, "--local-steps", 1)
    rows = dict(re.findall(r"^(\S.*?)  +[\d.]+% +[\d.]+ s +([\d.]+) MB$", output, re.M))
    assert len(rows) == 6
    assert float(rows["resist, momentum reset"]) < float(rows["resist"]) < float(rows["local_sgd"])
    assert torch.is_grad_enabled()


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_members_come_and_go() -> None:
    file = next(EXAMPLES.glob("7_*.py"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(file)], env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    regrouped = [line for line in lines if line.startswith("step ")]
    assert all(re.fullmatch(r"step \d+: [34] members", line) for line in regrouped), done.stdout
    assert regrouped, done.stdout
    right = re.fullmatch(r"4 members: (\d+) of 360 test images correct", lines[-1])
    assert right, done.stdout + done.stderr
    assert int(right[1]) > 300
