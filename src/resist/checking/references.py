"""References: what a network computes with that is not in it, and that its copies do not have.

A copy of a network has copies of its modules, but the same functions. A lambda, or a hook that is a closure, still
refers to the modules and lists of the network that was copied, so a sub-network computes with them, or without them. A
table outside of the network, by the identity of its modules, has no entries for those of a copy.
"""

import copy
import functools
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from resist.blocks.comparison import same_tensor
from resist.blocks.modules import buffers_of, hook_tables, named_modules, pre_hook_tables
from resist.blocks.rehearsal import Rehearsal, describe, stand_in
from resist.checking.trace import Trace, first_difference
from resist.errors import UserError


def check_references(rehearsal: Rehearsal, model: nn.Module) -> None:
    """Check that a copy of a network computes what the network computes.

    Args:
        rehearsal: The example.
        model: The full network. It is run, and its attributes, buffers and modes are restored.

    Raises:
        UserError: If a copy computes something else.
    """
    if any(tensor.device.type != "cpu" for tensor in (*model.parameters(), *model.buffers())):
        return
    found = [name or "the network itself" for name, module in named_modules(model) if _has_closure(module)]
    copied = stand_in(model)
    with preserved(model):  # its modes too, which copies of it begin with
        expected = Trace().end(rehearsal.run(model))
    try:
        differs = first_difference(Trace().end(rehearsal.run(copied)), expected) is not None
    except Exception as error:  # models of users can raise anything
        raise UserError(f"{_reason(found)} ({describe(error)})") from error
    if differs:
        raise UserError(_reason(found))


def _reason(closures: list[str]) -> str:
    if closures:
        cause = f"a function or hook of {closures[0]} keeps a reference to the network that it was made in"
        remedy = "use the arguments of the hook, or a method of the module"
    else:
        cause = "something outside of it belongs to its modules, such as a table, or changes with each call"
        remedy = "keep it in the modules"
    return f"a copy of the network does not compute the same as the network: {cause}; {remedy}"


def _has_closure(module: nn.Module) -> bool:
    values = [*hook_tables(module)[0].values(), *pre_hook_tables(module)[0].values(), *vars(module).values()]
    return any(_is_closure(value) for value in values)


def _is_closure(value: object) -> bool:
    if isinstance(value, functools.partial):
        return True
    return isinstance(value, FunctionType) and bool(value.__closure__ or value.__defaults__)


@contextmanager
def preserved(model: nn.Module) -> Generator[None]:
    """Context that restores modes, attributes and buffers of a network at its end.

    Args:
        model: The network.
    """
    saved = [_state_of(module) for module in model.modules()]
    try:
        yield
    finally:
        for module, (own, containers, tensors) in zip(model.modules(), saved, strict=False):
            _restore(module, own, containers, tensors)


State = tuple[dict[str, Any], dict[str, Any], list[tuple[Tensor, Tensor]]]


def _state_of(module: nn.Module) -> State:
    own = dict(vars(module))
    containers = {name: copy.copy(v) for name, v in own.items() if type(v) in (list, dict, set, OrderedDict)}
    held = [*own.values(), *buffers_of(module).values()]
    tensors = [(v, v.detach().clone()) for v in held if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)]
    return own, containers, tensors


@torch.no_grad()
def _restore(module: nn.Module, own: dict[str, Any], containers: dict[str, Any], tensors: list[Any]) -> None:
    vars(module).clear()
    vars(module).update(own)
    for name, before in containers.items():
        value = own[name]
        if isinstance(value, list):
            value[:] = before
        elif value != before:
            value.clear()
            value.update(before)
    for tensor, before in tensors:
        if not same_tensor(tensor, before):
            tensor.copy_(before)
