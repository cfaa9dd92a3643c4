"""Tests of the full network in a run: by one process or by all, as often as they are cheap; training stays the same."""

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pool import Pool
from resist.data import Images
from resist.data.spans import WHOLE, Share
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import resist
from resist.runs.config import MachineConfig, MethodConfig, NetworkConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.runs.history import read_history
from resist.runs.model_file import EMA_FILE, FILE
from resist.runs.records import closing_seconds
from resist.tasks import Classification, Task
from resist.training.evaluation import Evaluation
from resist.training.train import open_data, train
from support import make, tiny


def small_run(out: Path, **options: Any) -> TrainConfig:
    """Four rounds of a small network on the digits."""
    return TrainConfig(
        network=NetworkConfig(model_args=("depths=1,1,5,1", "width=4")),
        method=MethodConfig(workers=4, local_steps=2, min_depth=0, batchnorm=options.pop("batchnorm", "average")),
        optimization=OptimizationConfig(
            batch_size=32, epochs=8 * 32 / 1437, lr=0.05, model_ema_decay=options.pop("ema", None)
        ),
        machine=MachineConfig(device="cpu"),
        run=RunConfig(out=out, **options),
    )


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["recalibrate", pytest.param("average", marks=pytest.mark.nightly)])
def test_all_processes_find_what_one_finds_and_training_stays_the_same(
    pool: Pool, tmp_path: Path, batchnorm: str
) -> None:
    ways = {"all": ("all", 2), "one": ("one", 2)}
    if batchnorm == "recalibrate":  # which a test does with batches of training
        ways["once"] = ("all", 1)
    for name, (evaluation, num_evals) in ways.items():
        config = small_run(tmp_path / name, evaluation=evaluation, num_evals=num_evals, batchnorm=batchnorm, ema=0.9)
        torch.manual_seed(len(name))
        assert pool.run(3, train, config) == [0] * 3
    for file in (FILE, EMA_FILE):
        expected = load_file(tmp_path / "one" / file)
        for name in ways:
            found = load_file(tmp_path / name / file)
            assert all(torch.equal(found[key], value) for key, value in expected.items()), (name, file)
    together, alone, *once = (records(tmp_path / name) for name in ways)
    assert [record["accuracy"] is not None for record in together] == [False, True, False, True]
    assert [record.get("scores") for record in together] == [record.get("scores") for record in alone]
    for others in (alone, *once):
        assert [record["loss"] for record in together] == [record["loss"] for record in others]
    assert [run[0]["evaluation"]["by"] for run in (together, alone)] == ["all", "one"]
    # Every process gets the blocks that it lacks, and nothing of it counts as training.
    assert together[-1]["bytes"]["evaluate"] > 2 * alone[-1]["bytes"]["evaluate"]
    assert [trained_bytes(record) for record in together] == [trained_bytes(record) for record in alone]


def trained_bytes(record: dict[str, Any]) -> list[int]:
    return [record["bytes"][kind] for kind in ("shared", "blocks", "state")]


