"""DiLoCo, ResIST with an outer optimizer, and torch's DistributedDataParallel as strategies."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pool import Pool
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import OuterSGD, ddp, diloco, local_sgd, resist, switch
from resist.sync.averaging import VELOCITY
from support import floats, local_step, make, train, weights


@pytest.mark.slow
def test_outer_lr_1_without_momentum_is_the_plain_mean() -> None:
    plain, first = make(local_sgd(3, 2))
    outer, second = make(diloco(3, 2, optimizer_state="travel", outer=OuterSGD(1.0, 0.0)))
    train(plain, first, 6)
    train(outer, second, 6)
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(outer)[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_diloco_is_torchs_nesterov_on_the_mean_change(workers: int) -> None:
    """The outer step, compared with torch.optim.SGD on the gradient anchor - mean, in every round."""
    job, ours = make(diloco(workers, 2))
    inner, others = make(local_sgd(workers, 2, optimizer_state="keep"))
    names = [name for name, _ in job.workers[0].subnet.model.named_parameters()]
    outer = {name: nn.Parameter(value.clone()) for name, value in weights(job).items() if name in names}
    theirs = torch.optim.SGD(outer.values(), lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(8):
        local_step(job, ours)
        local_step(inner, others)
        job.step(*ours)
        if not inner.step(*others):
            continue
        mean = weights(inner)
        for name, value in outer.items():
            value.grad = value.detach() - mean[name]
        theirs.step()
        for worker in inner.workers:
            with torch.no_grad():
                for name, value in worker.subnet.state(held(inner, worker.index)).items():
                    value.copy_(outer.get(name, value))
        for name, value in weights(job).items():
            expected = outer[name] if name in outer else mean[name]
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def held(job: Job, worker: int) -> list[tuple[int, ...]]:
    return job.plan.held(worker)


def test_the_outer_momentum_travels_with_its_block() -> None:
    """All holders of a block agree on its velocity and anchor, in every round, and on those of the shared part."""
    job, optimizers = make(resist(3, 2, min_depth=3, outer=OuterSGD()))
    for _ in range(10):
        local_step(job, optimizers)
        if not job.step(*optimizers):
            continue
        for state_name in ("anchor", VELOCITY):
            seen: dict[Any, Tensor] = {}
            for worker in job.workers:
                subnet, flats = worker.subnet, worker.anchor if state_name == "anchor" else worker.state[state_name]
                assert flats is not None
                (flat,) = flats.values()
                slots = [(number, slot, b) for number, blocks in enumerate(held(job, worker.index))
                         for slot, b in enumerate(blocks)]  # fmt: skip
                parts: dict[Any, Tensor] = {}
                for number, slot, block in ((None, 0, 0), *slots):
                    ((start, end),) = subnet.layout.part(number).ranges(frozenset())  # of what trains
                    parts[number, block] = subnet.slot(number, slot, flat)[start:end]
                for key, value in parts.items():
                    assert torch.equal(seen.setdefault(key, value), value)
            assert any(value.abs().max() > 0 for value in seen.values())


def test_running_statistics_are_averaged_not_stepped() -> None:
    job, optimizers = make(resist(2, 3, outer=OuterSGD(lr=5.0)))
    train(job, optimizers, 6)
    variances = [v for name, v in weights(job).items() if name.endswith("running_var")]
    assert variances
    assert all((v > 0).all() for v in variances)


def test_a_switch_to_and_from_an_outer_optimizer() -> None:
    first = switch(local_sgd(2, 2), resist(2, 2, outer=OuterSGD()), at_round=1)
    job, optimizers = make(switch(first, diloco(2, 2), at_round=3))
    train(job, optimizers, 10)
    assert all(torch.isfinite(value).all() for value in weights(job).values())


def test_an_outer_optimizer_leaves_nothing_behind() -> None:
    job, optimizers = make(switch(diloco(2, 2), local_sgd(2, 2), at_round=1))
    train(job, optimizers, 2)
    assert all(worker.anchor is None for worker in job.workers)
    train(job, optimizers, 2)
    assert all(VELOCITY not in worker.state for worker in job.workers)


def test_bounds() -> None:
    for wrong in ({"lr": 0.0}, {"lr": float("nan")}, {"momentum": 1.0}, {"momentum": -0.1}):
        bound = "more than 0" if "lr" in wrong else "at least 0 and less than 1"
        with pytest.raises(UserError, match=f"`outer=.*; must be {bound}"):
            OuterSGD(**wrong)
    with pytest.raises(UserError, match="ddp cannot be part of a switch"):
        switch(ddp(2), resist(2), at_round=1)
    with pytest.raises(UserError, match="start 2 processes"):
        make(ddp(2))


STRATEGIES = {
    "ddp": lambda: ddp(2, 2),
    "local_sgd": lambda: local_sgd(2, 1, optimizer_state="average"),
    "outer": lambda: resist(4, 2, min_depth=3, outer=OuterSGD()),
}


def train_here(name: str, steps: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Train by one of STRATEGIES. Returns the full network (in the process of worker 0) and bytes by traffic kind."""
    job, optimizers = make(STRATEGIES[name]())
    job.transport.take()
    train(job, optimizers, steps)
    counted = {name: num for name, num in job.transport.bytes.items() if name != "control"}
    full = job.full_model()
    return ({} if full is None else floats(full)), counted


@pytest.mark.slow
def test_ddp_takes_the_steps_of_the_mean_gradient(pool: Pool) -> None:
    """As local SGD does with one local step and averaged momentum."""
    results = pool.run(2, train_here, "ddp", 4)
    expected, _ = train_here("local_sgd", 4)
    parameters = [name for name in expected if "running" not in name]
    for name in parameters:
        torch.testing.assert_close(results[0][0][name], expected[name], rtol=1e-9, atol=1e-9)
    for _, counted in results:
        assert counted == {"gradients": 4 * 2 * sum(expected[name].numel() * 8 for name in parameters)}


@pytest.mark.slow
def test_hosting_does_not_change_an_outer_optimizer(pool: Pool) -> None:
    expected, counted = train_here("outer", 6)
    results = pool.run(2, train_here, "outer", 6)
    for name, value in expected.items():
        torch.testing.assert_close(results[0][0][name], value, rtol=1e-9, atol=1e-9)
    assert [bytes_there for _, bytes_there in results] == [counted] * 2
