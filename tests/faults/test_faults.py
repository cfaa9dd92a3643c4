"""A short sweep of faults in CI; benchmarks/faults.py runs the long one."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from injection import FIRST_ONLY, HERE, KINDS, POINTS, Fault, draw, environment
from safetensors.torch import load_file

# Each kind, and each place that the design names: at the start, before and during the exchange, between the shared part
# and the blocks, during a save, during an evaluation.
FAULTS = (
    Fault("kill", "joined", 2, 1),
    Fault("kill", "sending blocks", 1, 5),
    Fault("kill", "before rename", 0, 2),
    Fault("stop", "awaiting blocks", 3, 4),
    Fault("delay", "awaiting shared part", 1, 3, 1.0),
    Fault("delay", "writing", 2, 2, 1.0),
    Fault("raise", "shared part begun", 3, 4),
    Fault("raise", "assembling", 1, 1),
)
TIMEOUT_S = 15.0
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1")


def test_faults_are_drawn_from_their_seed_and_leave_no_kind_or_point_out() -> None:
    faults = draw(3, 100, 20.0)
    assert faults == draw(3, 100, 20.0) != draw(4, 100, 20.0)
    assert {(one.kind, one.point) for one in faults} == {(kind, point) for kind in KINDS for point in POINTS}
    assert all(one.rank == 0 for one in faults if one.point in FIRST_ONLY)
    assert all(1 <= one.nth <= POINTS[one.point] for one in faults)
    assert all((one.kind == "delay") == (0 < one.seconds <= 10) for one in faults)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_whatever_happens_a_run_ends_and_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "injection.py", tmp_path, str(TIMEOUT_S)], capture_output=True, text=True,
        input=json.dumps([asdict(fault) for fault in FAULTS]), env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == len(FAULTS)
    problems = [f"{one['fault']}: {one['problems']}\n{one['said']}" for one in outcomes if one["problems"]]
    assert not problems, "\n".join(problems)
    assert all(one["statuses"][-1] == 0 for one in outcomes)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_torchrun_starts_a_killed_job_again_from_its_last_checkpoint(tmp_path: Path) -> None:
    arguments = (
        "train", "--model-args", "depths=1,1,5,1", "width=4", "--workers", "2", "--local-steps", "2",
        "--epochs", "0.25", "--min-depth", "0", "--batch-size", "32",
        "--num-evals", "1", "--checkpoint-rounds", "2", "--device", "cpu",
    )  # fmt: skip
    found = []
    for fault in (None, Fault("kill", "before exchange", 1, 4)):
        out, mark = tmp_path / f"run{len(found)}", tmp_path / f"mark{len(found)}"
        done = subprocess.run(
            [sys.executable, *TORCHRUN, "-m", "resist", *arguments, "--out", str(out)], env=environment(fault, mark),
            text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert mark.exists() == (fault is not None)
        found.append(load_file(out / "model.safetensors"))
        rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert rounds == list(range(1, len(rounds) + 1))
    assert "no answer from process 1 (worker 1)" in done.stderr
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
