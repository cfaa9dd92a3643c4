"""Fold the scale of residual branches into weights, so that what is left is an ordinary network without hooks.

In the full network of a job a chain block computes x + scale * (block(x) - x). Where the branch block(x) - x ends in a
linear operation, multiplying that operation's parameters by the scale says the same. Which operation it is depends on
the block: the last convolution of a pre-activation block, the layer scale of a ConvNeXt block, the `gain` of a
weight-standardized convolution. So it is not looked up but found: each candidate, the last executed first, is scaled
in a copy of the block in double precision, and taken only when the copy then equals the scaled block, on the block's
own inputs and on random ones. Every block is tried, not one for all, and at the end the whole network.

Two kinds of block pass no such test. relu(x + f(x)), as in torchvision's ResNets: scaling f gives relu(x + scale *
f(x)), which differs from x + scale * (relu(x + f(x)) - x) wherever x + f(x) is negative. And two residual branches in
one block, as in a transformer: the second branch reads the sum of x and the whole first one.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from resist.errors import UserError
from resist.subnet.scaling import scales_of, unhook

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fold:
    """One block's scale, now in its weights.

    into:       names, within the block, of the parameters that were multiplied by `scale`.
    difference: largest difference between the scaled branch and the folded one on the example, relative to the former's
                largest value.
    """

    block: str
    scale: float
    into: tuple[str, ...]
    difference: float

    @property
    def exact(self) -> bool:
        return self.difference <= TOLERANCE


def fold_scale(model: nn.Module, inputs: object, *, approximate: bool = False) -> nn.Module:
    """A copy of `model`, which `Job.full_model` gave, with the scale in its weights and without hooks.

    inputs:      an example of what the model takes (a tensor, a tuple of arguments or a dict of named ones), two of a
                 kind or more, so that the inputs of its blocks are known.
    approximate: where a ReLU after the sum leaves no exact fold, scale the branch before the sum all the same: right
                 wherever that ReLU lets the unscaled sum pass.

    Raises UserError, naming the block, where a block's scale cannot be folded exactly.
    """
    return fold(model, inputs, approximate=approximate)[0]


def fold(model: nn.Module, inputs: object, *, approximate: bool = False) -> tuple[nn.Module, list[Fold]]:
    """As `fold_scale`, with an account of every fold."""
    scales, training = scales_of(model), {module: module.training for module in model.modules()}
    try:
        model.eval()
        calls = _calls(model, scales, inputs)
        folded = detached(model)
    finally:
        for module, mode in training.items():
            module.training = mode
    folds: list[Fold] = []
    into: tuple[str, ...] = ()
    for name in sorted(scales, key=lambda name: -name.count(".")):  # blocks within blocks first
        block = folded.get_submodule(name)
        unhook(block)
        folds.append(_fold_block(name, block, scales[name], calls[name], into, approximate))
        into = folds[-1].into
    if scales and not approximate:
        far = difference(model, folded, inputs)
        if not far <= TOLERANCE:
            raise UserError(f"the folded network's outputs differ by {far:.1e} of the largest; keep the scale instead")
    order = list(scales)
    return folded, sorted(folds, key=lambda one: order.index(one.block))


def detached(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers lie in memory of their own, not in one flat tensor."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_own(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _own(buffer)
    return copy.deepcopy(model, memo)


def difference(one: nn.Module, other: nn.Module, inputs: object) -> float:
    """The largest difference between the outputs of two networks, both taken in double precision and in eval mode,
    relative to the largest output of `one`."""
    outputs = [_run(detached(model).double().eval(), *_arguments(_double(inputs))) for model in (one, other)]
    return _apart(*outputs)


def first_tensor(output: object) -> Tensor:
    """What a block hands on, or a network's logits: the output itself, or the first of several."""
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = output["logits"] if "logits" in output else next(iter(output.values()))
        elif isinstance(output, Sequence) and output:
            output = output[0]
        else:
            raise UserError(f"an output of type {type(output).__name__} holds no tensor; nothing can be compared")
    return output


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _calls(model: nn.Module, scales: Mapping[str, float], inputs: object) -> dict[str, Call]:
    """What each scaled block is called with when the model runs on `inputs`, copied."""
    calls: dict[str, Call] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, (args, kwargs))

        return hook

    handles = [
        model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True, prepend=True)
        for name in scales
    ]
    try:
        _run(model, *_arguments(inputs))
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in scales if name not in calls]
    if missing:
        raise UserError(f"block {missing[0]} takes no part in the example; give inputs that run through every block")
    return calls


