"""Global dotted names of what a sub-network has, for any plan."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from resist.subnet.layout import Place
from resist.subnet.network import Subnet

Held = Sequence[Sequence[int]]


def weight_places(subnet: Subnet, held: Held) -> Iterator[tuple[str, Place, torch.Size]]:
    """Iterate over the tensors that a sub-network has for `held`.

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


def other_buffers(subnet: Subnet, held: Held) -> dict[str, Tensor]:
    """Return the buffers whose values are in no flat tensor.

    Args:
        subnet: The sub-network, at the end of a round.
        held: Blocks of each chain, in the order of the slots.

    Returns:
        Buffers by global dotted name.
    """
    found: dict[str, Tensor] = {}
    for name, buffer in subnet.model.named_buffers(remove_duplicate=False):
        place = subnet.place(name)
        flat = _in_flats(subnet, place)
        if flat is None or (flat.shape, flat.dtype) != (buffer.shape, buffer.dtype):
            found[subnet.layout.full_name(place, held)] = buffer
    return found


def other_buffer_names(subnet: Subnet, held: Held) -> tuple[set[str], set[str]]:
    """Name the buffers that a sub-network has for `held`.

    Args:
        subnet: The sub-network.
        held: Blocks of each chain, in the order of the slots.

    Returns:
        The names of the buffers that have no place in a flat tensor, and those of all buffers.
    """
    without: set[str] = set()
    everything: set[str] = set()
    present = {subnet.place(name) for name, _ in subnet.model.named_buffers(remove_duplicate=False)}
    for place in present | subnet.buffers.keys():  # also those that are None
        slots = range(1 if place.chain is None else len(held[place.chain]))
        names = {subnet.layout.full_name(replace(place, slot=slot), held) for slot in slots}
        everything |= names
        without |= names if place in present and _in_flats(subnet, place) is None else set()
    return without, everything


@torch.no_grad()
def put_buffers(subnet: Subnet, held: Held, values: Mapping[str, Tensor]) -> None:
    """Give a sub-network the buffers that `other_buffers` has returned.

    Args:
        subnet: The sub-network, which holds `held`.
        held: Blocks of each chain, in the order of the slots.
        values: Buffers by global dotted name, on any device. They are copied; others stay as they are.
    """
    parts: dict[tuple[int | None, int], dict[str, Tensor]] = {}
    for place in subnet.buffers:
        name = subnet.layout.full_name(place, held)
        own = parts.setdefault((place.chain, place.slot), {})
        if name in values:
            own[place.piece] = values[name]
    for part, own in parts.items():
        subnet.put_loose(*part, own)
    for name, buffer in other_buffers(subnet, held).items():  # common ones, which no part has for itself
        if name in values and values[name].shape == buffer.shape:
            buffer.copy_(values[name])


def _in_flats(subnet: Subnet, place: Place) -> Tensor | None:
    """The view of a tensor into its flat tensor, on meta.

    None for one that has no place there.
    """
    for dtype, layout in subnet.layouts.items():
        piece = layout.part(place.chain).pieces.get(place.piece)
        if piece is not None:
            return torch.empty(piece.shape, dtype=dtype, device="meta")
    return None
