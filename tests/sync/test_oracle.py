"""The package and the plain implementation of the algorithm give the same weights."""

import pytest
import torch
from torch import nn

from oracle import train_resist
from resist.planning.plan import partition
from resist.planning.strategy import resist
from resist.subnet.seeded import build_seeded
from support import BLOCKS, batch, floats, make, tiny, train, weights

ROUNDS, STEPS, LR, MOMENTUM, DECAY = 4, 2, 0.05, 0.9, 1e-3


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=DECAY)


@pytest.mark.parametrize(
    ("capacities", "channels_last"),
    [
        ((4, 2, 3), False),
        *(
            pytest.param(capacities, channels_last, marks=pytest.mark.slow)
            for capacities, channels_last in (
                ((6,), False),
                ((2, 2, 2), False),
                ((2, 2, 2), True),
                ((4, 4), False),
                ((4, 2, 3), True),
                ((1, 6, 2), False),
                ((6, 6), False),
            )
        ),
    ],
)
def test_the_package_does_what_the_paper_says(capacities: tuple[int, ...], channels_last: bool) -> None:
    """Parameters and running statistics after 4 rounds, in double precision, to 1e-10 of their size."""
    strategy = resist(len(capacities), STEPS, capacities=capacities, optimizer_state="reset")
    job, optimizers = make(strategy, sgd, seed=4, channels_last=channels_last)
    start = build_seeded(tiny, 4)
    chain = job.chains[0].name
    assert chain == f"layer3:1-{BLOCKS}"
    plans = [partition(BLOCKS, capacities, seed=4, round=round, chain=chain).blocks for round in range(ROUNDS)]
    expected = train_resist(start, plans, batch, local_steps=STEPS, lr=LR, momentum=MOMENTUM, weight_decay=DECAY)
    train(job, optimizers, ROUNDS * STEPS)
    found, before = weights(job), floats(start)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)
        assert not torch.allclose(value, before[name], rtol=1e-4, atol=1e-6), f"{name} was not trained"
