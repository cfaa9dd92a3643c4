"""Common parts: modules and buffers that several blocks of a network use, and that belong to none of them."""

import torch
from torch import Tensor, nn

from resist.blocks.modules import named_modules
from resist.subnet.layout import SubnetLayout


def common_buffers(
    template: nn.Module, layout: SubnetLayout, device: torch.device
) -> dict[tuple[int | None, str], Tensor]:
    """Copy the buffers that several parts of the network use.

    A table of rotary position embeddings is an example. Such a buffer belongs to no block, so every sub-network has a
    copy of its own outside of the flat tensors: a loose buffer of the shared part.

    Args:
        template: Network with the capacities of `layout`.
        layout: Layout that names the places of its tensors.
        device: Device of the copies. Buffers on the meta device stay there.

    Returns:
        The copies by `Place.key`, under each of their names.
    """
    buffers = list(template.named_buffers(remove_duplicate=False))
    users: dict[int, set[tuple[int | None, int]]] = {}
    for name, buffer in buffers:
        place = layout.place(name)
        users.setdefault(id(buffer), set()).add((place.chain, place.slot))
    copies = {
        id(buffer): buffer.detach().to(buffer.device if buffer.is_meta else device, copy=True)
        for _, buffer in buffers
        if len(users[id(buffer)]) > 1
    }
    return {layout.place(name).key: copies[id(buffer)] for name, buffer in buffers if id(buffer) in copies}


def common_modules(template: nn.Module, layout: SubnetLayout) -> frozenset[tuple[int | None, str]]:
    """Find the modules that several parts of the network use.

    Args:
        template: Network with the capacities of `layout`.
        layout: Layout that names the places of its tensors.

    Returns:
        `Place.key` of each, under each of their names.
    """
    keys: dict[int, set[tuple[int | None, str]]] = {}
    parts: dict[int, set[tuple[int | None, int]]] = {}
    for name, module in named_modules(template, remove_duplicate=False):
        place = layout.place(name)
        keys.setdefault(id(module), set()).add(place.key)
        parts.setdefault(id(module), set()).add((place.chain, place.slot))
    return frozenset(key for number, own in keys.items() if len(parts[number]) > 1 for key in own)
