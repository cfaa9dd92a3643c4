"""The work of a block, as a share of what the shared part costs."""

import pytest
from torch import nn

from resist.blocks.chains import choose_chains
from resist.cost import predict
from resist.cost.block_costs import block_costs
from resist.models import build
from resist.planning.strategy import resist

SHAPE = (3, 32, 32)


def test_it_explains_the_work_of_every_sub_network() -> None:
    """Against what `resist cost` counts for sub-networks of other sizes."""

    def network() -> nn.Module:
        return build("preact_small", num_classes=10, depths=(1, 7, 7, 1), width=4)

    chains = choose_chains(network(), ["all"])
    costs = block_costs(network, chains, image_shape=SHAPE)
    assert len(costs) == len(chains) == 2
    flops = {}
    for blocks in ((1, 1), (2, 3), (2, 6)):
        held = {chain.name: blocks[number] for number, chain in enumerate(chains)}
        report = predict(
            network, [resist(6, 5, capacities=held)], chains="all", batch_size=2, image_shape=SHAPE, example=False
        )
        flops[blocks] = report.rows[0].networks[0].training_flops
    work = {blocks: 1 + sum(c * n for c, n in zip(costs, blocks, strict=True)) for blocks in flops}
    for blocks, value in flops.items():
        assert value / flops[1, 1] == pytest.approx(work[blocks] / work[1, 1])
