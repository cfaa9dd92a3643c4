"""Whether a block is residual, and how: what is left of its input when its weights are zero.

A block x + f(x) gives back x. One that ends in a ReLU, relu(x + f(x)), gives back every x that is not negative; one
that ends in a norm, norm(x + f(x)), gives a normalized x, and that again when it is applied twice. A block without a
skip connection gives a constant. All of this is tried on a copy of the block, with numbers, so no list of architectures
is needed; the input is the caller's, or one of those that the shapes of the weights suggest.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

PLAIN, RELU, NORM, NONE, SHAPE, UNKNOWN = "plain", "relu", "norm", "none", "shape", "unknown"
RESIDUAL = (PLAIN, RELU, NORM)
RANK = {PLAIN: 0, RELU: 0, NORM: 0, UNKNOWN: 1, SHAPE: 2, NONE: 2}  # what is chosen first
SIZES = 6  # of channels that are tried for a block, at most
TOKENS, MOST_TOKENS = 16, 1024


@dataclass(frozen=True)
class Call:
    """The arguments of one call of a block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def with_input(self, x: Tensor) -> "Call":
        """The same call with another hidden state."""
        if self.args and isinstance(self.args[0], Tensor):
            return Call((x, *self.args[1:]), self.kwargs)
        name = next(name for name, value in self.kwargs.items() if isinstance(value, Tensor))
        return Call(self.args, {**self.kwargs, name: x})


def hidden_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden state that a block is called with: its first argument, or the first tensor among named ones."""
    if args:
        return args[0] if isinstance(args[0], Tensor) else None
    return next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


def hidden_out(output: object) -> Tensor | None:
    """The hidden state that a block returns: the tensor, or the first of a tuple or list."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """`output` of a block with `hidden` for its hidden state, in the same form."""
    if isinstance(output, tuple | list):
        rest = [hidden, *output[1:]]
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    return hidden


def skip_of(block: nn.Module, call: Call | None = None) -> str:
    """Of which kind the skip connection of `block` is: one of the words above.

    block: may be on the meta device; it is not touched.
    call:  arguments of a real call. Without them inputs are guessed; "unknown" where the block takes none of these.
    """
    # On the host, also where the caller builds on the meta device.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trial = _copy_on_host(block)
        except Exception:  # a block of anybody's: that it cannot be copied says nothing about its skip connection
            return UNKNOWN
        for one in [call] if call is not None else _guesses(trial):
            found = _try(trial, one)
            if found != UNKNOWN:
                return found
    return UNKNOWN


def _try(trial: nn.Module, call: Call) -> str:
    """Raises nothing: a call that the block does not take is "unknown"."""
    like = hidden_in(call.args, call.kwargs)
    if like is None or not like.is_floating_point():
        return UNKNOWN
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape, generator=generator, dtype=torch.float32)
    for axis in (1, -1):  # channels that differ in their mean, wherever they are, so that a norm would show
        shape = [1] * x.dim()
        shape[axis] = x.shape[axis]
        x = x + 0.3 * torch.randn(shape, generator=generator)
    x = x.to(like.dtype)

    def apply(value: Tensor) -> Tensor | None:
        with_value = call.with_input(value.clone())
        return hidden_out(trial(*with_value.args, **with_value.kwargs))

    try:
        _fill(trial, gain=0.0)
        nothing = apply(x)
        if nothing is None:
            return UNKNOWN
        if nothing.shape != x.shape:
            return SHAPE
        if _close(nothing, x):
            return PLAIN
        _fill(trial, gain=1.0)
        return _kind(apply, x)
    except Exception:  # see skip_of
        return UNKNOWN


def _kind(apply: Callable[[Tensor], Tensor | None], x: Tensor) -> str:
    """Of which kind a block is whose matrices are zero, its gains being one."""
    once, positive = apply(x), apply(x.abs())
    if once is None or positive is None:
        return UNKNOWN
    if _close(once, x):
        return PLAIN
    if _close(positive, x.abs()):
        return RELU
    twice = apply(once)
    alike = torch.corrcoef(torch.stack((once.flatten(), x.flatten())).float())[0, 1]
    return NORM if twice is not None and _close(twice, once, 1e-2) and alike > 0.8 else NONE


def _close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance)


def _copy_on_host(block: nn.Module) -> nn.Module:
    """A copy without hooks, for evaluation, but with the statistics of the batch in BatchNorm."""
    trial = copy.deepcopy(block)
    if any(tensor.is_meta for tensor in (*trial.parameters(), *trial.buffers())):
        trial.to_empty(device="cpu")
        for buffer in trial.buffers():
            buffer.zero_()
    trial.cpu().eval()
    for module in trial.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    return trial


def _fill(trial: nn.Module, gain: float) -> None:
    """Zero for matrices and biases, `gain` for what has one number for each channel."""
    for name, parameter in trial.named_parameters():
        vector = sum(size > 1 for size in parameter.shape) < 2 and "bias" not in name.rpartition(".")[2]
        parameter.fill_(gain if vector else 0.0)


def _guesses(block: nn.Module) -> Iterator[Call]:
    """Images, tokens and vectors with as many channels as some weight of the block takes."""
    parameters = list(block.parameters())
    if not parameters:
        return
    sizes: dict[int, None] = {}
    for module in block.modules():
        for name in ("in_channels", "num_features", "normalized_shape", "num_channels", "in_features"):
            size = getattr(module, name, None)
            size = size[-1] if isinstance(size, tuple | list) and size else size
            if isinstance(size, int) and size > 0:
                sizes.setdefault(size)
    for parameter in parameters:
        sizes.update(dict.fromkeys((*parameter.shape[:2], parameter.shape[-1]) if parameter.dim() else ()))
    few = list(sizes)[:SIZES]
    # A mixer's number of tokens is in its weights, and that of relative positions in their table.
    tables = [buffer.shape[-1] for buffer in block.buffers() if buffer.dim() >= 2]
    tokens = [n for n in dict.fromkeys((*few, *tables)) if n <= MOST_TOKENS]
    for shape in (
        *((2, *rest) for c in few for rest in ((c, 8, 8), (TOKENS, c), (8, 8, c), (c,), (c, TOKENS), (c, 2, 8, 8))),
        *((2, n, c) for c, n in product(few, tokens)),
        *((2, *rest) for c in few for rest in ((c, 14, 14), (14, 14, c))),  # windows of 7 by 7
    ):
        yield Call((torch.zeros(shape, dtype=parameters[0].dtype),))
