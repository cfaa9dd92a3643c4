"""`fragments=auto` in a run: what is measured, what is kept of the choice, and how the run goes on with it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pool import Pool
from resist.cli.options import as_typed
from resist.cli.train import resumed
from resist.errors import UserError
from resist.planning.wire import Wire
from resist.runs.config import MachineConfig, MethodConfig, NetworkConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.runs.config_file import from_json, read_config
from resist.training import overlap
from resist.training.train import train

STEPS, ROUNDS = 4, 6


def config(out: Path, workers: int = 2) -> TrainConfig:
    return TrainConfig(
        network=NetworkConfig(model_args=("depths=1,1,5,1", "width=4")),
        method=MethodConfig(
            workers=workers, local_steps=STEPS, min_depth=0, batchnorm="average", fragments="auto", wire="int8"
        ),
        optimization=OptimizationConfig(batch_size=16, epochs=ROUNDS * STEPS * 16 / 1437, lr=0.05),
        machine=MachineConfig(device="cpu"),
        run=RunConfig(out=out, num_evals=1, checkpoint_rounds=3),
    )


def run(given: TrainConfig) -> list[dict[str, Any]]:
    """Train with two fragments as the choice; returns what it was made from."""
    measured: list[dict[str, Any]] = []

    def choose(wire: Wire, numel: int, **values: Any) -> Wire:
        measured.append({"numel": numel, **values})
        return replace(wire, fragments=2)

    choose_fragments, overlap.choose_fragments = overlap.choose_fragments, choose
    try:
        assert train(given) == 0
    finally:
        overlap.choose_fragments = choose_fragments
    return measured


def messages(out: Path) -> list[int]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == ROUNDS
    return [record["messages"]["shared"] for record in records]


@pytest.mark.slow
def test_the_choice_is_made_after_the_second_round_and_kept(pool: Pool, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (first,), (second,) = pool.run(2, run, config(out))
    assert first == second  # all processes choose from the same numbers
    assert (first["workers"], first["local_steps"]) == (2, STEPS)
    assert min(first["step_s"], first["exchange_s"], first["exchange_bytes"]) > 0
    trained = load_file(out / "model.safetensors")
    shared = [name for name in trained if not name.startswith("layer3.") or name.startswith("layer3.0.")]
    assert first["numel"] == sum(trained[n].numel() for n in shared if "running" not in n and "num_batches" not in n)
    method = read_config(out).method
    assert (method.fragments, method.delay) == (2, 1)
    before, *_, after = messages(out)
    assert messages(out) == [before] * 2 + [after] * 4
    assert after > before

    shutil.rmtree(out / "checkpoints" / "round-000006")
    (out / "model.safetensors").unlink()
    again = resumed(TrainConfig(run=RunConfig(resume=out)), frozenset({"resume"}))
    assert pool.run(2, run, again) == [[], []]  # nothing is chosen a second time
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in trained.items())


@pytest.mark.slow
def test_one_process_needs_none(tmp_path: Path) -> None:
    assert run(config(tmp_path / "run")) == []
    assert read_config(tmp_path / "run").method.fragments == 0


def test_values_of_other_forms_are_refused() -> None:
    assert from_json({"method": {"fragments": "auto"}}).method.fragments == "auto"
    assert from_json({"method": {"fragments": 3}}).method.fragments == 3
    for value in ("many", 1.5, True, None):
        with pytest.raises(UserError, match=r"fragments has the value .* which is not a whole number or one of auto"):
            from_json({"method": {"fragments": value}})
    for method, message in (
        (MethodConfig(fragments="many"), "--fragments 'many' is not one of auto, a whole number"),  # type: ignore[arg-type]
        (MethodConfig(fragments=-1), "--fragments -1 is too small; give at least 0"),
        (MethodConfig(fragments="auto", delay=2), "method.delay=2 is chosen with --fragments auto; remove one of the"),
        (MethodConfig(fragments="auto", strategy="ddp"), "--fragments has no effect with --strategy ddp"),
    ):
        with pytest.raises(UserError) as refused:
            TrainConfig(method=method).check()
        assert message in as_typed(str(refused.value))
