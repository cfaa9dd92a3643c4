"""Runs of networks in double precision, and the difference between their outputs."""

import copy
from collections.abc import Callable, Mapping, Sequence
from math import inf

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from resist.blocks.residual import Call
from resist.errors import UserError


def detached(model: nn.Module) -> nn.Module:
    """Copy a model; each parameter and buffer gets its own storage."""
    memo: dict[int, object] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_cloned(parameter), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = _cloned(buffer)
    return copy.deepcopy(model, memo)


def difference(reference: nn.Module, other: nn.Module, inputs: object) -> float:
    """Compute the largest difference between the outputs of two networks.

    Both run in double precision and in eval mode.

    Args:
        reference: The first network.
        other: The second network.
        inputs: Their input, as in `fold_scale`.

    Returns:
        The difference relative to the largest output of `reference`; inf where shapes differ or values are NaN.
    """
    call = in_double(call_of(inputs))
    expected, actual = (run(detached(model).double().eval(), call) for model in (reference, other))
    return inf if expected.shape != actual.shape else relative(expected - actual, expected)


def first_tensor(output: object) -> Tensor:
    """Return an output's tensor, `logits` of a mapping, or first tensor.

    Raises:
        UserError: The output contains no tensor.
    """
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = output["logits"] if "logits" in output else next(iter(output.values()))
        elif isinstance(output, Sequence) and output:
            output = output[0]
        else:
            raise UserError(f"an output of type {type(output).__name__} contains no tensor; nothing can be compared")
    return output


def run(module: nn.Module, call: Call) -> Tensor:
    """The first tensor of the output. The arguments are copied, since modules may work in place."""
    call = copied(call)
    with torch.no_grad():
        return first_tensor(module(*call.args, **call.kwargs))


def call_of(inputs: object) -> Call:
    if isinstance(inputs, Mapping):
        return Call((), dict(inputs))
    return Call(tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,))


def copied(call: Call) -> Call:
    return mapped(Tensor.clone, call)


def in_double(call: Call) -> Call:
    return mapped(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, call)


def mapped(function: Callable[[Tensor], Tensor], call: Call) -> Call:
    """The call with `function` applied to every tensor among its arguments, nested ones included."""
    tree = (call.args, dict(call.kwargs))
    return Call(*tree_map(lambda value: function(value) if isinstance(value, Tensor) else value, tree))


def relative(error: Tensor, reference: Tensor) -> float:
    """Largest error over the largest reference value; inf where anything is NaN."""
    largest, worst = reference.abs().max().item(), error.abs().max().item()
    if worst == 0:
        return 0.0
    return worst / largest if largest > 0 and worst == worst else inf


def _cloned(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
