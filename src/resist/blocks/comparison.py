"""Comparison of attributes of two blocks.

Two values are the same if no code could tell them apart, except by their identity: numbers by their digits, tensors and
arrays by their bytes, functions by their code, defaults and closures, objects by their attributes. Modules and tensors
of the two blocks themselves are the same if they have the same position in the block. What cannot be compared (a
Python generator, a handle of a C library) is the same only if it is the same object.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import functools
import re
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from resist.blocks.contents import (
    Scope,
    attributes_of,
    attributes_of_module,
    class_content,
    is_importable,
    is_leaf,
    parts,
    touches,
)
from resist.blocks.hooks import Hooks
from resist.blocks.modules import tables_of

# Equal if their types are: they hold no value that outlives a forward pass.
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_PARTED = (dict, list, tuple, deque, MethodType, functools.partial, property, staticmethod, classmethod)


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
