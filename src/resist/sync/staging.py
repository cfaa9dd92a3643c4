"""Memory of the host for messages of gloo, which sends and receives there only."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGN_BYTES = 64


def is_sendable(tensor: Tensor) -> bool:
    """Return True for a tensor that gloo sends from its own memory."""
    return tensor.device.type == "cpu"


def is_summable(tensor: Tensor) -> bool:
    """Return True for a tensor that gloo sums where it is; it stages those of CUDA itself."""
    return tensor.device.type in ("cpu", "cuda")


def stage(outgoing: Sequence[Tensor], incoming: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Copy tensors to the host in one go, and make room there for others. Waits for the device.

    All of them share one buffer, which is pinned for CUDA, so that copies run side by side. A tensor that goes to
    several processes is copied once.

    Args:
        outgoing: Tensors to send, contiguous.
        incoming: Tensors to receive, contiguous.

    Returns:
        The tensors to send and to receive instead of them; those of the host are returned themselves.
    """
    apart = {_key(tensor): tensor for tensor in outgoing if not is_sendable(tensor)}
    received = [tensor for tensor in incoming if not is_sendable(tensor)]
    staged = [*apart.values(), *received]
    if not staged:
        return list(outgoing), list(incoming)
    device = staged[0].device
    room = _room(staged, pinned=device.type == "cuda")
    copies = dict(zip(apart, room, strict=False))
    for key, wire in copies.items():
        wire.copy_(apart[key], non_blocking=True)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the only wait
    rest = iter(room[len(copies) :])
    return (
        [tensor if is_sendable(tensor) else copies[_key(tensor)] for tensor in outgoing],
        [tensor if is_sendable(tensor) else next(rest) for tensor in incoming],
    )


def _key(tensor: Tensor) -> tuple[int, int, torch.dtype]:
    return tensor.data_ptr(), tensor.numel(), tensor.dtype


def _room(tensors: Sequence[Tensor], *, pinned: bool) -> list[Tensor]:
    """Tensors of the same shapes and dtypes on the host, in one buffer."""
    starts = [0]
    for tensor in tensors:
        starts.append(starts[-1] + -(-tensor.nbytes // ALIGN_BYTES) * ALIGN_BYTES)
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=pinned)
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, starts, strict=False)
    ]
