"""Each example runs, with arguments that take seconds, and prints what it is there to show."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
FILES = sorted(EXAMPLES.glob("*.py"))


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> str:
    """What an example prints, run in this process: importing torch is most of what a new one would do."""
    file = next(EXAMPLES.glob(f"{name}_*.py"))
    monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
    runpy.run_path(str(file), run_name="__main__")
    return capsys.readouterr().out


def torchrun(name: str, *arguments: object, processes: int = 2) -> str:
    """What an example prints under torchrun."""
    file = next(EXAMPLES.glob(f"{name}_*.py"))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    done = subprocess.run(
        [*launcher, str(file), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=110,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_they_are_six_short_and_numbered() -> None:
    assert [file.name[:2] for file in FILES] == [f"{number}_" for number in range(1, 7)]
    for file in FILES:
        text = file.read_text()
        assert len(text.splitlines()) <= 80, file
        doc = ast.get_docstring(ast.parse(text))
        assert doc, file
        assert f"examples/{file.name}" in doc, "the command to run it"


def test_plan_by_hand(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The bytes are those of the paper's network in docs/results.md; every block has a worker in every round."""
    said = run(monkeypatch, capsys, "1")
    rows = re.findall(r"worker \d  ([#.]+)$", said, re.MULTILINE)
    assert len(rows) == 12
    for round in range(3):
        assert all("#" in column for column in zip(*rows[4 * round : 4 * round + 4], strict=True))
    assert "ResIST        483.5  (370.1 shared part, 113.3 blocks)" in said
    assert "local SGD     993.5" in said
    run(monkeypatch, capsys, "1", "--workers", 2, "--blocks", 5, "--capacity", 3)


@pytest.mark.slow
def test_four_workers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(monkeypatch, capsys, "2", "--steps", 8, "--local-steps", 2)
    assert len(re.findall(r"^worker \d begins with blocks \(\d, \d\) of layer3:1-8: 64% of all", said, re.M)) == 4
    assert re.search(r"^round  4  loss \d\.\d{3}  full network right on .*%  next plan \(", said, re.M)
    assert re.search(r"^Sent in 4 rounds: .*shared \d+\.\d MB, blocks \d+\.\d MB, state \d+\.\d MB, eval", said, re.M)


@pytest.mark.slow
def test_torchrun_on_cifar10() -> None:
    """Real processes, on noise: CIFAR-10 may not be there."""
    arguments = ["--synthetic", "--network", "preact_small", "--max-steps", 5, "--local-steps", 2]
    said = torchrun("3", *arguments)
    assert re.findall(r"^round (\d), step (\d) of 5: loss \d\.\d{3}$", said, re.M) == [("1", "2"), ("2", "4")]
    assert re.search(r"^2 workers: the full network is right on \d+\.\d%; \d+ MB sent$", said, re.M)


@pytest.mark.slow
def test_your_own_network(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Three workers in one process, and in three: the same answers."""
    here = run(monkeypatch, capsys, "4", "--steps", 50)
    assert "worker 2 holds 4 blocks of blocks:0-8" in here
    answers = [
        re.findall(r"^9 blocks, .* right on (.*)% of 360 test images$", said, re.M)
        for said in (here, torchrun("4", "--steps", 50, processes=3))
    ]
    assert len(answers[0]) == len(answers[1]) == 2
    for mine, theirs in zip(*answers, strict=True):
        assert float(mine) == pytest.approx(float(theirs), abs=1.0)
    assert float(answers[0][0]) > 50


@pytest.mark.slow
def test_unequal_workers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(monkeypatch, capsys, "5", "--rounds", 1, "--local-steps", 2, "--speeds", 1, 0.1)
    held = [int(number) for number in re.findall(r"(\d+) blocks ", said)]
    assert held[:2] == [8, 8]
    assert sum(held[2:]) == 16
    assert held[2] > held[3]


@pytest.mark.slow
def test_comparing_strategies(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(monkeypatch, capsys, "6", "--rounds", 2, "--local-steps", 1)
    rows = dict(re.findall(r"^(\S.*?)  +[\d.]+% +[\d.]+ s +([\d.]+) MB$", said, re.M))
    assert len(rows) == 6
    assert float(rows["resist, momentum reset"]) < float(rows["resist"]) < float(rows["local_sgd"])
    assert torch.is_grad_enabled()
