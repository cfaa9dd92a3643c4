"""What two blocks have to have in common to lie in the same slot, and what may differ and goes with its block."""

import copy
import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_SCALARS = (bool, int, float, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
Key = tuple[str, str]  # dotted name of a module within the block, name of its attribute


@dataclass(frozen=True)
class Varying:
    """An attribute that differs along a chain: `name` of `module` (dotted, within the block; "" is the block itself).
    values: one for each block of the full network."""

    module: str
    name: str
    values: tuple[Any, ...]

    def put(self, block: nn.Module, number: int) -> None:
        """Give a module that stands for block `number` that block's value."""
        setattr(block.get_submodule(self.module), self.name, copy.deepcopy(self.values[number]))


def fixed(block: nn.Module) -> dict[str, object]:
    """What has to agree for two blocks to lie in one slot, by a name for people: classes, weights, functions."""
    found: dict[str, object] = {}
    for prefix, module in block.named_modules(remove_duplicate=False):
        found[f"the class of {prefix or 'the block'}"] = type(module)
        dot = f"{prefix}." if prefix else ""
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found[f"parameter {dot}{name}"] = (tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                found[f"buffer {dot}{name}"] = (tuple(buffer.shape), buffer.dtype, _integers(name, buffer))
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and not _is_scalar(value):
                found[f"{dot}{name}"] = _described(value)
    return found


def scalars(block: nn.Module) -> dict[Key, Any]:
    """The numbers, texts and flags of a block and its parts, and tuples, lists and dicts of them."""
    return {
        (prefix, name): value
        for prefix, module in block.named_modules(remove_duplicate=False)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_scalar(value)
    }


def varying(of_blocks: Sequence[dict[Key, Any]]) -> tuple[Varying, ...]:
    """The attributes that differ among blocks, from what `scalars` gave of each."""
    return tuple(
        Varying(*key, tuple(own[key] for own in of_blocks))
        for key, value in of_blocks[0].items()
        if any(repr(own[key]) != repr(value) for own in of_blocks)
    )


def difference(model: nn.Module, container: str, first: int, last: int) -> str:
    """In what the first two neighbors differ that are not of one kind, "" where there are none such."""
    try:
        children = _children(model.get_submodule(container))[first : last + 1]
    except AttributeError:
        return ""
    for number, (one, other) in enumerate(pairwise(children), first):
        if told := _compare(one, other):
            return f"blocks {number} and {number + 1} of {container or 'the model'} differ in {told}"
    return ""


def nearest_miss(model: nn.Module) -> str:
    """Why the longest row of neighbors of one class is no chain, "" where no two neighbors are of one class."""
    best = (0, "")
    for container, module in model.named_modules():
        children, start = _children(module), 0
        for end in range(1, len(children) + 1):
            if end < len(children) and type(children[end]) is type(children[start]):
                continue
            first = children[start]
            composite = next(first.children(), None) is not None and type(first) not in (nn.Sequential, nn.ModuleList)
            if composite and end - start > max(best[0], 1):
                best = end - start, _reason(model, container, start, end - 1)
            start = end
    return best[1]


def _reason(model: nn.Module, container: str, first: int, last: int) -> str:
    module = model.get_submodule(container)
    where = f"{container or 'the model'} blocks {first} to {last}"
    facts = [fixed(child) for child in _children(module)[first : last + 1]]
    if not isinstance(module, nn.Sequential | nn.ModuleList) and any(one == other for one, other in pairwise(facts)):
        return f"{where} are children of a {type(module).__name__}, which is no nn.Sequential or nn.ModuleList"
    told = difference(model, container, first, last)
    return told or f"{where} have parameters in common with one another or with another part of the model"


def _children(module: nn.Module) -> list[nn.Module]:
    """All of them, one that is there twice twice."""
    return [child for child in module._modules.values() if child is not None]


def _compare(one: nn.Module, other: nn.Module) -> str:
    """The first thing in which two blocks differ, "" if there is none; scalars where nothing else does."""
    left, right = fixed(one), fixed(other)
    texts, others = ({".".join(filter(None, key)): v for key, v in scalars(b).items()} for b in (one, other))
    for mine, theirs in ((left, right), (texts, others)):
        for name in [*mine, *(n for n in theirs if n not in mine)]:
            if name not in mine or name not in theirs:
                return f"{name}: only {'the first' if name in mine else 'the second'} has it"
            if repr(mine[name]) != repr(theirs[name]):
                return f"{name}: {_short(mine[name])} and {_short(theirs[name])}"
    return ""


def _short(value: object) -> str:
    value = value.__name__ if isinstance(value, type) else value
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):  # a tensor
        value = value[0]
    text = repr(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:57] + "..."


def _integers(name: str, buffer: Tensor) -> str:
    """A digest of a buffer that does not go with its block: where it holds no floats, it has to be the same in all."""
    if buffer.is_floating_point() or buffer.is_meta or name == "num_batches_tracked":
        return ""
    return blake2b(buffer.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def _described(value: object) -> object:
    """A value that is equal for attributes that do the same, and is not equal for functions that may not."""
    if isinstance(value, functools.partial):
        return "partial", _described(value.func), repr(value.args), repr(value.keywords)
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return getattr(value, "__module__", ""), value.__qualname__
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return type(value)


def _is_scalar(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_scalar(item) for item in value)
    if isinstance(value, dict):
        return all(_is_scalar(item) for pair in value.items() for item in pair)
    return isinstance(value, _SCALARS)
