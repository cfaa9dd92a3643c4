"""Sizes of the parts of a network, and of the optimizer's state."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from resist.blocks.chain import Chain
from resist.subnet.network import Subnet


@dataclass(frozen=True)
class Part:
    """Size of the shared part or of one block.

    Attributes:
        numel: Parameters and float buffers, which are handed over with a block: number of elements by dtype.
        changing: Those that change in training, in the same form. Each dtype has an all-reduce of its own.
        parameters: Bytes of the parameters, which the paper counts.
        trainable: Bytes of the parameters with a gradient, which DistributedDataParallel sends.
    """

    numel: Mapping[torch.dtype, int]
    changing: Mapping[torch.dtype, int]
    parameters: int
    trainable: int

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters and float buffers."""
        return sum(number * dtype.itemsize for dtype, number in self.numel.items())

    @property
    def buffers(self) -> int:
        """Bytes of float buffers."""
        return self.num_bytes - self.parameters


@dataclass(frozen=True)
class StateSizes:
    """Size of the optimizer's state, see `resist.cost.states`.

    Attributes:
        flat: For each state that is laid out as the weights, its dtype by dtype of the weights.
        loose_shared: Bytes of all other state of the shared part.
        loose_blocks: The same of a block of each chain; empty: none.
    """

    flat: tuple[Mapping[torch.dtype, torch.dtype], ...] = ()
    loose_shared: int = 0
    loose_blocks: tuple[int, ...] = ()

    def flat_bytes(self, numel: Mapping[torch.dtype, int]) -> list[int]:
        """List the bytes of each state, for numbers of weights by dtype."""
        return [numel[d] * own.itemsize for types in self.flat for d, own in types.items() if numel.get(d)]


NO_STATE = StateSizes()


@dataclass(frozen=True)
class Sizes:
    """Sizes of the parts of a network.

    Attributes:
        shared: The shared part.
        chains: The chains.
        blocks: A block of each chain.
    """

    shared: Part
    chains: tuple[Chain, ...]
    blocks: tuple[Part, ...]

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block of each chain."""
        return tuple(block.num_bytes for block in self.blocks)

    def whole(self) -> Part:
        """Return the full network as one part."""
        parts = [self.shared]
        for chain, block in zip(self.chains, self.blocks, strict=True):
            parts += [block] * chain.num_blocks
        numel, changing = Counter[torch.dtype](), Counter[torch.dtype]()
        for part in parts:
            numel.update(part.numel)
            changing.update(part.changing)
        return Part(numel, changing, sum(p.parameters for p in parts), sum(p.trainable for p in parts))


def sizes_of(template: nn.Module, chains: Sequence[Chain]) -> Sizes:
    """Count the bytes of the shared part and of each block.

    Args:
        template: The full network, on any device.
        chains: Its chains.
    """
    subnet = Subnet(template, chains, [chain.num_blocks for chain in chains], device="meta")
    return Sizes(_part(subnet, None), subnet.chains, tuple(_part(subnet, number) for number in range(len(chains))))


def _part(subnet: Subnet, chain: int | None) -> Part:
    """Bytes of a block of a chain, or of the shared part."""
    parameters = [p for p, place in subnet.parameter_places() if (place.chain, place.slot) == (chain, 0)]
    layouts = {dtype: layout.part(chain) for dtype, layout in subnet.layouts.items()}
    changing = {
        dtype: sum(end - start for start, end in layout.ranges(layout.statistics)) for dtype, layout in layouts.items()
    }
    return Part(
        numel={dtype: layout.numel for dtype, layout in layouts.items()},
        changing=changing,
        parameters=sum(p.nbytes for p in parameters),
        trainable=sum(p.nbytes for p in parameters if p.requires_grad),
    )
