"""Block compatibility: properties that must match within one slot.

Classes, shapes and functions must match. Numbers, strings and flags may differ: a slot gets those of its block.
"""

import copy
import enum
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from types import BuiltinFunctionType, FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from resist.subnet.modules import buffers_of, children_of, named_modules, parameters_of

_SCALARS = (bool, int, float, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
AttributeKey = tuple[str, str]  # dotted name of a module within the block, name of its attribute


@dataclass(frozen=True)
class Varying:
    """An attribute that differs along a chain.

    Attributes:
        module: Dotted name of the module within the block; "" is the block itself.
        name: Name of the attribute.
        values: Value in each block of the chain.
    """

    module: str
    name: str
    values: tuple[Any, ...]

    def put(self, block: nn.Module, number: int) -> None:
        """Set the attribute to a copy of its value in another block.

        Args:
            block: Block of a sub-network to change.
            number: Number of the chain's block whose value is set.
        """
        setattr(block.get_submodule(self.module), self.name, copy.deepcopy(self.values[number]))


def fixed(block: nn.Module) -> dict[str, object]:
    """Collect the properties that blocks in the same slot must share.

    Args:
        block: A block, on any device.

    Returns:
        Classes, shapes and types of weights, and other attributes that are not scalars, by a readable name.
    """
    properties: dict[str, object] = {}
    for prefix, module in named_modules(block, remove_duplicate=False):
        properties[f"the class of {prefix or 'the block'}"] = type(module)
        dot = f"{prefix}." if prefix else ""
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                properties[f"parameter {dot}{name}"] = (
                    tuple(parameter.shape),
                    parameter.dtype,
                    parameter.requires_grad,
                )
        for name, buffer in buffers_of(module).items():
            if buffer is not None:
                properties[f"buffer {dot}{name}"] = (tuple(buffer.shape), buffer.dtype, _digest(name, buffer))
        for name, value in vars(module).items():
            if not name.startswith("_") and name != "training" and not _is_scalar(value):
                properties[f"{dot}{name}"] = _described(value)
    return properties


def scalars(block: nn.Module) -> dict[AttributeKey, Any]:
    """Collect the attributes that may differ between blocks of a slot.

    Args:
        block: A block, on any device.

    Returns:
        Numbers, strings, flags, and tuples, lists and dicts of them, by (dotted name of the module, attribute).
    """
    return {
        (prefix, name): value
        for prefix, module in named_modules(block, remove_duplicate=False)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_scalar(value)
    }


def varying(attributes: Sequence[dict[AttributeKey, Any]]) -> tuple[Varying, ...]:
    """Select the attributes that differ among blocks.

    Args:
        attributes: Result of `scalars` for each block.

    Returns:
        The attributes with their values, in the order of the first block.
    """
    return tuple(
        Varying(*key, tuple(values[key] for values in attributes))
        for key, value in attributes[0].items()
        if any(repr(values[key]) != repr(value) for values in attributes)
    )


def difference(model: nn.Module, container: str, first: int, last: int) -> str:
    """Describe the first difference between neighboring blocks.

    Args:
        model: The full network.
        container: Dotted name of a module.
        first: Position of the first of its children to compare.
        last: Position of the last one, included.

    Returns:
        A part of a sentence, "" if all these blocks are compatible or the container does not exist.
    """
    try:
        children = _children(model.get_submodule(container))[first : last + 1]
    except AttributeError:
        return ""
    for number, (left, right) in enumerate(pairwise(children), first):
        if reason := _compare(left, right):
            return f"blocks {number} and {number + 1} of {container or 'the model'} differ in {reason}"
    return ""


def nearest_miss(model: nn.Module) -> str:
    """Explain why the longest row of equal classes is not a chain.

    Args:
        model: The full network.

    Returns:
        A part of a sentence, "" if no two neighbors have the same class.
    """
    best = (0, "")
    for container, module in named_modules(model):
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
    properties = [fixed(child) for child in _children(module)[first : last + 1]]
    matching = any(left == right for left, right in pairwise(properties))
    if matching and not isinstance(module, nn.Sequential | nn.ModuleList):
        return f"{where} are children of a {type(module).__name__}, which is not an nn.Sequential or nn.ModuleList"
    return (
        difference(model, container, first, last)
        or f"{where} have parameters in common with one another or with another part of the model"
    )


def _children(module: nn.Module) -> list[nn.Module]:
    """All children; one that is registered twice appears twice."""
    return [child for child in children_of(module).values() if child is not None]


def _compare(first: nn.Module, second: nn.Module) -> str:
    """The first difference between two blocks, scalars last; "" if none."""
    attributes = [{".".join(filter(None, key)): v for key, v in scalars(block).items()} for block in (first, second)]
    for left, right in ((fixed(first), fixed(second)), attributes):
        for name in [*left, *(n for n in right if n not in left)]:
            if name not in left or name not in right:
                return f"{name}: only {'the first' if name in left else 'the second'} has it"
            if repr(left[name]) != repr(right[name]):
                return f"{name}: {_short(left[name])} and {_short(right[name])}"
    return ""


def _short(value: object) -> str:
    """A value as text of at most 60 characters."""
    items: Sequence[object] = cast(Sequence[object], value) if isinstance(value, tuple) else []
    if items and isinstance(items[0], tuple):  # a tensor: its shape
        value = cast(object, items[0])
    if isinstance(value, type):
        value = value.__name__
    text = value if isinstance(value, str) else repr(cast(object, value))
    return text if len(text) <= 60 else text[:57] + "..."


def _digest(name: str, buffer: Tensor) -> str:
    """Digest of a buffer that must match, because it stays in its slot; "" for others."""
    if buffer.is_floating_point() or buffer.is_meta or name == "num_batches_tracked":
        return ""
    return blake2b(buffer.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes(), digest_size=8).hexdigest()


def _described(value: object) -> object:
    """A description that is equal for attributes with equal behavior."""
    if isinstance(value, functools.partial):
        return "partial", _described(value.func), repr(value.args), repr(value.keywords)
    if isinstance(value, FunctionType | BuiltinFunctionType | type):
        return getattr(value, "__module__", ""), value.__qualname__
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    return type(value)


def _is_scalar(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_scalar, cast(Sequence[object], value)))
    if isinstance(value, dict):
        entries = cast(dict[object, object], value)
        return all(map(_is_scalar, (*entries.keys(), *entries.values())))
    return isinstance(value, _SCALARS)
