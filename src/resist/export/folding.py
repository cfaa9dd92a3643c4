"""Fold the scale of residual branches into weights, without hooks.

In the full network of a job, a chain block computes x + scale * (block(x) - x). Where the branch block(x) - x ends in a
linear operation, the same result comes from multiplying that operation's parameters by the scale. The operation depends
on the block: the last convolution of a pre-activation block, the layer scale of a ConvNeXt block, the `gain` of a
weight-standardized convolution. It is therefore searched by trial: the parameters of each candidate, the last executed
first, are scaled in a double-precision copy of the block, and accepted if the copy then equals the scaled block, on the
block's own inputs and on noise. Each block is tested separately, and the whole network at the end.

Two types of block cannot be folded exactly:

- relu(x + f(x)), as in torchvision's ResNets: scaling f gives relu(x + scale * f(x)), which differs from
  x + scale * (relu(x + f(x)) - x) wherever x + f(x) is negative.
- Two residual branches in one block, as in a transformer: the second branch reads the sum of x and the whole first one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from resist.blocks.residual import Call, hidden_in
from resist.errors import UserError
from resist.export.comparing import call_of, copied, detached, difference, in_double, mapped, relative, run
from resist.subnet.scaling import adds_outside, scales_of, unhook

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fold:
    """Record of one block whose scale was folded into its weights.

    Attributes:
        block: Dotted name of the block.
        scale: The factor of its branch.
        into: Names, within the block, of the parameters that were multiplied by `scale`.
        difference: Largest difference between the scaled branch and the folded one on the example, relative to the
            largest value of the scaled branch.
    """

    block: str
    scale: float
    into: tuple[str, ...]
    difference: float

    @property
    def exact(self) -> bool:
        """True if the difference is at most `TOLERANCE`."""
        return self.difference <= TOLERANCE


def fold_scale(model: nn.Module, inputs: object, *, approximate: bool = False) -> nn.Module:
    """Copy a full network with the scale folded into its weights.

    Args:
        model: The result of `Job.full_model`, on any device.
        inputs: Example input of the model: a tensor, a tuple of arguments or a dict of named ones, of batch size 2 or
            more. It is used to obtain the inputs of the blocks.
        approximate: Where a ReLU follows the sum, so that no exact fold exists, scale the branch before the sum. The
            result is exact wherever that ReLU does not clip the unscaled sum.

    Raises:
        UserError: The scale of a block cannot be folded (the message names the block), or `inputs` do not reach it.
    """
    return fold(model, inputs, approximate=approximate)[0]


def fold(model: nn.Module, inputs: object, *, approximate: bool = False) -> tuple[nn.Module, list[Fold]]:
    """Do the same as `fold_scale`, and return a record of every fold."""
    scales, training = scales_of(model), {module: module.training for module in model.modules()}
    # Run the model once to record the arguments of every block; each module then gets its own mode back.
    try:
        model.eval()
        calls = _calls(model, scales, inputs)
        folded = detached(model)
    finally:
        for module, mode in training.items():
            module.training = mode
    folds: list[Fold] = []
    into: tuple[str, ...] = ()
    # Blocks within blocks come first, so that an outer block is tested with its inner ones folded.
    for name in sorted(scales, key=lambda name: -name.count(".")):
        block = folded.get_submodule(name)
        outside = adds_outside(block)
        unhook(block)
        folds.append(_fold_block(name, block, scales[name], calls[name], into, approximate, outside))
        into = folds[-1].into  # the next block is probably of the same type: try these parameters first
    if scales and not approximate:
        error = difference(model, folded, inputs)
        if error > TOLERANCE:
            raise UserError(f"the folded network's outputs differ by {error:.1e} of the largest; give `scale=keep`")
    order = list(scales)
    return folded, sorted(folds, key=lambda record: order.index(record.block))


def _calls(model: nn.Module, scales: Mapping[str, float], inputs: object) -> dict[str, Call]:
    """Copies of the arguments of each scaled block when the model runs on `inputs`."""
    calls: dict[str, Call] = {}

    def recorder(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = copied(Call(args, kwargs))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(recorder(name), with_kwargs=True, prepend=True)
        for name in scales
    ]
    try:
        run(model, call_of(inputs))
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in scales if name not in calls]
    if missing:
        raise UserError(f"block {missing[0]} takes no part in the example; give inputs that run through every block")
    return calls


@dataclass(frozen=True)
class _Trial:
    """Input of a block, and its output with a scaled branch, in double precision.

    Attributes:
        call: The arguments.
        branch: The scaled branch.
        target: The output with the scaled branch.
        passed: bool: where the unscaled output is above zero, which a ReLU at the end of the block does not clip.
        rectified: True if no element of the unscaled output is negative.
    """

    call: Call
    branch: Tensor
    target: Tensor
    passed: Tensor
    rectified: bool

    @classmethod
    def of(cls, name: str, block: nn.Module, scale: float, call: Call, outside: bool) -> "_Trial":
        out, x = run(block, call), _hidden(call)
        if outside:
            return cls(call, scale * out, scale * out, out > 0, rectified=False)
        if out.shape != x.shape:
            raise UserError(
                f"block {name} maps {tuple(x.shape)} to {tuple(out.shape)}; only a residual block can be folded"
            )
        return cls(call, scale * (out - x), torch.lerp(x, out, scale), out > 0, bool((out >= 0).all()))

    def errors(self, block: nn.Module) -> tuple[float, float]:
        """The block's largest error, overall and where `passed`, relative to the scaled branch."""
        error = run(block, self.call) - self.target
        return relative(error, self.branch), relative(error * self.passed, self.branch)


