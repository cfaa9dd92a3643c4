"""A run goes on with any number of workers in any number of processes, in its warm-up or behind it."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pool import Pool
from resist.cli.train import resumed
from resist.errors import UserError
from resist.planning.strategy import resist
from resist.runs.checkpoint import Checkpoints
from resist.runs.config import (
    MachineConfig,
    MethodConfig,
    NetworkConfig,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
)
from resist.runs.replicas import write_replicas
from resist.runs.saved import complete
from resist.sync.local import Local
from resist.training.resume import find_resume_point
from resist.training.train import train
from support import make, weights
from support import train as train_rounds

SIZES = (1, 2, 4)
STEPS = 4  # in a round
HOSTINGS = [(workers, processes) for workers, processes in product(SIZES, SIZES) if processes <= workers]
# From and to (workers, processes): as before, in other processes, and with more and fewer workers. The rest is nightly.
CHANGES = {((2, 2), (2, 2)), ((4, 4), (4, 1)), ((2, 2), (4, 2)), ((4, 4), (2, 1))}
ALL_CHANGES = [
    pytest.param(
        before, after, id=f"from-{before[0]}-in-{before[1]}-to-{after[0]}-in-{after[1]}",
        marks=() if (before, after) in CHANGES else pytest.mark.nightly,
    )
    for before, after in product(HOSTINGS, HOSTINGS)
]  # fmt: skip
# With as many workers in other processes only the order of summation differs, and training makes it grow.
TOLERANCE = 0.02  # of the norm of all weights
# Mean loss of the rounds after the change may be this much above that of the last round before it: new plans, momentum
# anew. Untrained, the loss is 2.4; at the checkpoint it is between 0.9 and 1.6.
MARGIN = 0.1


def config(out: Path, workers: int, *, warmup_rounds: int = 0, images: float = 2.5) -> TrainConfig:
    """A run in which all workers together see `images` times the training images; saved halfway and at the end."""
    rounds = math.ceil(images * 1437 / 32 / workers / STEPS)
    return TrainConfig(
        network=NetworkConfig(model="preact_small", model_args=("depths=1,1,5,1", "width=4")),
        method=MethodConfig(
            workers=workers, local_steps=STEPS, min_depth=0, batchnorm="average", warmup_rounds=warmup_rounds
        ),
        optimization=OptimizationConfig(epochs=images / workers, batch_size=32, lr=0.05, lr_schedule="constant"),
        machine=MachineConfig(device="cpu"),
        run=RunConfig(out=out, num_evals=1, checkpoint_rounds=(rounds + 1) // 2),
    )


def start(out: Path, workers: int, warmup_rounds: int = 0, images: float = 2.5) -> int:
    return train(config(out, workers, warmup_rounds=warmup_rounds, images=images))


def go_on(out: Path, workers: int) -> int:
    """As `resist train --resume OUT --workers N` in a process that was started for it."""
    asked = TrainConfig(run=RunConfig(resume=out), method=MethodConfig(workers=workers))
    return train(resumed(asked, frozenset({"resume", "workers"})))


def everywhere(pool: Pool, processes: int, function: Callable[..., int], *arguments: object) -> None:
    """Call it in that many processes; in this one if it is one."""
    statuses = [function(*arguments)] if processes == 1 else pool.run(processes, function, *arguments)
    assert statuses == [0] * processes


@dataclass
class Made:
    """A finished run, and a copy of it that lost its last checkpoint."""

    whole: Path
    cut: Path

    def weights(self) -> dict[str, Tensor]:
        return load_file(self.whole / "model.safetensors")

    @property
    def round(self) -> int:
        """The round of the newest checkpoint of the copy."""
        return int(complete(self.cut / "checkpoints")[0].name.removeprefix("round-"))

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.cut, to))


def made(pool: Pool, folder: Path, workers: int, processes: int, *more: float) -> Made:
    run = Made(folder / "whole", folder / "cut")
    folder.mkdir()
    everywhere(pool, processes, start, run.whole, workers, *more)
    shutil.copytree(run.whole, run.cut)
    (run.cut / "model.safetensors").unlink()
    shutil.rmtree(complete(run.cut / "checkpoints")[0])
    return run


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Made]:
    """A run of so many workers in so many processes, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    return cache(lambda workers, processes: made(pool, folder / f"{workers}-{processes}", workers, processes))


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), ALL_CHANGES)
def test_from_any_number_of_workers_and_processes_to_any(
    pool: Pool, runs: Callable[[int, int], Made], tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    run = runs(*before)
    out = run.copy(tmp_path / "run")
    everywhere(pool, after[1], go_on, out, after[0])
    rounds = records(out)
    assert [r["round"] for r in rounds] == list(range(1, len(rounds) + 1))
    images = [sum(r["images"] for r in records(path)) for path in (out, run.whole)]
    assert images[0] == pytest.approx(images[1], rel=0.05)  # as many for all together; a round may be cut short
    assert len(rounds[-1]["workers"]) == after[0]
    if after[0] == before[0]:
        expected, found = run.weights(), load_file(out / "model.safetensors")
        if after == before:
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        else:
            one, two = (torch.cat([t[name].float().flatten() for name in sorted(expected)]) for t in (expected, found))
            assert (one - two).norm() < TOLERANCE * one.norm()
    else:
        last, then = rounds[run.round - 1]["loss"], [r["loss"] for r in rounds[run.round :]]
        assert sum(then) / len(then) <= last + MARGIN


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "processes"), [pytest.param(4, 1, marks=pytest.mark.nightly), (2, 2)])
def test_a_run_that_was_in_its_warm_up_ends_with_the_same_weights(
    pool: Pool, tmp_path: Path, workers: int, processes: int
) -> None:
    run = made(pool, tmp_path / "runs", workers, processes, 5, 2.5 if workers == 4 else 1.3)
    assert run.round < 5 < records(run.whole)[-1]["round"]  # it goes on in the warm-up, and ends behind it
    out = run.copy(tmp_path / "run")
    everywhere(pool, processes, go_on, out, workers)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in run.weights().items())
    assert [r["capacity"] for r in records(out)] == [r["capacity"] for r in records(run.whole)]