@pytest.mark.slow
def test_one_process_tests_alone_and_accounts_for_the_wall_clock(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    config = small_run(out, num_evals=2, evaluation="all", checkpoint_rounds=2)
    caplog.set_level(logging.INFO, "resist")
    start = time.perf_counter()
    assert train(config) == 0
    passed = time.perf_counter() - start
    found, history = records(out), read_history(out)
    assert found[0]["evaluation"]["by"] == "one"
    assert [record["round"] for record in found if record["accuracy"] is not None] == [2, 4]
    total = sum(history.wall.values())
    assert 0.9 * passed - 0.2 < total <= passed
    assert min(history.wall[part] for part in ("start-up", "training", "evaluation", "checkpoints")) > 0
    assert closing_seconds(history.state) > 0
    assert re.search(rf"^time +{total:.1f} s: start-up .*, training .*, waiting .*, evaluation", caplog.text, re.M)

    shutil.rmtree(out / "checkpoints" / "round-000004")
    assert train(replace(config, run=replace(config.run, out=None, resume=out))) == 0
    again = read_history(out)
    assert [record["startup_s"] > 0 for record in again.rounds] == [True, False, True, False]
    assert again.wall["start-up"] > history.wall["start-up"]
    assert again.rounds[2]["seconds"]["checkpoint"] >= closing_seconds(history.state)


@dataclass(frozen=True)
class Breaking(Images):
    """Test images of which the second share cannot be read, or whose process is killed when it reads it."""

    killed: bool = False

    def batches(self, size: int, limit: int | None = None, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        if share.index == 1:
            if self.killed:
                os._exit(9)
            raise UserError("5.png is damaged; mend or remove it")
        return super().batches(size, limit, share)


def broken_run(config: TrainConfig, killed: bool) -> int:
    task = open_data(config)
    assert isinstance(task, Classification)
    images = task.held_out
    values = {f.name: getattr(images, f.name) for f in fields(images)}
    return train(config, replace(task, held_out=Breaking(**values, killed=killed)))


@pytest.mark.slow
def test_a_test_that_fails_in_one_process_ends_all_of_them(pool: Pool, tmp_path: Path) -> None:
    for name, num_evals in (("last", 1), ("earlier", 4)):
        config = small_run(tmp_path / name, num_evals=num_evals, evaluation="all")
        for outcome in pool.outcomes(2, broken_run, config, False):
            assert "AgreedError: 5.png is damaged; mend or remove it" in str(outcome.error)
    outcomes = pool.outcomes(2, broken_run, small_run(tmp_path / "lost", evaluation="all"), True)
    assert "WorkerLostError: round 4: process 0 (workers 0, 1) lost contact" in str(outcomes[0].error)


def facts(training_s: float, busy_s: float, tests: int, tests_s: float) -> list[dict[str, Any]]:
    process = {"place": "a cpu", "at_once": 1, "free_bytes": 10**9, "fetch_bytes": 0, "link_bytes_s": None}
    own = {"process": process, "busy_s": busy_s, "memory_bytes": 1}
    return [{"training_s": training_s, "tests": [tests, tests_s], **own}]


def test_there_are_as_many_tests_as_take_a_tenth_of_the_run(tmp_path: Path) -> None:
    """Predicted after the first round of forty, and corrected by each test."""
    job, _ = make(resist(2, 1))
    tests = Evaluation(small_run(tmp_path), cast(Task, None), job, 40, None)
    assert tests.rounds == {40}
    tests.decide(facts(training_s=9.0, busy_s=10.0, tests=0, tests_s=0.0), 1)
    assert tests.rounds == {10, 20, 30, 40}
    assert tests.entry()["evaluation"]["rounds"] == [10, 20, 30, 40]
    tests.decide(facts(training_s=80.0, busy_s=1.0, tests=0, tests_s=0.0), 9)  # no test since
    assert tests.rounds == {10, 20, 30, 40}
    assert tests.entry() == {}
    tests.decide(facts(training_s=99.0, busy_s=1.0, tests=1, tests_s=20.0), 11)  # it took twice as long
    assert tests.rounds == {20, 40}
    tests.decide(facts(training_s=180.0, busy_s=1.0, tests=2, tests_s=4.0), 21)
    assert tests.rounds == {24, 28, 32, 36, 40}
    assert tests.entry()["evaluation"]["rounds"] == [24, 28, 32, 36, 40]


def test_a_run_that_ends_at_an_accuracy_is_tested_often(tmp_path: Path) -> None:
    job, _ = make(resist(2, 1))
    assert len(Evaluation(small_run(tmp_path, until=("accuracy=0.9",)), cast(Task, None), job, 40, None).rounds) == 10
    assert len(Evaluation(small_run(tmp_path, num_evals=7), cast(Task, None), job, 40, None).rounds) == 7


@pytest.mark.parametrize(("precision", "expected"), [("bf16", True), ("fp32", False)])
def test_the_full_network_is_estimated_and_tested_in_the_precision_of_the_run(
    tmp_path: Path, precision: Literal["fp32", "bf16"], expected: bool
) -> None:
    job, seen = Job(lambda: tiny().float(), resist(2, 1)), list[bool]()

    class Noting:
        def calibration(self, seed: int) -> Iterator[Tensor]:
            seen.append(torch.is_autocast_enabled("cpu"))
            yield torch.zeros(2, 3, 32, 32)

        def test(self, model: nn.Module, processes: object) -> dict[str, float]:
            seen.append(model(torch.zeros(2, 3, 32, 32)).dtype is torch.bfloat16)
            return {"accuracy": 0.5}

    config = small_run(tmp_path)
    config = replace(config, machine=replace(config.machine, precision=precision))
    Evaluation(config, cast(Task, Noting()), job, 1, None).test(last=False)
    assert seen == [expected, expected]
