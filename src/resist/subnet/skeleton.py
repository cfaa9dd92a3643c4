"""Skeletons: copies of modules without weights, without the user's hooks, and with kept activations detached."""

import copy
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping, Set
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from resist.blocks.copying import copied_module, outside
from resist.blocks.modules import hook_tables_of, is_float


def next_hook() -> int:
    """Return the number of the next hook that is registered, on any module.

    Hooks with a smaller number belong to the network; those that come later are the user's.
    """
    return RemovableHandle.next_id


def skeleton(
    module: nn.Module,
    *,
    device: torch.device | str = "meta",
    instead: Mapping[int, object] = MappingProxyType({}),
    keep: Set[int] = frozenset(),
    hooks_before: int | None = None,
    root: nn.Module | None = None,
) -> nn.Module:
    """Copy a module without its weights.

    A tensor of a graph that the module keeps as an attribute (an auxiliary loss, an attention map) is copied without
    its graph. Hooks of the network itself are copied with it.

    Args:
        module: Module to copy. It is not changed.
        device: Device of the copy's parameters and buffers.
        instead: Objects to use instead of some modules and tensors in it, by their ids.
        keep: Ids of the float buffers that are copied with their values.
        hooks_before: Copy only hooks with smaller numbers; see `next_hook`. Default: all.
        root: Network that `module` is part of. The copy refers to the rest of it as `module` does.

    Returns:
        The copy. Its parameters and float buffers have no values and no memory yet: set their `.data`.
    """
    memo: dict[int, Any] = {} if root is None else outside(root, module)
    copied = _reached(module, instead)
    for inner in copied:
        for parameter in inner.parameters(recurse=False):
            bone = nn.Parameter(_bone(parameter, device), requires_grad=parameter.requires_grad)
            vars(bone).update(vars(parameter))
            memo[id(parameter)] = bone
        for buffer in inner.buffers(recurse=False):
            if is_float(buffer) and id(buffer) not in keep:
                memo[id(buffer)] = _bone(buffer, device)
            elif buffer.is_meta:
                memo[id(buffer)] = torch.zeros_like(buffer, device=device)
            else:
                memo[id(buffer)] = buffer.detach().to(device, copy=True)
    memo |= instead
    with _Detaching():
        if hooks_before is not None:
            _copy_hooks(copied, hooks_before, memo)
        return copied_module(module, memo)


def _bone(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the same form without memory for its elements."""
    return torch.empty((), dtype=tensor.dtype, device=device).expand(tensor.shape)


def _reached(module: nn.Module, skipped: Container[int]) -> list[nn.Module]:
    """The modules within a module that are not only in skipped ones, itself included."""
    reached: dict[int, nn.Module] = {}
    waiting = [module]
    while waiting:
        inner = waiting.pop()
        if id(inner) not in skipped and id(inner) not in reached:
            reached[id(inner)] = inner
            waiting += inner.children()
    return list(reached.values())


def _copy_hooks(modules: Iterable[nn.Module], before: int, memo: dict[int, Any]) -> None:
    """Copy those tables that have hooks of the user, without them."""
    tables = [
        table for module in modules for table in hook_tables_of(module).values() if any(key >= before for key in table)
    ]
    for table in tables:
        memo[id(table)] = OrderedDict[int, object]()
    for table in tables:
        for key, hook in table.items():
            if key < before:
                memo[id(table)][key] = copy.deepcopy(hook, memo)


_DEEPCOPY: Any = Tensor.__deepcopy__  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


class _Detaching(TorchFunctionMode):
    """Lets deepcopy copy tensors that have a graph, without the graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEEPCOPY and not args[0].is_leaf:
            tensor, memo = args
            memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def own_storages(model: nn.Module) -> None:
    """Give every tensor of a network a storage of its own, so that it can be saved alone. Tied tensors stay tied.

    Args:
        model: A network of views, changed in place. It takes memory for a second copy until the views are gone.
    """
    for tensor in {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}.values():
        tensor.data = tensor.detach().clone()
