"""Relinking: references within copied values, to the copy in place of the original."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import copy
import functools
import weakref
from collections import deque
from collections.abc import Mapping
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from torch import Tensor, nn

from resist.blocks.contents import CACHED, TABLES, attributes_of, is_leaf, parts, touches


class Relinking:
    """Replace references within a value, in place where it can be changed.

    Args:
        memo: Copy by id of the original, as `copy.deepcopy` writes it.
        targets: Replacement by id of the original.
    """

    def __init__(self, memo: dict[int, Any], targets: Mapping[int, object]) -> None:
        self._memo, self._targets = memo, targets
        self._fresh = set(map(id, memo.values()))
        self._done: dict[int, tuple[object, object]] = {}

    def __call__(self, value: Any) -> Any:
        if is_leaf(value) or isinstance(value, type | ModuleType):
            return value
        if id(value) in self._targets:
            return self._targets[id(value)]
        if id(value) in self._done:
            return self._done[id(value)][1]
        if isinstance(value, Tensor):
            return value
        self._done[id(value)] = value, value
        new = self._replaced(value)
        self._done[id(value)] = value, new
        return new

    def _replaced(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, MethodType):
            owner, function = self(value.__self__), self(value.__func__)
            same = owner is value.__self__ and function is value.__func__
            return value if same else MethodType(function, owner)
        if isinstance(value, BuiltinFunctionType):
            owner = value.__self__
            new = self(owner) if not self._shared(owner) else owner
            return value if new is owner else getattr(new, value.__name__)
        if kind is functools.partial:
            old = value.func, value.args, value.keywords
            new = tuple(map(self, old))
            return value if all(map(_is, old, new)) else functools.partial(new[0], *new[1], **new[2])
        if kind is CACHED:
            new = self(value.__wrapped__)
            return value if new is value.__wrapped__ else functools.lru_cache(**value.cache_parameters())(new)
        if kind is weakref.ref or kind is weakref.WeakMethod:
            target = value()
            new = target if target is None else self(target)
            return value if new is target else kind(new)
        if issubclass(kind, tuple):
            items = [self(item) for item in value]
            if all(map(_is, items, value)):
                return value
            make = cast(Any, kind)
            return make(*items) if hasattr(kind, "_fields") else make(items)
        if self._shared(value):
            return value
        if issubclass(kind, frozenset):
            items = [self(item) for item in value]
            return value if all(map(_is, items, value)) else cast(Any, kind)(items)
        if issubclass(kind, nn.Module):
            for part in parts(value):
                self(part)
        self._within(kind, value)
        self._attributes(value)
        return value

    def _shared(self, value: object) -> bool:
        """True for an object of the original, which must not be changed."""
        return id(value) not in self._fresh

    def _within(self, kind: type, value: Any) -> None:
        """Replace the items of a container in place."""
        if issubclass(kind, dict):
            old = list(dict.items(value))
            new = [(self(key), self(item)) for key, item in old]
            if any(key is not old_key for (key, _), (old_key, _) in zip(new, old, strict=True)):
                value.clear()
                value.update(new)
                return
            for (key, item), (_, old_item) in zip(new, old, strict=True):
                if item is not old_item:
                    dict.__setitem__(value, key, item)
        elif issubclass(kind, list | deque):
            for index, item in enumerate(list(value)):
                if (new_item := self(item)) is not item:
                    value[index] = new_item
        elif issubclass(kind, set):
            old_items = list(value)
            new_items = [self(item) for item in old_items]
            if not all(map(_is, old_items, new_items)):
                value.clear()
                value.update(new_items)

    def _attributes(self, value: object) -> None:
        for name, item in attributes_of(value).items():
            if issubclass(type(value), nn.Module) and name in TABLES:
                continue
            if (new := self(item)) is not item:
                object.__setattr__(value, name, new)

    def _function(self, function: FunctionType) -> FunctionType:
        """The function itself, or a copy if its closure or defaults refer to what is replaced."""
        if not touches(function, lambda part: id(part) in self._targets):
            return function
        cells = [CellType() for _ in function.__closure__ or ()]
        new = FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(cells) or None)
        self._done[id(function)] = function, new
        self._memo[id(function)] = new
        new.__kwdefaults__ = self._part(function.__kwdefaults__)
        new.__defaults__ = self._part(function.__defaults__)
        for cell, old in zip(cells, function.__closure__ or (), strict=True):
            try:
                cell.cell_contents = self._part(old.cell_contents)
            except ValueError:  # an empty cell
                continue
        for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
            setattr(new, name, getattr(function, name))
        new.__dict__.update(self._part(function.__dict__))
        return new

    def _part(self, content: Any) -> Any:
        """Copy and relink a content that refers to what is replaced; others are shared."""
        if not touches(content, lambda part: id(part) in self._targets):
            return content
        if id(content) in self._targets or isinstance(content, FunctionType | MethodType):
            return self(content)
        new = copy.deepcopy(content, self._memo)
        self._fresh = set(map(id, self._memo.values()))
        return self(new)


def _is(left: object, right: object) -> bool:
    return left is right
