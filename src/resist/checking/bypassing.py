"""References of the laws: a network with blocks bypassed, and one whose blocks are computed out of place."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from resist.blocks.rehearsal import snapshot
from resist.blocks.streams import (
    Call,
    Path,
    Stream,
    default_source,
    default_target,
    hidden_in,
    hidden_out,
    tensors_at,
    with_hidden,
)

# What a bypassed block returns beside its hidden state: what it computes, the tensors that it gets, or zeros. A network
# may pass it on, or add it up, so that one of them is the same as if the block were not there.
AUXILIARY = ("computed", "passed", "zero")


def bypass(block: nn.Module, stream: Stream | None, auxiliary: str = "computed", *, outside: bool = False) -> None:
    """Make a block return its hidden state as it was.

    Args:
        block: The block, changed in place.
        stream: Places of its hidden state; None for the default ones.
        auxiliary: One of `AUXILIARY`.
        outside: The network adds what the block returns to the hidden state; so it returns zero.
    """

    def compute(x: Tensor, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, target: Path) -> Any:
        output = with_hidden(output, torch.zeros_like(y) if outside else x.to(y.dtype), target)
        if auxiliary == "computed":
            return output
        unused = [tensor for _, tensor in tensors_at((args, kwargs)) if tensor is not x]
        for path, tensor in tensors_at(output):
            if path == target:
                continue
            fits = [i for i, other in enumerate(unused) if (other.shape, other.dtype) == (tensor.shape, tensor.dtype)]
            if auxiliary == "passed" and fits:
                output = with_hidden(output, unused.pop(fits[0]), path)
            elif auxiliary == "zero" and tensor.is_floating_point():
                output = with_hidden(output, torch.zeros_like(tensor), path)
        return output

    # As if the block were not there: what it would write into a list or a cache does not show either.
    _wrap(block, stream, compute, outside, copy=_copied if auxiliary == "computed" else _copied_whole)


def compute_out_of_place(block: nn.Module, stream: Stream | None, scale: float, *, outside: bool = False) -> None:
    """Make a block return x + scale * (block(x) - x), computed without writing into x.

    Args:
        block: The block, changed in place.
        stream: Places of its hidden state; None for the default ones.
        scale: Factor of the branch.
        outside: The network adds what the block returns to the hidden state; so it returns scale * block(x).
    """

    def compute(x: Tensor, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, target: Path) -> Any:
        if scale == 1.0:
            return output
        return with_hidden(output, y * scale if outside else torch.lerp(x.to(y.dtype), y, scale), target)

    _wrap(block, stream, compute, outside)


def _wrap(
    block: nn.Module,
    stream: Stream | None,
    compute: Callable[..., Any],
    outside: bool,
    copy: Callable[[Any], Any] | None = None,
) -> None:
    copy = copy or _copied
    forward = block.forward

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        source = default_source(args, kwargs) if stream is None else stream.source
        copies = tuple(map(copy, args)), {name: copy(value) for name, value in kwargs.items()}
        output = forward(*copies[0], **copies[1])
        target = default_target(output) if stream is None else stream.target
        x, y = hidden_in(args, kwargs, source), hidden_out(output, target)
        if y is None or target is None or not (outside or (x is not None and x.shape == y.shape)):
            raise TypeError(f"a {type(block).__name__} does not return a tensor of the shape that it takes")
        return compute(y if x is None else x, y, args, kwargs, output, target)

    block.forward = wrapped


def _copied(value: Any) -> Any:
    """A copy of a tensor, or of a tuple of tensors; lists, dicts and objects may be written to on purpose."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) is tuple:
        return tuple(map(_copied, cast(tuple[Any, ...], value)))
    return value


def _copied_whole(value: Any) -> Any:
    return snapshot(Call((value,))).args[0]
