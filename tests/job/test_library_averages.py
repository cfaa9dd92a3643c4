"""Averages of the weights over time (EMA, SWA), which move with their blocks."""

import pytest
import torch
from test_library import RESIZED, UNEQUAL, by_hand, check, ordinary
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resist.errors import UserError
from resist.job import Job
from resist.planning.schedule import allreduce_bytes
from resist.planning.strategy import Strategy, local_sgd, resist, switch
from resist.subnet.seeded import build_seeded
from support import adamw, floats, make, sgd, tiny, train_step, weights

DECAY = 0.7


def ema(model: nn.Module) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


def follow(job: Job, average=ema) -> list[AveragedModel]:
    averages = [average(worker.model) for worker in job.workers]
    job.follow(*averages)
    return averages


def go(job: Job, optimizers, averages, steps: int) -> None:
    for _ in range(steps):
        for worker, optimizer, average in zip(job.workers, optimizers, averages, strict=True):
            train_step(worker.index, worker.model, optimizer, job.step_index)
            average.update_parameters(worker.model)
        job.step(*optimizers)


@pytest.mark.parametrize("average", [ema, AveragedModel], ids=["ema", "mean"])
def test_with_one_worker_it_is_torchs(average) -> None:
    """Bit for bit, over rounds."""
    plain = build_seeded(tiny, 0).train()
    theirs, optimizer = average(plain), sgd(plain)
    job, optimizers = make(resist(1, 2))
    averages = follow(job, average)
    for step in range(7):
        train_step(0, plain, optimizer, step)
        theirs.update_parameters(plain)
    go(job, optimizers, averages, 7)
    full = job.full_model(averaged=True)
    assert full is not None
    found = floats(full)
    assert all(torch.equal(found[name], value) for name, value in floats(theirs.module).items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [UNEQUAL, RESIZED], ids=["", "resized"])
def test_they_go_where_their_blocks_go(strategy: Strategy) -> None:
    """As by hand; training itself does not notice."""
    job, optimizers = make(strategy)
    go(job, optimizers, follow(job), 6)
    plain = by_hand(strategy, 3, sgd, ordinary, decay=DECAY)
    check(weights(job), plain.weights)
    full = job.full_model(averaged=True)
    assert full is not None
    check(floats(full), plain.averages)
    assert any(not torch.allclose(plain.averages[name], value) for name, value in plain.weights.items())


def test_with_local_sgd_it_is_the_average_of_the_mean() -> None:
    """Averaging over time and over workers may be exchanged, since both are linear."""
    job, optimizers = make(local_sgd(3, 4))
    averages = follow(job)
    expected: dict[str, torch.Tensor] = {}
    for step in range(8):
        for worker, optimizer, average in zip(job.workers, optimizers, averages, strict=True):
            train_step(worker.index, worker.model, optimizer, job.step_index)
            average.update_parameters(worker.model)
        for name in dict(job.workers[0].model.named_parameters()):
            value = torch.stack([worker.model.get_parameter(name) for worker in job.workers]).mean(0).detach()
            expected[name] = value if step == 0 else DECAY * expected[name] + (1 - DECAY) * value
        job.step(*optimizers)
    full = job.full_model(averaged=True)
    assert full is not None
    check({name: p.detach() for name, p in full.named_parameters()}, expected)


@pytest.mark.parametrize("policy", ["reset", "travel"])
def test_the_users_average_goes_on_through_all_changes(policy: str) -> None:
    """Local SGD, ResIST, local SGD again: the average has the depth of its network, and stays the object it was."""
    everyone, parts = local_sgd(2, 1, optimizer_state=policy), resist(2, 1, capacities=(4, 3), optimizer_state=policy)
    job, optimizers = make(switch(switch(everyone, parts, at_round=2), everyone, at_round=4), adamw)
    averages = follow(job)
    modules = [average.module for average in averages]
    for _ in range(6):
        go(job, optimizers, averages, 1)
        for worker, average, module in zip(job.workers, averages, modules, strict=True):
            assert average.module is module
            assert floats(module).keys() == floats(worker.model).keys()
            assert worker.average is not None
            worker.average.check_attached()
            assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in worker.model.parameters()}


def test_bytes() -> None:
    """As many as the weights', and booked apart."""
    job, optimizers = make(resist(3, 1, capacities=(4, 3, 2), optimizer_state="reset"))
    averages = follow(job)
    job.transport.take()
    go(job, optimizers, averages, 1)
    taken = job.transport.take()["bytes"]
    assert isinstance(taken, dict)
    assert taken["shared"] == 3 * allreduce_bytes(8 * job.workers[0].subnet.layout.shared.numel, 3)
    assert taken["state"] == taken["shared"] + taken["blocks"] > 0


def test_refusals() -> None:
    job, _ = make(resist(2, 1))
    with pytest.raises(UserError, match="1 averages for 2 hosted workers; pass one for each"):
        job.follow(ema(job.workers[0].model))
    with pytest.raises(UserError, match="AveragedModel holds no copy of the network of worker 0; make it with"):
        job.follow(*[ema(tiny()) for _ in range(2)])
    with pytest.raises(UserError, match="PreActResNet holds no copy of the network"):
        job.follow(*[worker.model for worker in job.workers])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"averaged=True, and there are no averages; give them to job.follow"):
        job.full_model(averaged=True)
