"""Responses: what a block that is run by itself returns, and the reason why it is not residual."""

import torch
from torch import Tensor, nn

from resist.blocks.rehearsal import describe, snapshot
from resist.blocks.residual import close
from resist.blocks.streams import Call, hidden_in, hidden_out
from resist.blocks.zeroing import alone, copy_on_cpu, fill, guesses

NOT_SHOWN = (
    "with the arguments that it gets a block returns its input whatever its weights are (a gate or mask may be zero), "
    "so they do not show what it does"
)


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
        except Exception:  # see find_skip
            return None
        for attempt in [call] if call is not None else guesses(trial):
            try:
                copied = snapshot(attempt)
                return copied, trial(*copied.args, **copied.kwargs)
            except Exception:  # see find_skip
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
        except Exception as error:  # see find_skip
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
        A part of a sentence, what the block returns with all its weights zero, or `NOT_SHOWN`.
    """
    return _response(block, call)[1] or NOT_SHOWN


def _response(block: nn.Module, call: Call | None) -> tuple[bool, str]:
    """True if a block with all weights zero returns its input; else what it returns."""
    with alone():
        try:
            trial = copy_on_cpu(block)
        except Exception:  # see find_skip
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
            except Exception:  # see find_skip
                continue
            if output is not None:
                same = output.shape == x.shape and close(output, x)
                return same, "" if same else _returned(x, output)
    return False, "a block could not be run outside the network"


def _returned(x: Tensor, output: Tensor) -> str:
    zero = "with all its weights zero a block"
    if output.shape != x.shape:
        return f"a block returns another shape ({tuple(output.shape)}) than it takes ({tuple(x.shape)})"
    ratio = float((output * x).sum() / (x * x).sum())
    if close(output, ratio * x, 1e-3) and abs(ratio) > 1e-3:
        return f"{zero} returns {ratio:.3g} times its input: a skip connection with a factor or a gate"
    if close(output, torch.zeros_like(output)):
        return f"{zero} returns zero"
    return f"{zero} does not return its input"
