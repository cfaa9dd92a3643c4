"""Detect residual blocks: zero the weights and compare output with input.

With zero weights, a block x + f(x) returns x. A block that ends in a ReLU, relu(x + f(x)), returns x if x is not
negative. A block that ends in a norm, norm(x + f(x)), returns a normalized x, and applied twice it returns the same. A
block without a skip connection returns a constant. The test runs a copy of the block, so it needs no list of
architectures. The input is given by the caller, or guessed from the shapes of the weights.

The types of skip connections are `PLAIN`, `RELU` and `NORM` as above, `OUTSIDE` (the network adds the output of the
block to the hidden state, see `resist.subnet.outside`), `NONE`, `SHAPE` (the shapes of output and input differ) and
`UNKNOWN` (the block could not be run).
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from resist.subnet.modules import BatchNorm, fork_rng

PLAIN, RELU, NORM, NONE, SHAPE, UNKNOWN = "plain", "relu", "norm", "none", "shape", "unknown"
OUTSIDE = "outside"
RESIDUAL = (PLAIN, RELU, NORM)
PREFERENCE = {
    PLAIN: 0,
    RELU: 0,
    NORM: 0,
    OUTSIDE: 0,
    UNKNOWN: 1,
    SHAPE: 2,
    NONE: 2,
}  # lower is preferred when a chain is chosen
SIZES = 6  # largest number of channel counts to try for a block
TOKENS, MOST_TOKENS = 16, 1024  # default and largest number of tokens to try


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a block.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def with_input(self, x: Tensor) -> "Call":
        """Return the same call with another hidden state.

        Args:
            x: The hidden state.

        Returns:
            A new call; this one is not changed.
        """
        if self.args and isinstance(self.args[0], Tensor):
            return Call((x, *self.args[1:]), self.kwargs)
        name = next(name for name, value in self.kwargs.items() if isinstance(value, Tensor))
        return Call(self.args, {**self.kwargs, name: x})


def hidden_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the hidden state that a block is called with.

    Args:
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The first positional argument, or without any the first tensor among the keyword arguments. None if that is not
        a tensor.
    """
    if args:
        return args[0] if isinstance(args[0], Tensor) else None
    return next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


