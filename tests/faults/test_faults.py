"""A short sweep of faults in CI; benchmarks/faults.py runs the long one."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from injection import FIRST_ONLY, HERE, KINDS, POINTS, Fault, draw, environment
from safetensors.torch import load_file

from commands import Commands, free_port

# With MORE_FAULTS each kind, and each place that the design names: at the start, before and during the exchange,
# between the shared part and the blocks, during a save, during an evaluation. By day tests/cli kills a process.
FAULTS = (Fault("stop", "awaiting blocks", 3, 4),)
MORE_FAULTS = (
    Fault("kill", "sending blocks", 1, 5),
    Fault("raise", "assembling", 1, 1),
    Fault("delay", "writing", 2, 2, 1.0),
    Fault("kill", "joined", 2, 1),
    Fault("raise", "shared part begun", 3, 4),
    Fault("kill", "before rename", 0, 2),
    Fault("delay", "awaiting shared part", 1, 3, 1.0),
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
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "faults",
    [pytest.param(FAULTS, id="one"), pytest.param(MORE_FAULTS, id="more", marks=pytest.mark.nightly)],
)
def test_whatever_happens_a_run_ends_and_goes_on_to_the_same_weights(tmp_path: Path, faults: tuple[Fault, ...]) -> None:
    done = subprocess.run(
        [sys.executable, HERE / "injection.py", tmp_path, str(TIMEOUT_S)], capture_output=True, text=True,
        input=json.dumps([asdict(fault) for fault in faults]), env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == len(faults)
    problems = [f"{one['fault']}: {one['problems']}\n{one['said']}" for one in outcomes if one["problems"]]
    assert not problems, "\n".join(problems)
    assert all(one["statuses"][-1] == 0 for one in outcomes)


ARGUMENTS = (
    "train", "--model-args", "depths=1,1,5,1", "width=4", "--workers", "2", "--local-steps", "2",
    "--epochs", "0.25", "--min-depth", "0", "--batch-size", "32",
    "--num-evals", "1", "--checkpoint-rounds", "2", "--device", "cpu", "--batchnorm", "average",
)  # fmt: skip


def die() -> None:
    """Kill process 1 before the synchronization of round 4, in the first attempt."""
    import os
    import signal

    import resist.job

    synchronize = resist.job.Job.synchronize

    def killed(job, *arguments):
        if job.round == 3 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
            os.kill(os.getpid(), signal.SIGKILL)
        return synchronize(job, *arguments)

    resist.job.Job.synchronize = killed


@pytest.fixture(scope="module")
def undisturbed(_commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run of two processes that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    done = _commands.run(*ARGUMENTS, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    return load_file(out / "model.safetensors")


def check(out: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rounds == list(range(1, len(rounds) + 1))
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in undisturbed.items())


@pytest.mark.nightly  # by day test_cli starts such processes, and lets the launcher start a killed one again
def test_a_job_that_is_started_again_as_torchrun_does_goes_on_from_its_last_checkpoint(
    commands: Commands, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    out, saved = tmp_path / "run", False
    for attempt, statuses in ((0, [1, -signal.SIGKILL]), (1, [0, 0])):
        port = free_port()
        group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        group["TORCHELASTIC_RESTART_COUNT"] = str(attempt)
        processes = [
            commands.start(*ARGUMENTS, "--out", out, env=group | {"RANK": rank, "LOCAL_RANK": rank}, prelude=die)
            for rank in "01"
        ]
        output, errors = zip(*(process.communicate() for process in processes), strict=True)
        assert [process.returncode for process in processes] == statuses, errors
        assert ("no checkpoint in" in output[0]) == (attempt == 1 and not saved)
        saved = any(out.glob("checkpoints/*/job.json"))
        assert ("no answer from process 1 (worker 1)" in errors[0]) == (attempt == 0)
    check(out, undisturbed)


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_torchrun_starts_a_killed_job_again_from_its_last_checkpoint(
    undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    out, mark = tmp_path / "run", tmp_path / "mark"
    done = subprocess.run(
        [sys.executable, *TORCHRUN, "-m", "resist", *ARGUMENTS, "--out", str(out)],
        env=environment(Fault("kill", "before exchange", 1, 4), mark), text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert mark.exists()
    assert "no answer from process 1 (worker 1)" in done.stderr
    check(out, undisturbed)
