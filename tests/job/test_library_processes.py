"""The same loops over two real processes: nothing hangs, and the weights are those of one process.

To 1e-7: after a reset, Adam's first step enlarges what the order of a sum changed.
"""

import pytest
import torch
from test_library import Scaled
from test_library_averages import follow, go
from torch import Tensor, nn

from pool import Pool
from resist.errors import AgreedError
from resist.planning.strategy import resist
from support import adamw, floats, local_step, make

pytestmark = pytest.mark.slow


def skipping(policy: str) -> tuple[dict[str, Tensor], int]:
    """Worker 1's gradients overflow throughout the first round, so its optimizer has no state yet when that ends."""
    job, optimizers = make(resist(2, 2, capacities=(4, 3), optimizer_state=policy), adamw)
    step = Scaled({(1, 0), (1, 1), (0, 3)})
    for _ in range(7):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            step(worker.index, job.step_index, worker.model, optimizer)
        job.step(*optimizers)
    return weights_of_first(job.full_model()), job.round


def averaging(_: object) -> tuple[dict[str, Tensor], int]:
    job, optimizers = make(resist(2, 2, capacities=(4, 3)))
    go(job, optimizers, follow(job), 5)
    return weights_of_first(job.full_model(averaged=True)), job.round


def weights_of_first(full: nn.Module | None) -> dict[str, Tensor]:
    return {} if full is None else floats(full)


@pytest.mark.parametrize(
    ("loop", "policy"),
    [(skipping, "travel"), (skipping, "average"), (skipping, "reset"), (averaging, "")],
    ids=["skip-travel", "skip-average", "skip-reset", "ema"],
)
def test_two_processes_do_what_one_does(pool: Pool, loop, policy: str) -> None:
    alone, rounds = loop(policy)
    (found, *_), (nothing, *_) = (answers := pool.run(2, loop, policy))
    assert [round for _, round in answers] == [rounds, rounds]
    assert not nothing
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def half_follow() -> str:
    job, optimizers = make(resist(2, 1))
    if job.workers[0].index == 0:
        follow(job)
    local_step(job, optimizers)
    try:
        job.step(*optimizers)
    except AgreedError as error:
        return str(error)
    return ""


def test_averages_in_one_process_only(pool: Pool) -> None:
    messages = pool.run(2, half_follow)
    assert messages == ["job.follow was called in some processes and not in others; call it in all of them"] * 2
