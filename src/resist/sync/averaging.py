"""Averaging: each weight becomes its mean over its holders, followed by the optional outer step."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from resist.planning.strategy import OuterSGD
from resist.subnet.layout import Place
from resist.subnet.network import Subnet

# Names of the payloads that are not optimizer states (those have the names that the optimizer gives them): the
# weights, the momentum of an outer optimizer, and an average of the weights over time.
WEIGHTS, VELOCITY, AVERAGE = "weights", "outer velocity", "average of weights"


def averaged_ranges(subnet: Subnet) -> list[Tensor]:
    """List what is averaged: weights that train, and buffers that change, as ranges of the flat tensors."""
    return [
        subnet.flats[dtype][start:end]
        for dtype, layout in subnet.layouts.items()
        for start, end in layout.ranges(subnet.changing, blocks=True)
    ]


def first_nonfinite(subnet: Subnet) -> str | None:
    """Look for NaN and inf in what is averaged. Waits for the device, once for each tensor.

    Args:
        subnet: A sub-network.

    Returns:
        The global dotted name of the first tensor that has one, or None.
    """
    for dtype, layout in subnet.layouts.items():
        parts: list[tuple[int | None, int]] = [(None, 0)]
        parts += [(chain, slot) for chain, capacity in enumerate(layout.capacities) for slot in range(capacity)]
        for chain, slot in parts:
            for piece in layout.part(chain).pieces:
                place = Place(chain, slot, piece)
                averaged = piece not in layout.part(chain).resting or place.key in subnet.changing
                if averaged and not all_finite(layout.view(place, subnet.flats[dtype])):
                    return layout.full_name(place, subnet.held)
    return None


def all_finite(*tensors: Tensor) -> bool:
    """Check tensors for NaN and inf. Waits for the device, once for each dtype; twice if a sum is not finite.

    Args:
        tensors: Tensors of any shapes.

    Returns:
        True if they have neither.
    """
    parts: list[Tensor] = []
    for tensor in tensors:
        if tensor.is_complex():
            tensor = torch.view_as_real(tensor)
        if tensor.numel() and tensor.is_floating_point():
            parts.append(tensor.float() if tensor.element_size() == 1 else tensor)  # float8 has no order
    # A sum is never finite if a number is not. If it is not, that may be an overflow: the bounds decide. Both take a
    # tenth of the time of a norm, and the sum half that of the bounds.
    return _are_finite([[part.sum()] for part in parts]) or _are_finite([torch.aminmax(part) for part in parts])


def _are_finite(limits: Sequence[Sequence[Tensor]]) -> bool:
    """Check numbers. Waits for the device, once for each dtype."""
    numbers: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for own in limits:
        numbers[own[0].dtype] += own
    return all(bool(torch.stack(own).isfinite().all()) for own in numbers.values())


@torch.no_grad()
def mean_into(first: Tensor, others: Sequence[Tensor], scale: float = 1.0) -> None:
    """Replace `first` by the mean of itself and `others`, in place.

    A running mean, m += (x - m) / k, which needs no additional memory but for dtypes of fewer than 32 bits: their mean
    is taken in float32 and rounded once. The mean of any number of equal tensors has their bits. Integers stay those of
    `first`.

    Args:
        first: The first tensor, and the result.
        others: Tensors of the same shape.
        scale: Factor of the mean.
    """
    if not (first.is_floating_point() or first.is_complex()):
        return
    if is_short(first.dtype):
        first.copy_(total([first, *others]).mul_(scale / (len(others) + 1)))
        return
    for count, tensor in enumerate(others, start=2):
        first.lerp_(tensor, 1 / count)
    if scale != 1.0:
        first.mul_(scale)


def total(tensors: Sequence[Tensor]) -> Tensor:
    """Sum tensors of fewer than 32 bits in float32."""
    (first, *others) = tensors
    wide = first.float()
    for tensor in others:
        wide += tensor.float() if tensor.element_size() == 1 else tensor  # torch does not add float8 to others
    return wide


def is_short(dtype: torch.dtype) -> bool:
    """Check for a floating-point dtype of fewer than 32 bits.

    Its means are taken in float32 and rounded once.
    """
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
    if is_short(weights.dtype):
        # In float32, and rounded once.
        wide = weights.float(), velocity.float()
        outer_step(wide[0], anchor.float(), wide[1], outer)
        weights.copy_(wide[0])
        velocity.copy_(wide[1])
        return
    gradient = anchor - weights
    velocity.mul_(outer.momentum).add_(gradient)
    gradient.add_(velocity, alpha=outer.momentum)
    torch.sub(anchor, gradient, alpha=outer.lr, out=weights)
