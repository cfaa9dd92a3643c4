"""A run that cannot start: the same error in all processes. Equal commands: equal weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pool import Pool
from resist.errors import AgreedError, UserError
from resist.runs.config import MachineConfig, MethodConfig, NetworkConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.sync.agreement import run_everywhere
from resist.sync.local import Local
from resist.training.train import train


def refusal(config: TrainConfig) -> str:
    with pytest.raises(AgreedError) as caught:
        train(config)
    return str(caught.value)


@pytest.mark.slow
def test_a_shard_that_is_smaller_than_a_batch(pool: Pool, tmp_path: Path) -> None:
    """Of the 1437 training images, worker 0 draws from 719 and worker 1 from 718."""
    config = TrainConfig(
        network=NetworkConfig(model_args=("depths=1,1,3,1", "width=4")),
        method=MethodConfig(workers=2, min_depth=0, sampling="shard"),
        optimization=OptimizationConfig(batch_size=719),
        machine=MachineConfig(device="cpu"),
        run=RunConfig(out=tmp_path / "run"),
    )
    message = "`batch_size=719` is outside 1 to 718, the images that a worker draws from (process 1)"
    assert pool.run(2, refusal, config) == [message] * 2
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_reaches_all_as_the_same_error() -> None:
    class TwoProcesses(Local):
        num_processes = 2

        def all_gather_text(self, text: str) -> list[str]:
            return [text, "the disk of the other one is full"]

    with pytest.raises(AgreedError, match=r"the disk of the other one is full \(process 1\)"):
        run_everywhere(TwoProcesses(2), lambda: None)
    with pytest.raises(AgreedError, match="here"):
        run_everywhere(Local(1), failing)
    assert run_everywhere(Local(1), lambda: 3) == 3


def failing() -> None:
    raise UserError("here")


VIT = {
    "model_type": "vit", "hidden_size": 16, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 16,
    "patch_size": 4, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2,
}  # fmt: skip


def dropping(out: Path, model: Path, *, num_evals: int = 1) -> TrainConfig:
    """A run of a small network with dropout: four rounds, saved after every second."""
    return TrainConfig(
        network=NetworkConfig(model=f"transformers:{model}"),
        method=MethodConfig(workers=2, local_steps=2, min_depth=0),
        optimization=OptimizationConfig(batch_size=32, epochs=8 * 2 * 32 / 2 / 1437, lr=0.05),
        machine=MachineConfig(device="cpu"),
        run=RunConfig(out=out, num_evals=num_evals, checkpoint_rounds=2),
    )


def final(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_equal_commands_give_equal_weights_with_dropout(pool: Pool, tmp_path: Path) -> None:
    """Also with other evaluations, in other processes, and after an interruption."""
    pytest.importorskip("transformers")
    model = tmp_path / "vit.json"
    model.write_text(json.dumps(VIT))
    assert train(dropping(tmp_path / "one", model)) == 0
    one = final(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "metrics.jsonl").read_text().splitlines()[-1])["round"] == 4

    torch.manual_seed(1)
    assert train(dropping(tmp_path / "again", model, num_evals=2)) == 0
    assert same(one, final(tmp_path / "again"))

    assert pool.run(2, train, dropping(tmp_path / "two", model)) == [0, 0]
    two = final(tmp_path / "two")
    for name, value in one.items():  # only the order of summation differs
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-6)

    shutil.rmtree(tmp_path / "one" / "checkpoints" / "round-000004")
    torch.manual_seed(2)
    resumed = dropping(tmp_path / "one", model)
    assert train(replace(resumed, run=replace(resumed.run, out=None, resume=tmp_path / "one"))) == 0
    assert same(one, final(tmp_path / "one"))
