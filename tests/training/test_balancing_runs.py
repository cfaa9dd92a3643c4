"""`capacities=auto` in a run: blocks leave the slow worker, and what was decided is kept in the run's options."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pool import Pool
from resist.cli.train import resumed
from resist.data import Sampler
from resist.errors import UserError
from resist.runs.config import MachineConfig, MethodConfig, NetworkConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.runs.config_file import from_json, read_config
from resist.sync.worker import Worker
from resist.tasks import Task
from resist.training import train as training
from resist.training.trainer import Trainer

STEPS, ROUNDS = 2, 8
BLOCK_S, SHARED_S, SLOWER = 0.01, 0.02, 2.0  # slept in each step; the second worker has the slower machine
CHAIN = "layer3:1-8"


class Sleeping(Trainer):
    """A trainer on a machine whose steps take long."""

    def __init__(self, config: TrainConfig, worker: Worker, task: Task, sampler: Sampler) -> None:
        super().__init__(config, worker, task, sampler)
        self._subnet = worker.subnet

    def step(self, step: int, lr: float) -> Any:
        (held,) = self._subnet.capacities
        time.sleep((SHARED_S + BLOCK_S * held) * (SLOWER if self.index == 1 else 1))
        return super().step(step, lr)


def config(out: Path) -> TrainConfig:
    return TrainConfig(
        network=NetworkConfig(model_args=("depths=1,1,9,1", "width=4")),
        method=MethodConfig(workers=2, local_steps=STEPS, capacities="auto", batchnorm="average"),
        optimization=OptimizationConfig(batch_size=8, epochs=ROUNDS * STEPS * 8 / 1437, lr=0.05),
        machine=MachineConfig(device="cpu"),
        run=RunConfig(out=out, num_evals=1, checkpoint_rounds=5),
    )


def run(given: TrainConfig) -> int:
    trainer, training.Trainer = training.Trainer, Sleeping
    try:
        return training.train(given)
    finally:
        training.Trainer = trainer


def capacities(out: Path) -> list[list[int]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["capacity"][CHAIN] for record in records]


@pytest.mark.slow
def test_the_slow_worker_gives_blocks_away(pool: Pool, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert pool.run(2, run, config(out)) == [0, 0]
    held = capacities(out)
    assert held[:5] == [[4, 4]] * 5
    assert held[5] == [5, 3]
    assert all(sum(both) == 8 for both in held)
    method = read_config(out).method
    assert method.capacities == "auto"
    assert method.capacities_by_round[0] == f"5:{CHAIN}=5,3"
    (out / "model.safetensors").unlink()
    shutil.rmtree(out / "checkpoints" / "round-000008")
    again = resumed(TrainConfig(run=RunConfig(resume=out)), frozenset({"resume"}))
    assert pool.run(2, run, again) == [0, 0]
    assert capacities(out)[5] == [5, 3]  # as they were decided, though the run goes on from round 5


def test_they_are_numbers_or_auto() -> None:
    assert from_json({"method": {"capacities": "auto"}}).method.capacities == "auto"
    assert from_json({"method": {"capacities": [4, 2]}}).method.capacities == (4, 2)
    for value in ("many", 1.5, [1, "auto"]):
        with pytest.raises(UserError, match="capacities has the value"):
            from_json({"method": {"capacities": value}})
    for method, message in (
        (MethodConfig(capacities="many"), "`capacities='many'` is not one of auto, a whole number"),  # type: ignore[arg-type]
        (MethodConfig(capacities="auto", strategy="local_sgd"), "`capacities` has no effect with"),
    ):
        with pytest.raises(UserError) as refused:
            TrainConfig(method=method).check()
        assert message in str(refused.value)
    given = replace(MethodConfig(capacities="auto"), capacities_by_round=("3:layer3=5,3",))
    assert given.all_capacities().of(8, 2, chain=CHAIN, round=3) == (5, 3)
