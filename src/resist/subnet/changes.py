"""Changes: frozen parameters and buffers that changed in a round, which only then have to be averaged.

Parameters that train are averaged in every round. Of the rest (frozen weights, tables, running statistics) most never
change, or change in some workers only; equal copies are left alone, so that they keep their bits.
"""

from collections.abc import Iterable, Iterator
from typing import cast

import torch
from torch import Tensor

from resist.subnet.flats import PlaceKey
from resist.subnet.layout import Place
from resist.subnet.network import Subnet

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


class Watch:
    """The state of a sub-network at the beginning of a round, to find what has changed at its end.

    A tensor has changed if it was written to (its version counter has moved), if the sum of its bits is another, or if
    it trains now. BatchNorm writes its statistics past the version counter; code that writes to `.data` does so too.

    Args:
        subnet: The sub-network. Nothing is copied.
    """

    def __init__(self, subnet: Subnet) -> None:
        self._subnet = subnet
        self._sums = _sums(subnet)
        self._versions = _versions(subnet)

    def changed(self) -> set[PlaceKey]:
        """Find what has changed since, besides the tensors of `Subnet.changing`. Waits for the device.

        Returns:
            `Place.key` of each.
        """
        now, versions = _sums(self._subnet), _versions(self._subnet)
        changed = {place.key for place, value in now.items() if self._sums.get(place) != value}
        return changed | {key for key, version in versions.items() if self._versions.get(key) != version}


def resting_keys(subnet: Subnet) -> list[PlaceKey]:
    """List the tensors that do not train, in an order that is the same in all processes."""
    return [
        (chain, piece)
        for layout in subnet.layouts.values()
        for chain in (None, *range(len(subnet.chains)))
        for piece in layout.part(chain).resting
    ]


def to_text(keys: Iterable[PlaceKey], subnet: Subnet) -> str:
    """Write keys as a short text: a bit for each resting tensor."""
    number = {key: bit for bit, key in enumerate(resting_keys(subnet))}
    return format(sum(1 << number[key] for key in keys), "x")


def from_text(text: str, subnet: Subnet) -> set[PlaceKey]:
    """Read the text of `to_text`."""
    bits = int(text, 16)
    return {key for bit, key in enumerate(resting_keys(subnet)) if bits >> bit & 1}


def _watched(subnet: Subnet) -> Iterator[tuple[Place, Tensor]]:
    """The tensors that do not train and are not known to change, each as (numel,)."""
    for dtype, layout in subnet.layouts.items():
        parts: list[tuple[int | None, int]] = [(None, 0)]
        parts += [(chain, slot) for chain, capacity in enumerate(layout.capacities) for slot in range(capacity)]
        for chain, slot in parts:
            part, own = layout.part(chain), None
            for name in part.resting:
                if (chain, name) not in subnet.changing:
                    own = layout.slot(chain, slot, subnet.flats[dtype]) if own is None else own
                    piece = part.pieces[name]
                    yield Place(chain, slot, name), own[piece.offset : piece.offset + piece.shape.numel()]


@torch.no_grad()
def _sums(subnet: Subnet) -> dict[Place, int]:
    if subnet.device.type == "meta":
        return {}
    places: list[Place] = []
    sums: list[Tensor] = []
    for place, tensor in _watched(subnet):
        places.append(place)
        sums.append(tensor.view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
    if not sums:
        return {}
    values = cast(list[int], torch.stack(sums).tolist())  # pyright: ignore[reportUnknownMemberType]
    return dict(zip(places, values, strict=True))


def _versions(subnet: Subnet) -> dict[PlaceKey, tuple[int, ...]]:
    """Version counters, and the number of parameters that train now, summed over slots."""
    versions: dict[PlaceKey, tuple[int, ...]] = {}
    resting = {*resting_keys(subnet)} - subnet.changing
    if not resting:
        return {}
    for _, tensor, place, _ in subnet.placed:
        key = place.chain, place.piece
        if key in resting:
            before = versions.get(key, (0, 0))
            versions[key] = before[0] + tensor._version, before[1] + tensor.requires_grad
    for place, buffer in subnet.buffers.items():
        if place.key in resting and buffer.view is not None:
            before = versions.get(place.key, (0, 0))
            versions[place.key] = before[0] + buffer.view._version, 0
    return versions
