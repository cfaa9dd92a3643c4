"""A worker whose round does not count: its averages over time, and an outer optimizer, are as if it had not been."""

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resist.job import Job
from resist.planning.strategy import OuterSGD, resist
from support import local_step, make

DROPPED = 1


def holders_of(job: Job, name: str) -> set[int]:
    """Workers that hold a tensor in the present round."""
    for number, chain in enumerate(job.chains):
        for block in range(chain.num_blocks):
            if name.startswith(f"{chain.block_name(block)}."):
                return set(job.plan.holders(number, block))
    return set(range(job.strategy.workers))


def named(job: Job, *, averaged: bool) -> dict[int, dict[str, Tensor]]:
    tensors: dict[int, dict[str, Tensor]] = {}
    for worker in job.workers:
        subnet = worker.average if averaged else worker.subnet
        assert subnet is not None
        state = subnet.state(job.plan.held(worker.index))
        tensors[worker.index] = {name: value.clone() for name, value in state.items()}
    return tensors


@pytest.mark.parametrize("poison", [False, True])
def test_averages_of_a_dropped_worker_return_to_the_rounds_start(poison: bool) -> None:
    job, optimizers = make(resist(3, 1, capacities=(3, 2, 2)), on_nonfinite="drop")
    averages = [AveragedModel(w.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for w in job.workers]
    job.follow(*averages)
    for _ in range(4):
        start = named(job, averaged=True)
        local_step(job, optimizers)
        if poison:
            with torch.no_grad():
                job.workers[DROPPED].model.get_parameter("head.bias").fill_(torch.nan)
        for worker, average in zip(job.workers, averages, strict=True):
            average.update_parameters(worker.model)
        end = named(job, averaged=True)
        expected: dict[str, Tensor] = {}
        for name in {name for tensors in start.values() for name in tensors}:
            holders = holders_of(job, name)
            counted = holders - {DROPPED}
            copies = [end[worker][name] for worker in counted] or [start[worker][name] for worker in holders]
            expected[name] = torch.stack(copies).mean(0)
        job.step(*optimizers, nonfinite={DROPPED: "a loss of nan"})
        for tensors in named(job, averaged=True).values():
            for name, value in tensors.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_an_outer_optimizer_does_not_move_what_only_dropped_workers_held() -> None:
    job, optimizers = make(resist(3, 1, min_depth=0, outer=OuterSGD()), on_nonfinite="drop")
    moved = 0
    for number in range(6):
        start = named(job, averaged=False)
        alone = {name for name in start[DROPPED] if holders_of(job, name) == {DROPPED}}
        local_step(job, optimizers)
        drop = number % 2 == 1
        job.step(*optimizers, nonfinite={DROPPED: "a loss of nan"} if drop else None)
        for tensors in named(job, averaged=False).values():
            for name in alone & tensors.keys():
                if drop:
                    assert torch.equal(tensors[name], start[DROPPED][name]), name
                else:
                    moved += not torch.equal(tensors[name], start[DROPPED][name])
    assert moved
