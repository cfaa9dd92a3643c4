"""Global dotted names of what a sub-network has, for any plan."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from resist.subnet.layout import Place
from resist.subnet.network import Subnet

Held = Sequence[Sequence[int]]


def weight_places(subnet: Subnet, held: Held) -> Iterator[tuple[str, Place, torch.Size]]:
    """Iterate over the tensors that a sub-network has when it holds certain blocks, whatever it holds now.

    Args:
        subnet: The sub-network.
        held: Blocks of each chain, in the order of the slots.

    Yields:
        Global dotted name, place and shape of each parameter and synchronized buffer.
    """
    slots = [(chain, slot) for chain, blocks in enumerate(held) for slot in range(len(blocks))]
    for layout in subnet.layouts.values():
        for chain, slot in [(None, 0), *slots]:
            for piece, position in layout.part(chain).pieces.items():
                place = Place(chain, slot, piece)
                yield layout.full_name(place, held), place, position.shape


def parameters_by_name(subnet: Subnet, held: Held) -> dict[str, nn.Parameter]:
    """Return the parameters of a sub-network by global dotted name."""
    return {subnet.layout.full_name(place, held): parameter for parameter, place in subnet.parameter_places()}


def other_buffers(subnet: Subnet, model: nn.Module, held: Held) -> dict[str, tuple[str, Tensor]]:
    """Return the buffers that are in no flat tensor: counters, indices, tables, caches that have grown.

    Args:
        subnet: The sub-network.
        model: Its model, or a copy of that.
        held: Blocks of each chain, in the order of the slots.

    Returns:
        Global dotted name -> name in `model`, and the buffer.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        place = subnet.place(name)
        if not is_in_flats(subnet, place, buffer):
            found[subnet.layout.full_name(place, held)] = (name, buffer)
    return found


def other_buffer_names(subnet: Subnet, model: nn.Module, held: Held) -> set[str]:
    """Return the names of `other_buffers` when the sub-network holds certain blocks, whatever it holds now."""
    names: set[str] = set()
    for name, buffer in model.named_buffers(remove_duplicate=False):
        place = subnet.place(name)
        if not is_in_flats(subnet, place, buffer):
            slots = range(1 if place.chain is None else len(held[place.chain]))
            names |= {subnet.layout.full_name(replace(place, slot=slot), held) for slot in slots}
    return names


def is_in_flats(subnet: Subnet, place: Place, buffer: Tensor) -> bool:
    """Check for a buffer that has a place in a flat tensor, and still its shape and dtype."""
    pieces = [layout.part(place.chain).pieces for dtype, layout in subnet.layouts.items() if dtype == buffer.dtype]
    return any(place.piece in part and part[place.piece].shape == buffer.shape for part in pieces)
