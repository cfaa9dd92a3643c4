"""Tests of the competitors: they compute the same means as this package, with other messages."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import competitors
import own
from pool import Pool
from resist.models import build
from resist.planning.plan import keyed_int

WORKERS, ROUNDS = 3, 3


def network() -> nn.Module:
    return build("preact_resnet101", num_classes=3, depths=(1, 1, 6, 1), width=4)


@pytest.mark.slow
def test_competitors_end_with_the_weights_of_this_package(pool: Pool) -> None:
    pool.run(WORKERS, compare)


def compare() -> None:
    rank = dist.get_rank()
    resist = weights_after_rounds("resist,optimizer_state=reset", rank)
    for name in ("published", "published-kept"):
        published = weights_after_rounds(name, rank)
        assert len(resist) < len(published)
        for key, ours in resist.items():
            torch.testing.assert_close(published[key], ours, msg=lambda text, at=f"{name} {key}": f"{at}: {text}")
    local_sgd = weights_after_rounds("local_sgd", rank)
    for name in ("flat", "averager"):
        for key, weights in weights_after_rounds(name, rank).items():
            torch.testing.assert_close(weights, local_sgd[key], msg=lambda text, at=f"{name} {key}": f"{at}: {text}")


def weights_after_rounds(spec: str, rank: int) -> dict[str, Tensor]:
    """Return the weights of worker `rank` by global name, after rounds with random changes for each worker."""
    method = competitors.make(spec, network, WORKERS, local_steps=2)
    for round in range(ROUNDS):
        for name, weight in global_weights(method).items():
            generator = torch.Generator().manual_seed(keyed_int(name, round, rank))
            weight += torch.randn(weight.shape, generator=generator)
        method.synchronize()
        method.tidy()
    return {name: weight.clone() for name, weight in global_weights(method).items()}


def global_weights(method: competitors.Method) -> dict[str, Tensor]:
    if isinstance(method, own.Own):
        worker, job = method.job.workers[0], method.job
        return worker.subnet.state(job.plan.held(worker.index))
    return {name: parameter.detach() for name, parameter in method.model.named_parameters()}