def test_a_run_of_an_earlier_version_is_refused_in_one_line(tmp_path: Path) -> None:
    """Its config.json has other entries, its checkpoints another format."""
    (tmp_path / "config.json").write_text(json.dumps({"optimizer": {"epochs": 1.0}}))
    with pytest.raises(UserError, match=r"another version of resist .*'optimizer'") as caught:
        resumed(TrainConfig(run=RunConfig(resume=tmp_path)), frozenset({"resume"}))
    assert "\n" not in str(caught.value)


def test_checkpoints_of_an_earlier_version_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for round in (30, 40):
        path = tmp_path / "checkpoints" / f"round-{round:06d}"
        path.mkdir(parents=True)
        (path / "job.json").write_text(json.dumps({"format": "resist checkpoint 2", "round": round}))
    with pytest.raises(UserError, match="round-000040 has the format 'resist checkpoint 2', not") as caught:
        find_resume_point(TrainConfig(run=RunConfig(resume=tmp_path)), Local(4))
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


def test_damaged_checkpoints_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoints" / "round-000040").mkdir(parents=True)
    with pytest.raises(UserError, match="no undamaged checkpoint in"):
        find_resume_point(TrainConfig(run=RunConfig(resume=tmp_path)), Local(4))
    assert "round-000040 is damaged: No such file or directory\n" in caplog.text


@pytest.mark.slow
def test_replicas_after_the_newest_checkpoint_are_taken(tmp_path: Path) -> None:
    job, optimizers = make(resist(2, 2, min_depth=0), replicate=True)
    train_rounds(job, optimizers, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints", job.transport)
    checkpoints.begin(job, optimizers, {})
    checkpoints.finish()
    options = TrainConfig(run=RunConfig(resume=tmp_path), method=MethodConfig(workers=2))
    assert find_resume_point(options, Local(2)).round == 1
    train_rounds(job, optimizers, 2)
    write_replicas(tmp_path / "replicas", job, "an attempt")
    point = find_resume_point(options, Local(2))
    assert (point.round, point.step) == (2, 4)
    again, others = make(resist(2, 2, min_depth=0), resume_at=(2, 4))
    point.restore(again, tuple(others))
    expected, found = weights(job), weights(again)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
