"""Sizes of the parts of a network, and of the optimizer's state."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from resist.blocks.chain import Chain
from resist.planning.wire import FORMATS, FP32, Wire, fragment_bytes, part_bytes
from resist.subnet.network import Subnet
from resist.sync.state_formats import format_of


@dataclass(frozen=True)
class Part:
    """Size of the shared part or of one block.

    Attributes:
        numel: Parameters and float buffers, which are handed over with a block: number of elements by dtype.
        changing: Those that change in training, in the same form. Each dtype has an all-reduce of its own.
        trained: Parameters that train, in the same form: what a wire format encodes.
        parameters: Bytes of the parameters, which the paper counts.
        trainable: Bytes of the parameters with a gradient, which DistributedDataParallel sends.
    """

    numel: Mapping[torch.dtype, int]
    changing: Mapping[torch.dtype, int]
    trained: Mapping[torch.dtype, int]
    parameters: int
    trainable: int

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters and float buffers."""
        return sum(number * dtype.itemsize for dtype, number in self.numel.items())

    def block_bytes(self, format: str, types: Mapping[torch.dtype, torch.dtype] | None = None) -> int:
        """Return the bytes of a block on the wire.

        Args:
            format: Wire format of what trains in single precision.
            types: Dtype of the values by dtype of the weights, of a state that is laid out as the weights. Default: the
                weights themselves.
        """
        types = {dtype: dtype for dtype in self.numel} if types is None else types
        return sum(
            part_bytes(_format(format, own), self.numel.get(d, 0), self.trained.get(d, 0), own.itemsize)
            for d, own in types.items()
        )

    def mean_bytes(
        self, format: str, types: Mapping[torch.dtype, torch.dtype] | None = None, *, fragments: int = 0
    ) -> tuple[list[int], list[int]]:
        """Return the bytes of each all-reduce, and of each compressed mean.

        Args:
            format: As in `block_bytes`.
            types: As in `block_bytes`.
            fragments: Number of fragments in which what trains in single precision is averaged; 0: with the rest.
        """
        types = {dtype: dtype for dtype in self.changing} if types is None else types
        plain: list[int] = []
        encoded: list[int] = []
        for d, own in types.items():
            number, trained = self.changing.get(d, 0), self.trained.get(d, 0)
            if fragments and own == torch.float32:
                (plain if format == FP32 else encoded).extend(self.fragment_bytes(format, fragments))
                number -= trained
            elif _format(format, own) != FP32:
                encoded.append(FORMATS[format].num_bytes(trained))
                number -= trained
            plain.append(number * own.itemsize)
        return [n for n in plain if n], [n for n in encoded if n]

    def fragment_bytes(self, format: str, fragments: int) -> list[int]:
        """Return the bytes of each fragment of what trains in single precision; none for 0 fragments."""
        return fragment_bytes(format, self.trained.get(torch.float32, 0), fragments) if fragments else []

    @property
    def buffers(self) -> int:
        """Bytes of float buffers."""
        return self.num_bytes - self.parameters


@dataclass(frozen=True)
class StateSizes:
    """Size of the optimizer's state, see `resist.cost.states`.

    Attributes:
        flat: For each state that is laid out as the weights, its dtype by dtype of the weights.
        kinds: For each of them, its kind; see `resist.sync.state_formats`.
        loose_shared: Bytes of all other state of the shared part.
        loose_blocks: The same of a block of each chain; empty: none.
    """

    flat: tuple[Mapping[torch.dtype, torch.dtype], ...] = ()
    loose_shared: int = 0
    loose_blocks: tuple[int, ...] = ()
    kinds: tuple[str, ...] = ()

    def formats(self, wire: str) -> list[tuple[str, Mapping[torch.dtype, torch.dtype]]]:
        """List the format and the dtypes of each state, for the wire format of states."""
        return [(format_of(kind, wire), types) for kind, types in zip(self.kinds, self.flat, strict=True)]


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

    def block_bytes(self, wire: Wire) -> tuple[int, ...]:
        """Return the bytes of one block of each chain on the wire."""
        return tuple(block.block_bytes(wire.blocks) for block in self.blocks)

    def whole(self) -> Part:
        """Return the full network as one part."""
        parts = [self.shared]
        for chain, block in zip(self.chains, self.blocks, strict=True):
            parts += [block] * chain.num_blocks
        numel, changing, trained = Counter[torch.dtype](), Counter[torch.dtype](), Counter[torch.dtype]()
        for part in parts:
            numel.update(part.numel)
            changing.update(part.changing)
            trained.update(part.trained)
        return Part(numel, changing, trained, sum(p.parameters for p in parts), sum(p.trainable for p in parts))


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
        trained={dtype: layout.num_trained for dtype, layout in layouts.items()},
        parameters=sum(p.nbytes for p in parameters),
        trainable=sum(p.nbytes for p in parameters if p.requires_grad),
    )


def _format(format: str, own: torch.dtype) -> str:
    """The wire format of values of a dtype: only single precision is encoded."""
    return format if own == torch.float32 else FP32
