"""Detect residual blocks: zero the weights and compare output with input.

With zero weights, a block x + f(x) returns x. A block that ends in a ReLU, relu(x + f(x)), returns x if x is not
negative. A block that ends in a norm, norm(x + f(x)), returns a normalized x, and applied twice it returns the same. A
block without a skip connection returns a constant. The test runs a copy of the block, so it needs no list of
architectures. The input is given by the caller, or guessed from the shapes of the weights.

The types of skip connections are `PLAIN`, `RELU` and `NORM` as above, `OUTSIDE` (the network adds the output of the
block to the hidden state, see `resist.blocks.outside`), `NONE`, `SHAPE` (the shapes of output and input differ) and
`UNKNOWN` (the block could not be run).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

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
from resist.blocks.zeroing import alone, copy_on_cpu, fill, guesses

__all__ = ["Call", "Skip", "Stream", "find_skip", "hidden_in", "hidden_out", "skip_of", "with_hidden"]

PLAIN, RELU, NORM, NONE, SHAPE, UNKNOWN = "plain", "relu", "norm", "none", "shape", "unknown"
OUTSIDE = "outside"
RESIDUAL = (PLAIN, RELU, NORM)


@dataclass(frozen=True)
class Skip:
    """The skip connection of a block.

    Attributes:
        type: One of `PLAIN`, `RELU`, `NORM`, `NONE`, `SHAPE`, `UNKNOWN`.
        stream: Places of the hidden state, if it has one.
        others: Places of further tensors that the block adds to.
    """

    type: str
    stream: Stream | None = None
    others: tuple[Stream, ...] = ()


def skip_of(block: nn.Module, call: Call | None = None) -> str:
    """Detect the type of a block's skip connection.

    Args:
        block: A block on any device, meta included. It is not changed.
        call: Arguments of a real call. Default: inputs are guessed from the shapes of the weights.

    Returns:
        One of `PLAIN`, `RELU`, `NORM`, `NONE`, `SHAPE`; `UNKNOWN` if the block accepts none of the inputs.
    """
    return find_skip(block, call).type


def find_skip(block: nn.Module, call: Call | None = None) -> Skip:
    """Detect the type and the place of a block's skip connection.

    Args:
        block: A block on any device, meta included. It is not changed.
        call: Arguments of a real call. All tensors among them are tried, the default place of the hidden state first.
            Default: inputs are guessed from the shapes of the weights.

    Returns:
        The skip connection.
    """
    with alone():
        try:
            trial = copy_on_cpu(block)
        except Exception:  # blocks of users can raise anything; one that cannot be copied may still be residual
            return Skip(UNKNOWN)
        if call is not None:
            return _find(trial, call)
        for guess in guesses(trial):
            skip = _try(trial, guess, (0,))
            if skip.type != UNKNOWN:
                return skip
    return Skip(UNKNOWN)


def _find(trial: nn.Module, call: Call) -> Skip:
    """Skip connection by a real call."""
    default = default_source(call.args, call.kwargs)
    sources = [path for path, _ in (*tensors_at(call.args), *tensors_at(dict(call.kwargs)))]
    sources.sort(key=lambda path: path != default)
    tries = {source: _try(trial, call, source) for source in sources[:1]}
    tries |= {source: _try(trial, call, source) for source in sources[1:] if _tensor(call, source).dim() > 1}
    found = [skip for skip in tries.values() if skip.type in RESIDUAL]
    opened = _opened(call)
    if len(tries) > 1 or opened is not None:
        passed, found = found, [skip for skip in found if not _passes_on(trial, call, skip)]
        if passed and not found and opened is not None:
            return _find(trial, opened)
    if not found:
        return next((Skip(skip.type if skip.type not in RESIDUAL else NONE) for skip in tries.values()), Skip(UNKNOWN))
    main = found[0].stream
    assert main is not None, "a residual block has a stream"
    # A state of which a block overwrites a part looks like a norm: close to what it was, and the same if applied twice.
    like_main = [skip.stream for skip in found[1:] if skip.type == found[0].type]
    others = [stream for stream in like_main if stream is not None and stream.target != main.target]
    return Skip(found[0].type, main, tuple(others))


def _tensor(call: Call, source: Path) -> Tensor:
    tensor = hidden_in(call.args, call.kwargs, source)
    assert tensor is not None, "the place is one of a tensor"
    return tensor


def _passes_on(trial: nn.Module, call: Call, skip: Skip) -> bool:
    """True if the block returns a tensor as it is, whatever its weights: a mask that it passes on, for example."""
    assert skip.stream is not None, "a residual block has a stream"
    generator = torch.Generator().manual_seed(0)
    for parameter in trial.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    copied = snapshot(call)
    before = _tensor(snapshot(call), skip.stream.source)
    try:
        return torch.equal(_at(trial(*copied.args, **copied.kwargs), skip.stream.target), before)
    except Exception:  # see find_skip
        return False


def _opened(call: Call) -> Call | None:
    """The call with ones in place of tensors of zeros, such as a gate or a mask; None if there are none."""
    closed = [path for path, tensor in tensors_at((call.args, dict(call.kwargs))) if _is_zero(tensor)]
    return Call(*tree_map(_ones_for_zeros, (call.args, dict(call.kwargs)))) if closed else None


def _ones_for_zeros(leaf: object) -> object:
    return torch.ones_like(leaf) if isinstance(leaf, Tensor) and _is_zero(leaf) else leaf


def _is_zero(tensor: Tensor) -> bool:
    gate = tensor.is_floating_point() or tensor.dtype == torch.bool
    return gate and tensor.numel() > 0 and not bool(tensor.any())


def _try(trial: nn.Module, call: Call, source: Path) -> Skip:
    """Skip connection from one tensor of a call; `UNKNOWN` if the call fails."""
    like = hidden_in(call.args, call.kwargs, source)
    if like is None or not (like.is_floating_point() or like.is_complex()) or like.dim() == 0:
        return Skip(UNKNOWN)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    for axis in (1 % x.dim(), -1):  # give the channels different means, on either axis: a norm then changes the input
        shape = [1] * x.dim()
        shape[axis] = x.shape[axis]
        x = x + 0.3 * torch.randn(shape, generator=generator)
    x = x.to(like.dtype)

    def run(value: Tensor) -> Any:
        with_value = snapshot(call).with_input(value.clone(), source)
        return trial(*with_value.args, **with_value.kwargs)

    try:
        # All weights zero, gains included. A norm at the end then returns zero.
        fill(trial, gain=0.0)
        output = run(x)
        default = default_target(output)
        places = [path for path, tensor in tensors_at(output) if tensor.shape == x.shape and tensor.dtype == x.dtype]
        if default is None and not places:
            return Skip(UNKNOWN)
        if not places:
            return Skip(SHAPE)
        places.sort(key=lambda path: path != default)
        for target in places:
            if close(_at(output, target), x):
                return Skip(PLAIN, Stream(source, target))
        # Gains of one let a norm at the end pass its input on. Buffers can be weights too, as in a frozen BatchNorm.
        for with_buffers in (False, True):
            if not fill(trial, gain=1.0, with_buffers=with_buffers):
                continue
            for target in places:
                skip_type = _type_with_gains(lambda value, target=target: _at(run(value), target), x)
                if skip_type in RESIDUAL:
                    return Skip(skip_type, Stream(source, target))
    except Exception:  # see find_skip
        return Skip(UNKNOWN)
    return Skip(NONE)


def _at(output: object, target: Path) -> Tensor:
    hidden = hidden_out(output, target)
    assert hidden is not None, "the block returns the same form each time"
    return hidden


def _type_with_gains(apply: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """Skip type of a block with zero matrices and gains of one."""
    once = apply(x)
    if close(once, x):
        return PLAIN
    if x.is_complex():
        return NONE
    if close(apply(x.abs()), x.abs()):
        return RELU
    correlation = torch.corrcoef(torch.stack((once.flatten(), x.flatten())).float())[0, 1]
    return NORM if correlation > 0.8 and close(apply(once), once, 1e-2) else NONE


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    """Check that two tensors of the same shape are equal up to rounding."""
    if left.is_complex():
        left, right = torch.view_as_real(left.to(torch.cfloat)), torch.view_as_real(right.to(torch.cfloat))
    return torch.allclose(left.float(), right.float(), rtol=tolerance, atol=tolerance)