def _fold_block(
    name: str, block: nn.Module, scale: float, call: Call, first: tuple[str, ...], approximate: bool, outside: bool
) -> Fold:
    """Find the parameters whose multiplication by `scale` equals the scaled block, and multiply them in place.

    `first` are tried before all others. Without an exact fold, `approximate` accepts one that is exact where a final
    ReLU does not clip. With `outside`, the network adds what the block returns to its hidden state.
    """
    copied, call = detached(block).double().eval(), in_double(call)
    example = _Trial.of(name, copied, scale, call, outside)
    noise = _Trial.of(name, copied, scale, _noisy(call), outside)
    rectified = example.rectified and noise.rectified
    least, record, before_relu = inf, None, False
    for names in sorted(_candidates(copied, example.call), key=lambda names: names != first):
        with _scaled(copied, names, scale):
            error, passed = example.errors(copied)
            exact = error <= TOLERANCE and noise.errors(copied)[0] <= TOLERANCE
        least, before_relu = min(least, error), before_relu or (rectified and passed <= TOLERANCE)
        if exact or (approximate and before_relu):
            record = Fold(name, scale, names, error)
            break
    if record is None:
        raise UserError(_refusal(name, block, least, before_relu))
    with torch.no_grad():
        for key in record.into:
            parameter = block.get_parameter(key)
            parameter.copy_((parameter.double() * scale).to(parameter.dtype))
    return record


def _refusal(name: str, block: nn.Module, error: float, before_relu: bool) -> str:
    reason = (
        "it applies an activation after the sum"
        if before_relu
        else "it has more than one residual branch, or one that does not end in a linear operation"
    )
    return (
        f"the scale of block {name} ({type(block).__name__}) cannot be folded into its weights: {reason} (smallest "
        f"error {error:.1e} of the branch); give `scale=keep`"
        + (", or `scale=approximate` and look at the difference" if before_relu else "")
    )


def _candidates(block: nn.Module, call: Call) -> list[tuple[str, ...]]:
    """Sets of parameters that may be linear in a block's branch.

    Each set belongs to one module. Modules that finish last come first, and all parameters of a module before subsets.
    """
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, key=key: order.append(key))
        for key, module in block.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    run(block, call)
    for handle in handles:
        handle.remove()
    candidates: list[tuple[str, ...]] = []
    for key in dict.fromkeys(reversed(order)):
        names = [f"{key}.{name}".lstrip(".") for name, _ in block.get_submodule(key).named_parameters(recurse=False)]
        sizes = range(len(names), 0, -1) if len(names) <= 3 else (len(names), 1)
        candidates += [subset for size in sizes for subset in combinations(names, size)]
    return candidates


@contextmanager
def _scaled(block: nn.Module, names: Sequence[str], scale: float) -> Iterator[None]:
    """Context in which the block's parameters `names` are multiplied by `scale`."""
    parameters = [block.get_parameter(name) for name in names]
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(scale)
        yield
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def _hidden(call: Call) -> Tensor:
    hidden = hidden_in(call.args, call.kwargs)
    assert hidden is not None, "ScaleBranch has checked the call"
    return hidden


def _noisy(call: Call) -> Call:
    """The call with noise of equal mean and deviation as the block's input, the same every time."""
    x = _hidden(call)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    return mapped(lambda tensor: x.mean() + x.std() * noise if tensor is x else tensor, call)
