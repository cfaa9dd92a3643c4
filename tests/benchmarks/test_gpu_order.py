"""Tests of the order of commands on a first GPU, and of the part that runs the tests."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_gpu import settings

import gpu
import gpu_order
from gpu_part import UNDER_WAY, Findings
from test_docs import parse_resist


def test_every_step_of_the_order_is_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(settings(tmp_path), device=torch.device("cuda"), tiny=False)
    listed = gpu_order.steps(given)
    for step in listed:
        if not step.resumes:
            config = parse_resist(list(gpu_order.arguments(given, step, tmp_path / "run")), monkeypatch)
            config.check()
            assert config.machine.device == ("cpu" if step.name == "cpu" else "cuda")
    names = [step.name for step in listed]
    assert all(names.index(step.like or step.resumes) < names.index(step.name) for step in listed[1:] if step.like)
    assert {step.gpus for step in listed} == {1, 2, 3}
    uncompiled = [step.name for step in gpu_order.steps(replace(given, compile=False))]
    assert [name for name in names if name not in uncompiled] == ["compiled"]


def test_commands_find_packages_that_were_brought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/brought")
    injection = sys.modules[gpu_order.Fault.__module__]
    for environment in (gpu_order.environment(), injection.environment(None, tmp_path / "mark")):
        paths = environment["PYTHONPATH"].split(os.pathsep)
        assert str(gpu_order.ROOT / "src") in paths
        assert paths[-1] == "/brought"


MORE = ("bf16", "contiguous", "gloo, two processes", "ddp, two processes", "killed while sending", "resumed")


@pytest.mark.nightly  # by day the steps are parsed, and run by a runner of the test
def test_the_order_is_run_to_its_end(tmp_path: Path) -> None:
    """In a process of its own, as its commands are forked from it."""
    some = ("cpu", "one process", *MORE, "nccl, two GPUs")
    script = (
        "import sys; from pathlib import Path; from functools import partial\n"
        "import gpu, gpu_order, injection\n"
        "from gpu_part import Findings\n"
        "given = gpu.settings_of(gpu.parse(['--tiny', '--out', sys.argv[1]]), 'order')\n"
        "steps = gpu_order.steps(given)\n"
        f"gpu_order.steps = lambda _: [step for step in steps if step.name in {some}]\n"
        "gpu_order.order(given, Findings(given.out, 'order'), partial(injection.command, warm=True))\n"
    )
    environment = gpu_order.environment()
    environment["PYTHONPATH"] += os.pathsep + str(Path(gpu.__file__).parent)
    done = subprocess.run([sys.executable, "-c", script, tmp_path], env=environment, capture_output=True, text=True)
    order = json.loads((tmp_path / UNDER_WAY).read_text())["order"]
    assert done.returncode == 0, (order, done.stderr)
    assert tuple(order) == some
    assert order.pop("nccl, two GPUs") == {"skipped": "needs 2 GPUs, and there is 1"}
    assert [name for name, outcome in order.items() if outcome["status"]] == ["killed while sending"]
    assert all(outcome["difference"] < 0.01 for outcome in order.values() if "difference" in outcome)


def test_a_step_with_another_loss_or_without_a_named_worker_is_a_problem(tmp_path: Path) -> None:
    def runner(words: tuple[str, ...], fault: object, mark: Path, limit_s: float) -> tuple[int, str]:
        out = Path(words[words.index("--out" if "--out" in words else "--resume") + 1])
        out.mkdir(exist_ok=True)
        loss = 2.01 if "gloo" in out.name else 2.0
        (out / "metrics.jsonl").write_text(json.dumps({"loss": loss}) + "\n")
        return (1, "killed") if fault or "bf16" in words else (0, "")

    found = Findings(tmp_path, "order")
    with pytest.raises(SystemExit, match="steps with a problem: bf16, gloo, two processes, killed while sending;"):
        gpu_order.order(settings(tmp_path), found, runner)
    order = found.values["order"]
    assert order["bf16"] | {"seconds": 0} == {
        "status": 1, "seconds": 0, "loss": 2.0, "problem": "exit status 1", "stderr": "killed",
    }  # fmt: skip
    assert order["gloo, two processes"]["problem"] == "another loss than 'one process'"
    assert order["killed while sending"]["problem"] == "no line names the lost worker"
    assert "problem" not in order["contiguous"]


def test_the_report_of_the_tests_names_what_failed_and_what_was_skipped(tmp_path: Path) -> None:
    file = tmp_path / "report.xml"
    file.write_text(
        '<testsuites><testsuite><testcase name="a"/><testcase name="b"><failure message="assert 1 == 2&#10;more"/>'
        '</testcase><testcase name="c"><skipped message="needs two GPUs"/></testcase></testsuite></testsuites>'
    )
    assert gpu_order.read_report(file) == {
        "passed": 1, "failed": {"b": "assert 1 == 2"}, "skipped": {"c": "needs two GPUs"},
    }  # fmt: skip


def test_failed_tests_are_an_error_after_they_are_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        started.append(command)
        Path(command[command.index("--junitxml") + 1]).write_text(
            '<testsuites><testcase name="b"><failure message="no"/></testcase></testsuites>'
        )
        return subprocess.CompletedProcess(command, 1)

    given, found = replace(settings(tmp_path), tiny=False), Findings(tmp_path, "tests")
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit, match="1 tests failed"):
        gpu_order.tests(given, found)
    line = json.loads((tmp_path / UNDER_WAY).read_text())
    assert (line["status"], line["passed"], line["failed"]) == (1, 0, {"b": "no"})
    assert started[0][started[0].index("-m", 2) + 1] == "cuda"
    assert (gpu_order.ROOT / started[0][-1] / "test_cuda.py").exists()
