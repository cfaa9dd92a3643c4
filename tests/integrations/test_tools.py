"""Tools of torch that people use in their loops: they work as in a plain loop, or are refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.checkpoint import checkpoint

from pool import Pool
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import resist as resist_strategy
from support import batch, floats, sgd, tiny, weights

STRATEGY = resist_strategy(2, 2, capacities=(4, 3))
STEPS = 6


def loss_of(model: nn.Module, worker: int, step: int) -> Tensor:
    images, labels = batch(worker, step)
    return F.cross_entropy(model(images), labels)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


def scheduled(make: Callable[[Optimizer], Any], metric: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One worker with a scheduler, and the same loop without a job."""
    found: list[dict[str, Tensor]] = []
    for with_job in (True, False):
        job = Job(tiny, resist_strategy(1, 2), batchnorm="average", scale=1.0)
        model = job.model if with_job else job.full_model()
        assert model is not None
        optimizer = sgd(model.train())
        schedule = make(optimizer)
        for step in range(STEPS):
            loss = loss_of(model, 0, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step(*[loss.item()] * metric)
            if with_job:
                job.step(optimizer)
        found.append(weights(job) if with_job else floats(model))
    return found[0], found[1]


@pytest.mark.parametrize(
    ("make", "metric"),
    [
        (lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS), False),
        (lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5), True),
        (lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4), False),
    ],
    ids=["OneCycleLR", "ReduceLROnPlateau", "CosineAnnealingWarmRestarts"],
)
def test_schedulers_as_in_a_plain_loop(make: Callable[[Optimizer], Any], metric: bool) -> None:
    """OneCycleLR changes the momentum, too."""
    same(*scheduled(make, metric))


def test_grad_scaler_and_steps_that_it_skips() -> None:
    """Its scale is a power of two: nothing is rounded. A skipped step counts as a step of the round."""
    found = []
    for scaled in (True, False):
        job = Job(tiny, STRATEGY, batchnorm="average")
        optimizers = [sgd(worker.model) for worker in job.workers]
        scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled) for _ in job.workers]
        for step in range(STEPS):
            for worker, optimizer, scaler in zip(job.workers, optimizers, scalers, strict=True):
                skipped = (worker.index, step) == (1, 2)
                scaler.scale(loss_of(worker.model, worker.index, step)).backward()
                if skipped and scaled:
                    next(worker.model.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]
                if scaled or not skipped:
                    scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            job.step(*optimizers)
        assert (job.round, job.step_index) == (3, STEPS)
        assert scalers[1].get_scale() == (2.0**9 if scaled else 1.0)
        found.append(weights(job))
    same(found[0], found[1])


class Block(nn.Module):
    """A block that may compute its activations again in the backward pass."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        if not self.again:
            return x + self.branch(x)
        out = checkpoint(self.branch, x, use_reentrant=False)
        assert isinstance(out, Tensor)
        return x + out


def deep(again: bool) -> nn.Module:
    chain = nn.Sequential(*(Block(again) for _ in range(6)))
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), chain, nn.Linear(8, 5)).double()


def test_activation_checkpointing() -> None:
    found = []
    for again in (False, True):
        job = Job(lambda again=again: deep(again), STRATEGY)
        optimizers = [sgd(worker.model) for worker in job.workers]
        for step in range(STEPS):
            for worker, optimizer in zip(job.workers, optimizers, strict=True):
                loss_of(worker.model, worker.index, step).backward()
                optimizer.step()
                optimizer.zero_grad()
            job.step(*optimizers)
        full = job.full_model()
        assert full is not None
        found.append(floats(full))
    same(found[0], found[1])


def wrapped(kind: str) -> str:
    """Wrap the network of this process's worker, and train a step."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    job = Job(tiny, resist_strategy(2, 2, capacities=(3, 3)), batchnorm="average")
    model: Any = job.model
    if kind == "ddp":
        model = DistributedDataParallel(job.model)
    elif kind == "ddp around more":
        model = DistributedDataParallel(nn.Sequential(job.model, nn.Identity()))
    elif kind == "fully_shard":
        fully_shard(job.model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    optimizer = sgd(model)
    try:
        loss_of(model, job.workers[0].index, 0).backward()
        optimizer.step()
        job.step(optimizer)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("ddp", "DistributedDataParallel around the network of a worker would mix it"),
        ("ddp around more", "DistributedDataParallel around the network of a worker would mix it"),
        ("fully_shard", "fully_shard around the network of a worker would mix it"),
        ("nothing", ""),
    ],
)
def test_wrappers_over_all_processes_are_refused(pool: Pool, kind: str, reason: str) -> None:
    for message in pool.run(2, wrapped, kind, timeout_s=100):
        assert reason in message if reason else message == ""
