"""Buffers of a sub-network: those in the flat tensors, and loose ones, which are not.

A float buffer is a view into a flat tensor, as a parameter is. A forward pass may write to it in place, or assign
another tensor: `take_back` copies an assigned tensor into the view. Loose are buffers of integers, float buffers that
were not finite in the beginning (a causal mask, the range of an observer), and buffers that have another shape or dtype
than in the beginning (a cache that grows).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resist.blocks.modules import BatchNorm, buffers_of
from resist.subnet.layout import Place

Part = tuple[int | None, int]  # chain and slot; None and 0 for the shared part


@dataclass(frozen=True)
class Buffer:
    """One buffer of a sub-network.

    Attributes:
        module: The module that has it.
        key: Its name there.
        place: Its place.
        view: The view into the flat tensor of its dtype; None for a buffer that has none.
        late: True if it was registered in training.
    """

    module: nn.Module
    key: str
    place: Place
    view: Tensor | None
    late: bool = False

    @property
    def now(self) -> Tensor | None:
        """The present tensor of the module."""
        return buffers_of(self.module).get(self.key)

    @property
    def is_loose(self) -> bool:
        """True if the present tensor is not in a flat tensor, and its value matters."""
        now = self.now
        if now is None or (self.view is not None and _fits(now, self.view)):
            return False
        # Without effect: a BatchNorm with a momentum only counts its batches.
        counts = self.key == "num_batches_tracked" and isinstance(self.module, BatchNorm)
        return not (counts and self.module.momentum is not None)


@torch.no_grad()
def take_back(buffers: Mapping[Place, Buffer]) -> None:
    """Copy buffers that were assigned into their views, and give the modules the views again.

    Args:
        buffers: The buffers of a sub-network.
    """
    for buffer in buffers.values():
        now = buffer.now
        if buffer.view is not None and now is not None and now is not buffer.view and _fits(now, buffer.view):
            buffer.view.copy_(now.detach())
            buffers_of(buffer.module)[buffer.key] = buffer.view


def loose(buffers: Mapping[Place, Buffer]) -> dict[Part, dict[str, Tensor]]:
    """Collect the loose buffers.

    Args:
        buffers: The buffers of a sub-network.

    Returns:
        (chain, slot), or (None, 0) for the shared part -> name in the part -> the present tensor, not a copy.
    """
    found: dict[Part, dict[str, Tensor]] = {}
    for place, buffer in buffers.items():
        if buffer.is_loose:
            now = buffer.now
            assert now is not None
            found.setdefault((place.chain, place.slot), {})[place.piece] = now
    return found


@torch.no_grad()
def put_loose(buffers: Mapping[Place, Buffer], part: Part, values: Mapping[str, Tensor]) -> None:
    """Give a part the loose buffers of the block that is now there.

    Buffers of the part that are not in `values` return to their views, or stay as they are if they have none; those
    that were registered in training are removed.

    Args:
        buffers: The buffers of a sub-network.
        part: (chain, slot), or (None, 0) for the shared part.
        values: Tensors by name in the part, on any device. They are copied.
    """
    for buffer in _of_part(buffers, part):
        value, now = values.get(buffer.place.piece), buffer.now
        if value is None:
            if buffer.late:
                buffers_of(buffer.module).pop(buffer.key, None)
            elif buffer.view is not None and now is not None:
                buffers_of(buffer.module)[buffer.key] = buffer.view
        elif now is not None and now is not buffer.view and _fits(value, now):
            now.copy_(value)  # in place, since other parts of the module may refer to it
        else:
            like = buffer.view if buffer.view is not None else now
            device = value.device if like is None else like.device
            buffers_of(buffer.module)[buffer.key] = value.detach().to(device, copy=True)


def _of_part(buffers: Mapping[Place, Buffer], part: Part) -> Iterator[Buffer]:
    return (buffer for place, buffer in buffers.items() if (place.chain, place.slot) == part)


def _fits(tensor: Tensor, view: Tensor) -> bool:
    return tensor.shape == view.shape and tensor.dtype == view.dtype