def hidden_out(output: object) -> Tensor | None:
    """Return the hidden state in a block's output.

    Args:
        output: Output of the block.

    Returns:
        The output, or the first item of a tuple or list. None if that is not a tensor.
    """
    if isinstance(output, tuple | list) and output:
        output = cast(Sequence[object], output)[0]
    return output if isinstance(output, Tensor) else None


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Replace the hidden state in a block's output.

    Args:
        output: Output of the block: a tensor, tuple, named tuple or list.
        hidden: New hidden state.

    Returns:
        An output of the same form.
    """
    form = cast(Callable[..., Any], type(output))
    if not isinstance(output, tuple | list):
        return hidden
    items = [hidden, *cast(Sequence[object], output)[1:]]
    return form(*items) if hasattr(form, "_fields") else form(items)


def skip_of(block: nn.Module, call: Call | None = None) -> str:
    """Detect the type of a block's skip connection.

    Args:
        block: A block on any device, meta included. It is not changed.
        call: Arguments of a real call. Default: inputs are guessed from the shapes of the weights.

    Returns:
        One of `PLAIN`, `RELU`, `NORM`, `NONE`, `SHAPE`; `UNKNOWN` if the block accepts none of the inputs.
    """
    # Run on the CPU, even if the caller has set another default device such as meta.
    with torch.device("cpu"), fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = _copy_on_cpu(block)
        except Exception:  # blocks of users can raise anything; one that cannot be copied may still be residual
            return UNKNOWN
        for attempt in [call] if call is not None else _guesses(trial):
            skip_type = _try(trial, attempt)
            if skip_type != UNKNOWN:
                return skip_type
    return UNKNOWN


def _try(trial: nn.Module, call: Call) -> str:
    """Skip type by one call; `UNKNOWN` if the call fails."""
    like = hidden_in(call.args, call.kwargs)
    if like is None or not like.is_floating_point():
        return UNKNOWN
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    for axis in (1, -1):  # give the channels different means, on either axis, so that a norm changes the input
        shape = [1] * x.dim()
        shape[axis] = x.shape[axis]
        x = x + 0.3 * torch.randn(shape, generator=generator)
    x = x.to(like.dtype)

    def apply(value: Tensor) -> Tensor | None:
        with_value = call.with_input(value.clone())
        return hidden_out(trial(*with_value.args, **with_value.kwargs))

    try:
        # All weights zero, gains included. A norm at the end then returns zero.
        _fill(trial, gain=0.0)
        output = apply(x)
        if output is None:
            return UNKNOWN
        if output.shape != x.shape:
            return SHAPE
        if _close(output, x):
            return PLAIN
        # Gains of one let a norm at the end pass its input on.
        _fill(trial, gain=1.0)
        return _type_with_gains(apply, x)
    except Exception:  # see skip_of
        return UNKNOWN


def _type_with_gains(apply: Callable[[Tensor], Tensor | None], x: Tensor) -> str:
    """Skip type of a block with zero matrices and gains of one."""
    once, positive = apply(x), apply(x.abs())
    if once is None or positive is None:
        return UNKNOWN
    if _close(once, x):
        return PLAIN
    if _close(positive, x.abs()):
        return RELU
    twice = apply(once)
    correlation = torch.corrcoef(torch.stack((once.flatten(), x.flatten())).float())[0, 1]
    return NORM if twice is not None and _close(twice, once, 1e-2) and correlation > 0.8 else NONE


def _close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(left.float(), right.float(), rtol=tolerance, atol=tolerance)


def _copy_on_cpu(block: nn.Module) -> nn.Module:
    """A copy in evaluation mode, with BatchNorm in training mode."""
    trial = copy.deepcopy(block)
    if any(tensor.is_meta for tensor in (*trial.parameters(), *trial.buffers())):
        trial.to_empty(device="cpu")
        for buffer in trial.buffers():
            buffer.zero_()
    trial.cpu().eval()
    for module in trial.modules():
        if isinstance(module, BatchNorm):
            module.train()
    return trial


def _fill(trial: nn.Module, gain: float) -> None:
    """Set matrices and biases to zero, and gains to `gain`."""
    for name, parameter in trial.named_parameters():
        vector = sum(size > 1 for size in parameter.shape) < 2 and "bias" not in name.rpartition(".")[2]
        parameter.fill_(gain if vector else 0.0)


def _guesses(block: nn.Module) -> Iterator[Call]:
    """Images, tokens and vectors with channel counts that fit the weights."""
    parameters = list(block.parameters())
    if not parameters:
        return
    sizes: dict[int, None] = {}
    for module in block.modules():
        for name in ("in_channels", "num_features", "normalized_shape", "num_channels", "in_features"):
            size: object = getattr(module, name, None)
            if isinstance(size, tuple | list) and size:
                size = cast(Sequence[object], size)[-1]
            if isinstance(size, int) and size > 0:
                sizes.setdefault(size)
    for parameter in parameters:
        sizes.update(dict.fromkeys((*parameter.shape[:2], parameter.shape[-1]) if parameter.dim() else ()))
    channels = list(sizes)[:SIZES]
    # The number of tokens of a mixer is a size of its weights, that of relative positions a size of their table.
    tables = [buffer.shape[-1] for buffer in block.buffers() if buffer.dim() >= 2]
    tokens = [n for n in dict.fromkeys((*channels, *tables)) if n <= MOST_TOKENS]
    for shape in (
        *(
            (2, *rest)
            for c in channels
            for rest in ((c, 8, 8), (TOKENS, c), (8, 8, c), (c,), (c, TOKENS), (c, 2, 8, 8))
        ),
        *((2, n, c) for c, n in product(channels, tokens)),
        *((2, *rest) for c in channels for rest in ((c, 14, 14), (14, 14, c))),  # windows of 7 by 7
    ):
        yield Call((torch.zeros(shape, dtype=parameters[0].dtype),))


def output_of(block: nn.Module, call: Call | None = None) -> tuple[Call, object] | None:
    """Run a copy of a block.

    Args:
        block: A block on any device, meta included. It is not changed.
        call: Arguments of a real call. Default: inputs are guessed from the shapes of the weights.

    Returns:
        The call, and the block's output; None if the block accepts none of the inputs.
    """
    with torch.device("cpu"), fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = _copy_on_cpu(block)
            _fill(trial, gain=1.0)
        except Exception:  # see skip_of
            return None
        for attempt in [call] if call is not None else _guesses(trial):
            try:
                return attempt, trial(*attempt.args, **attempt.kwargs)
            except Exception:  # see skip_of
                continue
    return None


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
    with torch.device("cpu"), fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = _copy_on_cpu(block)
        except Exception:  # see skip_of
            return False, "a block cannot be copied"
        _fill(trial, gain=0.0)
        for attempt in [call] if call is not None else _guesses(trial):
            like = hidden_in(attempt.args, attempt.kwargs)
            if like is None or not like.is_floating_point():
                continue
            x = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like.dtype)
            try:
                with_value = attempt.with_input(x.clone())
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
