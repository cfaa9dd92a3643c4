"""Copies of modules and of their attributes that refer to nothing of the original.

`copy.deepcopy` leaves functions and weak references as they are. A lambda that uses a layer of its block would go on
using the layer of the original network, whose weights are never trained. `copied` and `copied_module` replace such
references.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import copy
import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from resist.blocks.contents import CACHED, TABLES, attributes_of, is_leaf, parts, slots_of, touches
from resist.blocks.modules import buffers_of, parameters_of

_COPYABLE = (dict, list, tuple, set, frozenset, deque, FunctionType, MethodType, ModuleType)  # or shared by deepcopy


def copied(value: Any, replacements: Mapping[int, object]) -> Any:
    """Copy a value deeply, with other objects in place of some of its parts.

    Args:
        value: Any value.
        replacements: Object to use instead of a part, by id of the part. The parts have to outlive the call.

    Returns:
        The copy. Functions without a reference to a replaced part are shared with the original.
    """
    memo: dict[int, Any] = dict(replacements)
    clone = copy.deepcopy(value, memo)
    return _Relinking(memo, replacements)(clone)


def copied_module(module: nn.Module, replacements: Mapping[int, object]) -> nn.Module:
    """Copy a module deeply, with other objects in place of some tensors and modules.

    Args:
        module: Module to copy. It is not changed.
        replacements: Object to use instead of a part, by id of the part.

    Returns:
        The copy.
    """
    memo: dict[int, Any] = dict(replacements)
    modules = list(module.modules())
    try:
        clone = copy.deepcopy(module, memo)
    except Exception:  # attributes of users can raise anything: share what cannot be copied, and try again
        memo = {**replacements, **_uncopyable(module)}
        clone = copy.deepcopy(module, memo)
    targets = {**replacements, **{id(part): memo[id(part)] for part in modules if id(part) in memo}}
    for part in modules:  # deepcopy leaves out what a module has in slots
        new = memo.get(id(part), part)
        for slot in slots_of(type(part)).values() if new is not part and type(new) is type(part) else ():
            with suppress(AttributeError):
                slot.__set__(new, copy.deepcopy(slot.__get__(part), memo))
    relinked = _Relinking(memo, targets)
    for part in clone.modules():
        for name, value in attributes_of(part).items():
            if name not in TABLES and (new := relinked(value)) is not value:
                if name in part.__dict__:
                    part.__dict__[name] = new
                else:  # in a slot
                    object.__setattr__(part, name, new)
        if parametrize.is_parametrized(part):
            # torch makes a class for each module. A copy has one too: removing a parametrization changes the class.
            own = {name: value for name, value in vars(type(part)).items() if name not in ("__dict__", "__weakref__")}
            object.__setattr__(part, "__class__", type(type(part).__name__, type(part).__bases__, own))
    return clone


def outside(root: nn.Module, module: nn.Module) -> dict[int, object]:
    """Collect the modules and tensors of a network outside of one of its modules.

    Args:
        root: The network.
        module: A module within it.

    Returns:
        Each one by its own id: a copy of `module` with them as replacements refers to them as `module` does.
    """
    inside = {id(part) for part in module.modules()}
    others: list[object] = []
    for part in root.modules():
        if id(part) not in inside:
            others += [part, *parameters_of(part).values(), *buffers_of(part).values()]
    within = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return {id(part): part for part in others if part is not None and id(part) not in within}


def activations(module: nn.Module) -> list[Tensor]:
    """Collect the results of computations that modules keep, which cannot be copied.

    Args:
        module: Any module.

    Returns:
        Tensors with a history, wherever they are in the attributes.
    """
    found: dict[int, Tensor] = {}

    def collect(part: object) -> bool:
        if isinstance(part, Tensor) and part.grad_fn is not None:
            found[id(part)] = part
        return False

    _search(module, collect)
    for buffer in module.buffers():
        collect(buffer)
    return list(found.values())


def _uncopyable(module: nn.Module) -> dict[int, object]:
    """Parts of attributes that cannot be copied (locks, files, handles of C libraries), each by its own id."""
    shared: dict[int, object] = {}

    def collect(part: object) -> bool:
        if type(part) not in _COPYABLE and not issubclass(type(part), nn.Module | Tensor | type):
            try:
                part.__reduce_ex__(4)
                getattr(part, "__deepcopy__", None)  # a class with a `__getattr__` of its own may raise
            except Exception:
                shared[id(part)] = part
        return False

    _search(module, collect)
    return shared


def _search(module: nn.Module, collect: Callable[[object], bool]) -> None:
    """Show all parts of the attributes of a network to a function."""
    for part in module.modules():
        for name, value in part.__dict__.items():
            if name not in TABLES and not is_leaf(value):
                touches(value, collect)


class _Relinking:
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


def detached(tensors: Iterable[Tensor]) -> dict[int, object]:
    """Replace tensors with a history by ones without.

    Args:
        tensors: The tensors.

    Returns:
        The same values without their history, by id of the tensor.
    """
    return {id(tensor): tensor.detach() for tensor in tensors}
