"""Changes: frozen parameters and buffers that changed in a round, which only then have to be averaged.

Parameters that train are averaged in every round. Of the rest (frozen weights, tables, running statistics) most never
change, or change in some workers only; equal copies are left alone, so that they keep their bits.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from resist.subnet.flats import PlaceKey
from resist.subnet.network import Subnet
from resist.subnet.pieces import Layout

Run = tuple[torch.dtype, int | None, tuple[str, ...]]  # dtype, chain, and names of tensors that follow each other
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
        versions, now = _versions(self._subnet), _sums(self._subnet)
        changed = {key for key, version in versions.items() if self._versions.get(key) != version}
        compared = {run: old for run, old in self._sums.items() if run in now and old.shape == now[run].shape}
        if compared:
            different = torch.cat([(now[run] != before).any(0) for run, before in compared.items()])
            keys = ((chain, name) for _, chain, names in compared for name in names)
            values = cast(list[bool], different.tolist())  # pyright: ignore[reportUnknownMemberType]
            changed |= {key for key, value in zip(keys, values, strict=True) if value}
        return changed | {(chain, name) for _, chain, names in now.keys() - compared.keys() for name in names}


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


@torch.no_grad()
def _sums(subnet: Subnet) -> dict[Run, Tensor]:
    """Sums of the bits of what does not train and is not known to change, of all slots of a chain at once.

    Returns:
        Run -> (slots, tensors of the run) int64, modulo 2^64.
    """
    sums: dict[Run, Tensor] = {}
    for dtype, layout in subnet.layouts.items() if subnet.device.type != "meta" else ():
        for chain in (None, *range(len(layout.chains))):
            part = layout.part(chain)
            for names in _runs(part, [name for name in part.resting if (chain, name) not in subnet.changing]):
                first, numel = part.pieces[names[0]].offset, part.pieces[names[0]].shape.numel()
                slots = layout.slots(chain, subnet.flats[dtype])[:, first : first + len(names) * numel]
                bits = slots.view(_INTEGERS[slots.element_size()])
                apart = bits.view(len(bits), len(names), bits.shape[1] // len(names))
                sums[dtype, chain, names] = apart.sum(2, dtype=torch.int64)
    return sums


def _runs(part: Layout, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Group tensors of equal size that follow each other in their part."""
    runs: list[list[str]] = []
    expected = -1, 0
    for name in names:
        start, numel = part.pieces[name].offset, part.pieces[name].shape.numel()
        if (start, numel) == expected:
            runs[-1].append(name)
        elif numel:
            runs.append([name])
        expected = start + numel, numel
    return [tuple(run) for run in runs]


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
