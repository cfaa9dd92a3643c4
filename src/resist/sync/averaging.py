"""Averaging: each weight becomes its mean over its holders, and the outer step on that mean."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resist.planning.strategy import OuterSGD

# What goes from worker to worker beside the states of the optimizer, which have names of their own: the weights, an
# outer optimizer's momentum, and an average of the weights over time.
WEIGHTS, VELOCITY, AVERAGE = "weights", "outer velocity", "average of weights"


def all_finite(flat: Tensor) -> bool:
    """Whether a tensor holds numbers only, no infinity and no nan. Waits for the device."""
    return flat.numel() == 0 or bool(torch.isfinite(torch.linalg.vector_norm(flat, ord=torch.inf)))


@torch.no_grad()
def mean_into(first: Tensor, others: Sequence[Tensor]) -> None:
    """Replace `first` by the mean of itself and `others` (all of one shape), in place and without further memory.

    A running mean: m += (x - m) / k. It gives equal copies back bit for bit, for any number of them.
    """
    for count, other in enumerate(others, start=2):
        first.lerp_(other, 1 / count)


@torch.no_grad()
def outer_step(weights: Tensor, anchor: Tensor, velocity: Tensor, outer: OuterSGD) -> None:
    """Nesterov's step from `anchor` along the change to `weights`, as `torch.optim.SGD` takes it.

    weights:  in: the mean over holders at the end of the round; out: what the next round begins with.
    anchor:   the weights at the round's beginning; velocity: the outer momentum, updated in place. All of one shape.
    """
    gradient = anchor - weights
    velocity.mul_(outer.momentum).add_(gradient)
    gradient.add_(velocity, alpha=outer.momentum)
    torch.sub(anchor, gradient, alpha=outer.lr, out=weights)
