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

from resist.blocks.rehearsal import describe, snapshot
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
    if len(tries) > 1:
        found = [skip for skip in found if not _passes_on(trial, call, skip)]
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
            if _close(_at(output, target), x):
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
    if _close(once, x):
        return PLAIN
    if x.is_complex():
        return NONE
    if _close(apply(x.abs()), x.abs()):
        return RELU
    correlation = torch.corrcoef(torch.stack((once.flatten(), x.flatten())).float())[0, 1]
    return NORM if correlation > 0.8 and _close(apply(once), once, 1e-2) else NONE


def _close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    if left.is_complex():
        left, right = torch.view_as_real(left.to(torch.cfloat)), torch.view_as_real(right.to(torch.cfloat))
    return torch.allclose(left.float(), right.float(), rtol=tolerance, atol=tolerance)


def output_of(block: nn.Module, call: Call | None = None) -> tuple[Call, object] | None:
    """Run a copy of a block.

    Args:
        block: A block on any device, meta included. It is not changed.
        call: Arguments of a real call. Default: inputs are guessed from the shapes of the weights.

    Returns:
        The call, and the block's output; None if the block accepts none of the inputs.
    """
    with alone():
        try:
            trial = copy_on_cpu(block)
            fill(trial, gain=1.0)
        except Exception:  # see skip_of
            return None
        for attempt in [call] if call is not None else guesses(trial):
            try:
                copied = snapshot(attempt)
                return copied, trial(*copied.args, **copied.kwargs)
            except Exception:  # see skip_of
                continue
    return None


def failure_of(block: nn.Module, call: Call) -> str:
    """Describe why a copy of a block cannot be run.

    Args:
        block: A block on any device, meta included. It is not changed.
        call: Arguments of a real call.

    Returns:
        Class and text of the exception; "" if it can be run.
    """
    with alone():
        try:
            trial, copied = copy_on_cpu(block), snapshot(call)
            fill(trial, gain=0.0)
            trial(*copied.args, **copied.kwargs)
        except Exception as error:  # see skip_of
            return describe(error)
    return ""


def returns_input(block: nn.Module, call: Call | None = None) -> bool:
    """Check that a block returns its input if all its weights are zero, gains included.

    Args:
        block: A block on any device, meta included. It is not changed.
        call: Arguments of a real call. Default: inputs are guessed from the shapes of the weights.

    Returns:
        True if it does.
    """
    return _response(block, call) == (True, "")


def reason_without_skip(block: nn.Module, call: Call | None = None) -> str:
    """Explain why a block that can be run is not residual.

    Args:
        block: A block on any device, meta included. It is not changed.
        call: Arguments of a real call. Default: inputs are guessed from the shapes of the weights.

    Returns:
        A part of a sentence, what the block returns with all its weights zero.
    """
    return _response(block, call)[1]


def _response(block: nn.Module, call: Call | None) -> tuple[bool, str]:
    """True if a block with all weights zero returns its input; else what it returns."""
    with alone():
        try:
            trial = copy_on_cpu(block)
        except Exception:  # see skip_of
            return False, "a block cannot be copied"
        fill(trial, gain=0.0)
        for attempt in [call] if call is not None else guesses(trial):
            like = hidden_in(attempt.args, attempt.kwargs)
            if like is None or not like.is_floating_point():
                continue
            x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)
            try:
                with_value = snapshot(attempt).with_input(x.clone())
                output = hidden_out(trial(*with_value.args, **with_value.kwargs))
            except Exception:  # see skip_of
                continue
            if output is not None:
                same = output.shape == x.shape and _close(output, x)
                return same, "" if same else _returned(x, output)
    return False, "a block could not be run outside the network"


def _returned(x: Tensor, output: Tensor) -> str:
    zero = "with all its weights zero a block"
    if output.shape != x.shape:
        return f"a block returns another shape ({tuple(output.shape)}) than it takes ({tuple(x.shape)})"
    ratio = float((output * x).sum() / (x * x).sum())
    if _close(output, ratio * x, 1e-3) and abs(ratio) > 1e-3:
        return f"{zero} returns {ratio:.3g} times its input: a skip connection with a factor or a gate"
    if _close(output, torch.zeros_like(output)):
        return f"{zero} returns zero"
    return f"{zero} does not return its input"
