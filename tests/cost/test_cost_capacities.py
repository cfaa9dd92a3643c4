"""Predictions with capacities of their own for each chain, and with capacities that change by round."""

from typing import Any

import pytest
from cost_cases import SMALL, row
from torch import nn

from resist import Capacities
from resist.cost import predict
from resist.errors import UserError
from resist.models import PreActResNet
from resist.planning.strategy import local_sgd, resist
from support import make, tiny, train


def two_chains() -> nn.Module:
    return PreActResNet((1, 4, 9, 1), 5, width=4)


@pytest.mark.slow
def test_each_chain_has_its_own_capacities() -> None:
    strategy = resist(2, capacities={"layer2": (2, 1), "layer3": (4, 6)})
    (one,) = predict(two_chains, [strategy], chains="all", **SMALL).rows
    assert [network.blocks for network in one.networks] == [(4, 2), (6, 1)]
    model = two_chains()
    sizes = [sum(p.numel() for p in model.get_submodule(name).parameters()) for name in ("layer3.1", "layer2.1")]
    shared = sum(p.numel() for p in model.parameters()) - 8 * sizes[0] - 3 * sizes[1]
    assert one.networks[0].parameters == shared + 4 * sizes[0] + 2 * sizes[1]
    assert one.traffic.paper_bytes == 4 * 2 * (2 * shared + 10 * sizes[0] + 3 * sizes[1])


@pytest.mark.slow
def test_a_growing_strategy_has_a_row_for_each_of_its_sizes() -> None:
    growing = resist(3, 2, capacities=Capacities(by_round={0: 2, 3: 4, 5: 6}))
    report = predict(tiny, [growing, local_sgd(3, 2)], **SMALL)
    names = [one.strategy for one in report.rows]
    assert names == ["resist after 0 rounds", "resist after 3 rounds", "resist after 5 rounds", "local_sgd"]
    assert [one.networks[0].blocks for one in report.rows] == [(2,), (4,), (6,), (6,)]
    # All blocks: as local SGD.
    assert report.rows[2].traffic == report.rows[3].traffic
    # A row is that of the strategy with this size alone, from the same round on.
    alone = predict(tiny, [resist(3, 2, capacities=2)], **SMALL)
    assert row(alone, "resist", 3).traffic == report.rows[0].traffic


@pytest.mark.slow
def test_the_bytes_of_a_stage_are_those_that_are_sent() -> None:
    """In the rounds before and after the one that grows."""
    strategy = resist(3, 1, capacities=Capacities(by_round={0: 2, 3: 4}), optimizer_state="reset")
    report = predict(tiny, [strategy], **{**SMALL, "rounds": 2})
    job, optimizers = make(strategy)
    sent: list[dict[str, Any]] = []
    for _ in range(6):
        train(job, optimizers, 1)
        sent.append(job.transport.take()["bytes"])
    for one, rounds in zip(report.rows, (sent[0:2], sent[3:5]), strict=True):
        for kind in ("shared", "blocks"):
            assert one.traffic.bytes[kind] == sum(each.get(kind, 0) for each in rounds) / 2, (one.strategy, kind)


def test_capacities_that_fit_no_chain_are_refused() -> None:
    with pytest.raises(UserError, match="capacities of chain 'layer9', which is not partitioned"):
        predict(tiny, [resist(2, capacities={"layer9": 3})], **SMALL)
    with pytest.raises(UserError, match="hold 2 of the 6 blocks of chain layer3:1-6 after 7 rounds"):
        predict(tiny, [resist(2, capacities=Capacities(by_round={7: 1}))], **SMALL)
