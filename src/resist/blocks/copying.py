"""Copies of modules and of their attributes that refer to nothing of the original.

`copy.deepcopy` leaves functions and weak references as they are. A lambda that uses a layer of its block would go on
using the layer of the original network, whose weights are never trained. `copied` and `copied_module` replace such
references.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import copy
import copyreg
import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from resist.blocks.contents import TABLES, attributes_of, is_leaf, slots_of, touches
from resist.blocks.modules import buffers_of, children_of, parameters_of
from resist.blocks.relinking import Relinking

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
    return Relinking(memo, replacements)(clone)


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
        clone = _deep_copy(module, modules, memo)
    except Exception:  # attributes of users can raise anything: share what cannot be copied, and try again
        memo = {**replacements, **_uncopyable(module)}
        clone = _deep_copy(module, modules, memo)
    targets = {**replacements, **{id(part): memo[id(part)] for part in modules if id(part) in memo}}
    for part in modules:  # deepcopy leaves out what a module has in slots
        new = memo.get(id(part), part)
        for slot in slots_of(type(part)).values() if new is not part and type(new) is type(part) else ():
            with suppress(AttributeError):
                slot.__set__(new, copy.deepcopy(slot.__get__(part), memo))
    relinked = Relinking(memo, targets)
    for part in clone.modules():
        for name, value in attributes_of(part).items():
            if _may_refer(name, value) and (new := relinked(value)) is not value:
                if name in part.__dict__:
                    part.__dict__[name] = new
                else:  # in a slot
                    object.__setattr__(part, name, new)
        if "parametrizations" in children_of(part) and parametrize.is_parametrized(part):
            # torch makes a class for each module. A copy has one too: removing a parametrization changes the class.
            own = {name: value for name, value in vars(type(part)).items() if name not in ("__dict__", "__weakref__")}
            object.__setattr__(part, "__class__", type(type(part).__name__, type(part).__bases__, own))
    return clone


def _deep_copy(module: nn.Module, modules: Sequence[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """Do what `copy.deepcopy` does, but copy ordinary modules attribute by attribute, which takes a fifth of the time.

    Args:
        module: Module to copy.
        modules: The modules in it, itself included.
        memo: As for `copy.deepcopy`.
    """
    copies = [(part, object.__new__(type(part))) for part in modules if id(part) not in memo and _is_ordinary(part)]
    memo.update((id(part), new) for part, new in copies)
    for part, new in copies:
        own = vars(new)
        for name, value in vars(part).items():
            if is_leaf(value):
                own[name] = value
            elif type(value) is OrderedDict and not value:  # most tables of hooks are empty
                own[name] = memo.setdefault(id(value), OrderedDict())
            else:
                own[name] = copy.deepcopy(value, memo)
    return copy.deepcopy(module, memo)


def _is_ordinary(module: nn.Module) -> bool:
    """True for a module that `copy.deepcopy` copies by its attributes only."""
    return _has_ordinary_copies(type(module)) and not vars(module).keys() & {"__deepcopy__", "_compiled_call_impl"}


@functools.cache
def _has_ordinary_copies(kind: type[nn.Module]) -> bool:
    states = kind.__getstate__, kind.__setstate__
    return (
        all(getattr(kind, name) is getattr(object, name) for name in ("__new__", "__reduce__", "__reduce_ex__"))
        and all(method.__module__.startswith("torch.nn.") for method in states)  # those only care for old files
        and not hasattr(kind, "__deepcopy__")
        and kind not in copyreg.dispatch_table
        and not slots_of(kind)
    )


def _may_refer(name: str, value: object) -> bool:
    """False for a module's own tables of weights, and for values without parts: most tables of hooks are empty."""
    return name not in TABLES and not is_leaf(value) and not (type(value) in (dict, OrderedDict) and not value)


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
            if _may_refer(name, value):
                touches(value, collect)


def detached(tensors: Iterable[Tensor]) -> dict[int, object]:
    """Replace tensors with a history by ones without.

    Args:
        tensors: The tensors.

    Returns:
        The same values without their history, by id of the tensor.
    """
    return {id(tensor): tensor.detach() for tensor in tensors}
