"""Randomness of a step in one's own loop: a function of the job's seed, the worker and the step."""

from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pool import Pool
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import resist
from support import batch, floats


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv, self.drop = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.conv(F.relu(self.norm(x))))


def dropping() -> nn.Module:
    blocks = nn.Sequential(*[Block() for _ in range(4)])
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), blocks, nn.Flatten(), nn.Linear(256, 5)).double()


def trained(steps: int, evaluate: Iterable[int] = ()) -> dict[str, Tensor]:
    """The weights after so many steps, with the line of the docstring."""
    job = Job(dropping, resist(2, 2, min_depth=0))
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.05) for worker in job.workers]
    for step in range(steps):
        if step in evaluate:
            job.full_model([batch(0, 0)[0]])
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            torch.manual_seed(job.step_seed(worker.index))
            images, labels = batch(worker.index, step)
            F.cross_entropy(worker.model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        job.step(*optimizers)
    full = job.full_model([batch(0, 0)[0]])
    return {} if full is None else floats(full)


def equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


def test_equal_jobs_end_equal_however_they_are_tested() -> None:
    torch.manual_seed(1)
    one = trained(6)
    torch.manual_seed(2)
    assert equal(one, trained(6))
    assert equal(one, trained(6, evaluate=(2, 4)))


@pytest.mark.slow
def test_hosting_does_not_matter(pool: Pool) -> None:
    """Up to the order of summation."""
    one, two = trained(6), pool.run(2, trained, 6)[0]
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-10, atol=1e-10)


def test_workers_and_steps_differ() -> None:
    seeds = set[int]()
    job = Job(dropping, resist(3, 2, min_depth=0))
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.05) for worker in job.workers]
    for _ in range(4):
        seeds |= {job.step_seed(worker) for worker in range(3)}
        job.step(*optimizers)
    assert len(seeds) == 12
    assert all(0 <= seed < 2**63 for seed in seeds)
    with pytest.raises(UserError, match=r"step_seed\(worker=None\): this process hosts the workers \[0, 1, 2\]"):
        job.step_seed()
    with pytest.raises(UserError, match=r"step_seed\(worker=3\)"):
        job.step_seed(3)
    alone = Job(dropping, resist(1, 2, min_depth=0))
    assert alone.step_seed() == alone.step_seed(0)


def test_assembling_the_full_network_draws_nothing() -> None:
    """Its BatchNorm statistics are estimated with dropout, and the batches may be drawn."""
    job = Job(dropping, resist(2, 2, min_depth=0))
    before = torch.get_rng_state()
    one = job.full_model(torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    two = job.full_model(torch.randn(4, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    assert one is not None
    assert two is not None
    assert equal(floats(one), floats(two))
