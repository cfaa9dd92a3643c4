"""Content of Python values: comparison of attributes of two blocks.

Two values are the same if no code could tell them apart, except by their identity: numbers by their digits, tensors and
arrays by their bytes, functions by their code, defaults and closures, objects by their attributes, in any depth and
with cycles. Modules and tensors of the two blocks themselves are the same if they have the same position in the block.
What cannot be compared (a generator, a handle of a C library) is the same only if it is the same object.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import enum
import functools
import re
import sys
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    EllipsisType,
    FunctionType,
    MethodType,
    ModuleType,
    NotImplementedType,
)
from typing import Any

import torch
from torch import Tensor, nn

from resist.blocks.modules import OF_MODULE, buffers_of, hook_tables_of, named_modules, parameters_of, tables_of

_PLAIN = (bool, int, float, complex, str, bytes, type(None), EllipsisType, NotImplementedType, range)
_TORCH = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_LEAVES = frozenset((*_PLAIN, *_TORCH))
# Equal if their types are: they hold no value that outlives a forward pass.
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_WRAPPERS = (staticmethod, classmethod)
_PARTED = (dict, list, tuple, deque, MethodType, functools.partial, property, *_WRAPPERS)
_BUDGET = 200_000  # parts of a shared value that are searched for modules of a block


class Scope:
    """Modules and tensors of a block, by their position in it.

    Args:
        block: The block.

    Attributes:
        positions: Position by id: "module norm" or "tensor norm.weight".
    """

    def __init__(self, block: nn.Module) -> None:
        self.positions: dict[int, str] = {}
        self.objects: list[object] = []  # keeps the ids valid
        for prefix, module in named_modules(block):
            self._add(module, f"module {prefix}")
            for name, tensor in (*parameters_of(module).items(), *buffers_of(module).items()):
                if tensor is not None:
                    self._add(tensor, f"tensor {prefix}.{name}")

    def _add(self, value: object, position: str) -> None:
        self.positions.setdefault(id(value), position)
        self.objects.append(value)

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
    elif isinstance(value, _WRAPPERS):
        yield value.__func__
    elif issubclass(kind, nn.Module):
        for table in tables_of(value).values():  # type: ignore[arg-type]
            yield from table.values()
    if issubclass(kind, defaultdict):
        yield value.default_factory  # type: ignore[attr-defined]
    elif issubclass(kind, deque):
        yield value.maxlen  # type: ignore[attr-defined]
    yield from attributes_of(value).values()


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


class Hooks:
    """The hooks of a module, which are compared without their numbers.

    Args:
        module: The module.
        numbers: Take only the hooks with these numbers. Default: all.

    Attributes:
        tables: The hooks by the name of their table, each with its number.
        full_backward: Flag that the module keeps with its backward hooks.
    """

    def __init__(self, module: nn.Module, numbers: frozenset[int] | None = None) -> None:
        self.tables = {
            name: [(key, hook) for key, hook in table.items() if numbers is None or key in numbers]
            for name, table in hook_tables_of(module).items()
        }
        self.full_backward = vars(module).get("_is_full_backward_hook")

    def __bool__(self) -> bool:
        """True if there is a hook."""
        return any(self.tables.values())

    @property
    def numbers(self) -> frozenset[int]:
        """Numbers of the hooks."""
        return frozenset(key for table in self.tables.values() for key, _ in table)

    def contents(self) -> list[list[Any]]:
        """Return the hooks of each table."""
        return [[hook for _, hook in self.tables[name]] for name in sorted(self.tables)]

    def put(self, module: nn.Module, instead: frozenset[int]) -> None:
        """Set the hooks of a module, before those that it has.

        Args:
            module: Module to change.
            instead: Numbers of the hooks to remove.
        """
        for name, table in hook_tables_of(module).items():
            rest = {key: hook for key, hook in table.items() if key not in instead}
            table.clear()
            table.update({**dict(self.tables.get(name, ())), **rest})
        if self.full_backward is not None:
            module.__dict__["_is_full_backward_hook"] = self.full_backward


class Comparison:
    """Comparison of values of two blocks.

    Args:
        left: Scope of the first block.
        right: Scope of the second one.
    """

    def __init__(self, left: Scope, right: Scope) -> None:
        self._left, self._right = left.positions, right.positions
        # Pairs that are being compared, or have been found to be the same. A pair that meets itself again is the same.
        self._pairs: dict[tuple[int, int], tuple[object, object]] = {}

    def same(self, left: object, right: object) -> bool:
        """Compare two values.

        Args:
            left: Value in the first block.
            right: Value in the second one.

        Returns:
            True if they are the same.
        """
        before = len(self._pairs)
        try:
            result = self._same(left, right)
        except RecursionError:
            result = False
        if not result:  # forget what was assumed on the way
            for pair in list(self._pairs)[before:]:
                del self._pairs[pair]
        return result

    def _own(self, part: object) -> bool:
        return id(part) in self._left or id(part) in self._right

    def _same(self, left: Any, right: Any) -> bool:
        position, other = self._left.get(id(left)), self._right.get(id(right))
        if position is not None or other is not None:
            return position == other
        kind = type(left)
        if kind is not type(right):
            return False
        if is_leaf(left):
            return left is right or repr(left) == repr(right)
        pair = id(left), id(right)
        if pair in self._pairs:
            return True
        if left is right and (issubclass(kind, nn.Module | Tensor | type) or not touches(left, self._own)):
            return True
        self._pairs[pair] = left, right
        return self._same_parts(kind, left, right)

    def _all(self, left: Iterable[object], right: Iterable[object]) -> bool:
        left, right = list(left), list(right)
        return len(left) == len(right) and all(map(self._same, left, right))

    def _same_parts(self, kind: type, left: Any, right: Any) -> bool:
        """Compare two values of one type that are not the same object."""
        if issubclass(kind, Tensor):
            return same_tensor(left, right) and self._same(vars(left), vars(right))
        if issubclass(kind, _LOCKS):
            return True
        if issubclass(kind, type):
            return self._same_class(left, right)
        if issubclass(kind, nn.Module):
            tables = [[list(table.items()) for table in tables_of(module).values()] for module in (left, right)]
            values = zip(tables, (left, right), strict=True)
            return self._same(*((own, Hooks(module), attributes_of_module(module)) for own, module in values))
        if issubclass(kind, FunctionType):
            code = left.__code__ == right.__code__ and left.__globals__ is right.__globals__
            return code and self._all(parts(left), parts(right))
        if issubclass(kind, BuiltinFunctionType):
            return left.__name__ == right.__name__ and self._all(parts(left), parts(right))
        if issubclass(kind, CodeType):
            return left == right
        if issubclass(kind, Hooks):
            return self._same(left.contents(), right.contents())
        if issubclass(kind, weakref.ref):
            return left() is not None and self._all(parts(left), parts(right))
        if issubclass(kind, set | frozenset):
            return self._same_sets(left, right) and self._same(attributes_of(left), attributes_of(right))
        if issubclass(kind, _PARTED):
            return self._all(parts(left), parts(right))
        if issubclass(kind, re.Pattern):
            return (left.pattern, left.flags) == (right.pattern, right.flags)
        if kind.__module__ == "numpy":
            return self._same_array(left, right)
        if issubclass(kind, torch.Generator):
            return left.device == right.device and torch.equal(left.get_state(), right.get_state())
        return self._same_objects(left, right)

    def _same_sets(self, left: Any, right: Any) -> bool:
        if len(left) != len(right):
            return False
        rest = list(right)
        for item in left:
            match = next((n for n, other in enumerate(rest) if self.same(item, other)), None)
            if match is None:
                return False
            rest.pop(match)
        return True

    def _same_array(self, left: Any, right: Any) -> bool:
        if not (hasattr(left, "dtype") and hasattr(left, "tobytes") and hasattr(left, "shape")):
            return self._same_objects(left, right)
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        if left.dtype.hasobject:
            return self._same(left.tolist(), right.tolist())
        return bool(left.tobytes() == right.tobytes())

    def _same_class(self, left: type, right: type) -> bool:
        """Compare two classes that were made by the same code, one for each block."""
        if is_importable(left) or is_importable(right):
            return False
        return self._all(left.__bases__, right.__bases__) and self._same(class_content(left), class_content(right))

    def _same_objects(self, left: Any, right: Any) -> bool:
        attributes = attributes_of(left), attributes_of(right)
        states = []
        for value in (left, right):
            try:
                states.append(_reduced(value))
            except Exception:  # it cannot be pickled
                states.append(None)
        if None in states:
            # Without a state, only attributes of Python code can be compared, and only if there is nothing else.
            hidden = any(not base.__flags__ & 1 << 9 for base in type(left).__mro__[:-1])  # a class of C code
            return not hidden and bool(attributes[0]) and self._same(*attributes)
        return self._same(*attributes) and self._same(*states)


def _reduced(value: Any) -> tuple[object, ...] | str:
    """What pickle would store of an object, without its own class."""
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
        return reduced
    return tuple(list(part) if isinstance(part, Iterator) else part for part in reduced)


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


def same_tensor(left: Tensor, right: Tensor) -> bool:
    """Compare two tensors bit for bit.

    Args:
        left: A tensor on any device.
        right: Another one.

    Returns:
        True if type, shape and bits are equal. On the meta device there are no bits.
    """
    if (left.shape, left.dtype, left.layout) != (right.shape, right.dtype, right.layout):
        return False
    if left.requires_grad != right.requires_grad or left.is_meta != right.is_meta:
        return False
    if left.is_meta:
        return True
    try:
        return all(
            torch.equal(*(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in pair))
            for pair in zip(_strided(left), _strided(right), strict=True)
        )
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return False


def _strided(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that a tensor consists of."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.is_quantized:
        return [tensor.int_repr(), tensor.dequantize()]
    return [tensor.resolve_conj().resolve_neg()]