@dataclass(frozen=True)
class _Trial:
    """An input of a block, and what comes out there when its branch is scaled, in double precision.

    passed: where the block's output is above zero, so that a ReLU at its end has let it pass.
    """

    call: Call
    branch: Tensor
    target: Tensor
    passed: Tensor
    rectified: bool

    @classmethod
    def of(cls, name: str, block: nn.Module, scale: float, call: Call) -> "_Trial":
        out, x = _run(block, *call), _hidden(call)
        if out.shape != x.shape:
            raise UserError(f"block {name} takes {tuple(x.shape)} and gives {tuple(out.shape)}; it is no residual one")
        return cls(call, scale * (out - x), torch.lerp(x, out, scale), out > 0, bool((out >= 0).all()))

    def errors(self, block: nn.Module) -> tuple[float, float]:
        """How far the block is off, and how far where its output has passed, relative to the scaled branch."""
        error = _run(block, *self.call) - self.target
        return _relative(error, self.branch), _relative(error * self.passed, self.branch)


def _fold_block(
    name: str, block: nn.Module, scale: float, call: Call, first: tuple[str, ...], approximate: bool
) -> Fold:
    """Multiply by `scale` the parameters of `block` that make it the scaled block; `first` are tried before others."""
    copied, call = detached(block).double().eval(), _double(call)
    own = _Trial.of(name, copied, scale, call)
    noise = _Trial.of(name, copied, scale, _noisy(call))
    rectified = own.rectified and noise.rectified
    least, taken, around = inf, None, False
    for names in sorted(_candidates(copied, own.call), key=lambda names: names != first):
        with _scaled(copied, names, scale):
            far, passed = own.errors(copied)
            exact = far <= TOLERANCE and noise.errors(copied)[0] <= TOLERANCE
        least, around = min(least, far), around or (rectified and passed <= TOLERANCE)
        if exact or (approximate and around):
            taken = Fold(name, scale, names, far)
            break
    if taken is None:
        raise UserError(_refusal(name, block, least, around))
    with torch.no_grad():
        for key in taken.into:
            parameter = block.get_parameter(key)
            parameter.copy_((parameter.double() * scale).to(parameter.dtype))
    return taken


def _refusal(name: str, block: nn.Module, far: float, around: bool) -> str:
    why = (
        "it applies an activation after the sum"
        if around
        else "it has more than one residual branch, or one that does not end in a linear operation"
    )
    return (
        f"the scale of block {name} ({type(block).__name__}) cannot be folded into its weights: {why} (the best try is "
        f"off by {far:.1e} of the branch); give --scale keep"
        + (", or --scale approximate and look at the difference" if around else "")
    )


def _candidates(block: nn.Module, call: Call) -> list[tuple[str, ...]]:
    """Sets of parameters that may be linear in a block's branch: those of one module, modules that end last first, and
    its whole set before parts of it."""
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, key=key: order.append(key))
        for key, module in block.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    _run(block, *call)
    for handle in handles:
        handle.remove()
    found: list[tuple[str, ...]] = []
    for key in dict.fromkeys(reversed(order)):
        names = [f"{key}.{name}".lstrip(".") for name, _ in block.get_submodule(key).named_parameters(recurse=False)]
        sizes = range(len(names), 0, -1) if len(names) <= 3 else (len(names), 1)
        found += [some for size in sizes for some in combinations(names, size)]
    return found


@contextmanager
def _scaled(block: nn.Module, names: Sequence[str], scale: float) -> Iterator[None]:
    """Inside it, the block's parameters `names` are multiplied by `scale`."""
    parameters = [block.get_parameter(name) for name in names]
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(scale)
        yield
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


def _hidden(call: Call) -> Tensor:
    """What a block adds its branch to: its first argument, or the first tensor among named ones."""
    return next(one for one in (*call[0], *call[1].values()) if isinstance(one, Tensor))


def _noisy(call: Call) -> Call:
    """The call with noise in place of the block's input, of its mean and deviation, the same every time."""
    x = _hidden(call)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    return tree_map(lambda one: x.mean() + x.std() * noise if one is x else one, call)


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor of the output. The arguments survive modules that work in place."""
    args, kwargs = tree_map(lambda one: one.clone() if isinstance(one, Tensor) else one, (args, kwargs))
    with torch.no_grad():
        return first_tensor(module(*args, **kwargs))


def _arguments(inputs: object) -> Call:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _double(tree: Any) -> Any:
    return tree_map(lambda one: one.double() if isinstance(one, Tensor) and one.is_floating_point() else one, tree)


def _apart(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return inf
    return _relative(one - other, one)


def _relative(error: Tensor, reference: Tensor) -> float:
    """Largest error over the largest reference value; inf where anything is not a number."""
    largest, far = reference.abs().max().item(), error.abs().max().item()
    if far == 0:
        return 0.0
    return far / largest if largest > 0 and far == far else inf


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
