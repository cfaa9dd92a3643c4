"""Tensors of a network by name."""

from torch import Tensor, nn

from resist.blocks.modules import is_float


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect all parameters and buffers, those of integers too.

    Args:
        model: Any network.

    Returns:
        Tensors by dotted name, tied ones once.
    """
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect all parameters and float buffers.

    Args:
        model: Any network.

    Returns:
        Tensors by dotted name, tied ones once.
    """
    buffers = {name: buffer for name, buffer in model.named_buffers() if is_float(buffer)}
    return {**dict(model.named_parameters()), **buffers}
