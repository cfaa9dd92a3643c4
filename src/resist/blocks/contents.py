"""Content of Python values: the parts that attributes consist of, in any depth and with cycles."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import enum
import functools
import sys
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CellType,
    EllipsisType,
    FunctionType,
    MethodType,
    ModuleType,
    NotImplementedType,
)
from typing import Any

import torch
from torch import Tensor, nn

from resist.blocks.modules import OF_MODULE, buffers_of, named_modules, parameters_of, tables_of

TABLES = ("_parameters", "_buffers", "_modules")  # attributes of a module that hold its tensors and children

CACHED = type(functools.lru_cache(len))  # type of a function with a cache
_PLAIN = (bool, int, float, complex, str, bytes, type(None), EllipsisType, NotImplementedType, range)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_LEAVES = frozenset((*_PLAIN, *_TORCH))
_BUDGET = 200_000  # parts of a shared value that are searched for modules of a block


class Scope:
    """Modules and tensors of a block, by their position in it.

    Args:
        block: The block.
        positions: The positions, instead of a block.

    Attributes:
        positions: Position by id: "module norm" or "tensor norm.weight".
    """

    def __init__(self, block: nn.Module | None = None, positions: dict[int, str] | None = None) -> None:
        self.positions = positions or {}
        self._objects: list[object] = []  # keeps the ids valid
        for prefix, module in () if block is None else named_modules(block):
            self._add(module, f"module {prefix}")
            for name, tensor in (*parameters_of(module).items(), *buffers_of(module).items()):
                if tensor is not None:
                    self._add(tensor, f"tensor {prefix}.{name}")

    def _add(self, value: object, position: str) -> None:
        self.positions.setdefault(id(value), position)
        self._objects.append(value)

    def __contains__(self, value: object) -> bool:
        return id(value) in self.positions


def is_leaf(value: object) -> bool:
    """Check for a value without parts, which is never copied.

    Args:
        value: Any value.

    Returns:
        True for a number, string, flag, enum member, dtype and the like.
    """
    return type(value) in _LEAVES or isinstance(type(value), enum.EnumMeta)


def touches(value: object, found: Callable[[object], bool]) -> bool:
    """Search a value and its parts, without the insides of modules.

    Args:
        value: Any value.
        found: Test of each part.

    Returns:
        True if a part passes the test.
    """
    seen: dict[int, object] = {}
    stack: list[object] = [value]
    while stack and len(seen) < _BUDGET:
        part = stack.pop()
        if is_leaf(part) or id(part) in seen:
            continue
        if found(part):
            return True
        seen[id(part)] = part
        if not issubclass(type(part), nn.Module | Tensor | type | ModuleType):
            stack.extend(parts(part))
    return False


def parts(value: object) -> Iterator[object]:
    """Iterate over the values that a value consists of.

    Args:
        value: Any value. A function consists of its defaults and the contents of its closure.

    Yields:
        The parts, in their order.
    """
    kind = type(value)
    if issubclass(kind, dict):
        for key, item in dict.items(value):  # type: ignore[arg-type]
            yield key
            yield item
    elif issubclass(kind, list | tuple | set | frozenset | deque):
        yield from value  # type: ignore[misc]
    elif isinstance(value, FunctionType):
        yield value.__defaults__
        yield value.__kwdefaults__
        yield from contents_of(value.__closure__ or ())
    elif isinstance(value, MethodType):
        yield value.__func__
        yield value.__self__
    elif isinstance(value, BuiltinFunctionType):
        yield getattr(value, "__self__", None)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, weakref.ref):
        yield value()
    elif isinstance(value, property):
        yield from (value.fget, value.fset, value.fdel)
    elif isinstance(value, staticmethod | classmethod):
        yield value.__func__
    elif issubclass(kind, nn.Module):
        for table in tables_of(value).values():  # type: ignore[arg-type]
            yield from table.values()
    if issubclass(kind, defaultdict):
        yield value.default_factory  # type: ignore[attr-defined]
    elif issubclass(kind, deque):
        yield value.maxlen  # type: ignore[attr-defined]
    yield from attributes_of(value).values()


def clear_caches(block: nn.Module) -> None:
    """Clear the caches of functions in a block (`functools.lru_cache`), whose results may be those of another block.

    Args:
        block: A block whose attributes have been changed.
    """
    for module in block.modules():
        for function in (*_cached_methods(type(module)), *attributes_of(module).values()):
            if type(function) is CACHED:
                function.cache_clear()


@functools.cache
def _cached_methods(kind: type) -> tuple[Any, ...]:
    return tuple(value for base in kind.__mro__ for value in vars(base).values() if type(value) is CACHED)


def contents_of(cells: Iterable[CellType]) -> Iterator[object]:
    """Iterate over the contents of a closure; an empty cell has none.

    Args:
        cells: `__closure__` of a function.

    Yields:
        The contents.
    """
    for cell in cells:
        try:
            yield cell.cell_contents
        except ValueError:
            yield None


def attributes_of(value: object) -> dict[str, Any]:
    """Collect what an object keeps in its `__dict__` and its slots.

    Args:
        value: Any value.

    Returns:
        The attributes by name.
    """
    if isinstance(value, type | ModuleType):
        return {}
    try:
        attributes = dict(object.__getattribute__(value, "__dict__"))
    except (AttributeError, TypeError):
        attributes = {}
    for name, slot in slots_of(type(value)).items():
        try:
            attributes[name] = slot.__get__(value)
        except AttributeError:
            continue
    return attributes


@functools.cache
def slots_of(kind: type) -> dict[str, Any]:
    """Collect the slots that classes of Python code declare.

    Args:
        kind: A class.

    Returns:
        The descriptor of each slot by its name, as `__slots__` spells it, or mangled if it begins with "__".
    """
    slots: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        names = base.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else tuple(names):
            if name.startswith("__") and not name.endswith("__"):
                name = f"_{base.__name__.lstrip('_')}{name}"
            if name not in ("__dict__", "__weakref__") and name in base.__dict__:
                slots[name] = base.__dict__[name]
    return slots


def attributes_of_module(module: nn.Module) -> dict[str, Any]:
    """Collect the attributes of a module that nn.Module does not keep itself.

    Args:
        module: Any module.

    Returns:
        The attributes by name, private ones too.
    """
    return {name: value for name, value in attributes_of(module).items() if name not in OF_MODULE}


def is_importable(kind: type) -> bool:
    """Check for a class that its module has under its name.

    Args:
        kind: A class.

    Returns:
        False for a class that was made in a function or by `type(...)`.
    """
    found: object = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


_IGNORED = frozenset(
    (
        *("__dict__", "__weakref__", "__doc__", "__module__", "__qualname__", "__annotations__"),
        *("__abstractmethods__", "_abc_impl", "__firstlineno__", "__static_attributes__"),
    )
)


def class_content(kind: type) -> dict[str, Any]:
    """Collect what a class defines.

    Args:
        kind: A class of Python code.

    Returns:
        Functions and attributes by name.
    """
    left_out = _IGNORED | slots_of(kind).keys()
    return {name: value for name, value in vars(kind).items() if name not in left_out}
