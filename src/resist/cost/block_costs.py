"""Cost of a block of each chain, as a share of what the shared part costs, from FLOPs on the meta device."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from resist.blocks.chain import Chain
from resist.cost.footprint import Loss, build_on_meta, count_flops, mean_square
from resist.subnet.network import Subnet

BATCH = 2  # images: BatchNorm needs two


def block_costs(
    build_model: Callable[[], nn.Module], chains: Sequence[Chain], *, image_shape: Sequence[int],
    loss: Loss = mean_square,
) -> tuple[float, ...]:  # fmt: skip
    """Count the FLOPs of a training step for a block of each chain.

    Args:
        build_model: Builds the full network.
        chains: Its chains.
        image_shape: (channels, height, width).
        loss: `loss(model, images)` returns the scalar from which backward starts.

    Returns:
        For each chain the FLOPs of a block as a share of those of the shared part.

    Raises:
        UserError: If the network has no convolution, matrix product or attention.
    """
    template = build_on_meta(build_model)

    def flops(blocks: Sequence[int]) -> int:
        model = Subnet(template, chains, blocks, device="meta").model.train()
        images = torch.empty(BATCH, *image_shape, dtype=next(model.parameters()).dtype, device="meta")
        return count_flops(model, None, images, loss)[1]

    least = [1] * len(chains)
    smallest = flops(least)
    of_blocks = [flops([2 if i == chain else 1 for i in range(len(chains))]) - smallest for chain in range(len(chains))]
    shared = smallest - sum(of_blocks)
    return tuple(block / shared for block in of_blocks)
