"""A run that cannot start: the same error in all processes."""

from pathlib import Path

import pytest

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
