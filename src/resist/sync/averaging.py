"""Averaging: each weight becomes its mean over its holders, followed by the optional outer step."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from resist.planning.strategy import OuterSGD

# Names of the payloads that are not optimizer states (those have the names that the optimizer gives them): the
# weights, the momentum of an outer optimizer, and an average of the weights over time.
WEIGHTS, VELOCITY, AVERAGE = "weights", "outer velocity", "average of weights"


def all_finite(flat: Tensor) -> bool:
    """Check a tensor for NaN and inf. Waits for the device.

    Args:
        flat: A tensor of any shape.

    Returns:
        True if it has neither.
    """
    if flat.numel() == 0:
        return True
    norm = cast(Tensor, torch.linalg.vector_norm(flat, ord=torch.inf))  # pyright: ignore[reportUnknownMemberType]
    return bool(torch.isfinite(norm))


@torch.no_grad()
def mean_into(first: Tensor, others: Sequence[Tensor]) -> None:
    """Replace `first` by the mean of itself and `others`, in place.

    A running mean, m += (x - m) / k, which needs no additional memory but for dtypes of fewer than 32 bits: their mean
    is taken in float32 and rounded once. The mean of any number of equal tensors has their bits. Integers stay those of
    `first`.

    Args:
        first: The first tensor, and the result.
        others: Tensors of the same shape.
    """
    if not others or not (first.is_floating_point() or first.is_complex()):
        return
    mean = first.float() if is_short(first.dtype) else first
    for count, tensor in enumerate(others, start=2):
        mean.lerp_(tensor.to(mean.dtype), 1 / count)
    if mean is not first:
        first.copy_(mean)


def is_short(dtype: torch.dtype) -> bool:
    """Check for a floating-point dtype of fewer than 32 bits, which is averaged in float32 and rounded once."""
    return dtype.is_floating_point and dtype.itemsize < 4


@torch.no_grad()
def outer_step(weights: Tensor, anchor: Tensor, velocity: Tensor, outer: OuterSGD) -> None:
    """Take a Nesterov step along the mean change of a round.

    The update rule is that of `torch.optim.SGD` with `nesterov=True`, for the gradient `anchor - weights`
    (Douillard et al., 2023).

    Args:
        weights: Before: the mean over holders at the end of the round. After: the weights that begin the next round.
        anchor: The weights at the beginning of the round, of the same shape.
        velocity: The outer momentum, of the same shape; updated in place.
        outer: Learning rate and momentum.
    """
    gradient = anchor - weights
    velocity.mul_(outer.momentum).add_(gradient)
    gradient.add_(velocity, alpha=outer.momentum)
    torch.sub(anchor, gradient, alpha=outer.lr, out=weights)
