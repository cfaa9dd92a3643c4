"""Changes of attributes by the code of a module itself, as opposed to the user."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import dis
import functools
import inspect
from types import CodeType, FunctionType

from torch import nn

from resist.blocks.contents import is_leaf
from resist.blocks.snapshots import MISSING


def is_changed_by_itself(module: nn.Module, name: str, before: object, now: object) -> bool:
    """Check whether the code of a module has changed one of its attributes, and not the user.

    Args:
        module: The module.
        name: Name of the attribute.
        before: A value of the attribute.
        now: Another one, later.

    Returns:
        True if the module did not have it before; if it is a container or another object before and now; if code that
        runs in `forward` or `train` assigns it.
    """
    if before is MISSING or not (is_leaf(before) or is_leaf(now)):
        return True
    return _assigns(type(module), name)


@functools.cache
def _assigns(kind: type, name: str) -> bool:
    """True if the code that `forward` or `train` of a class runs assigns this attribute, or it is a cached property."""
    if isinstance(inspect.getattr_static(kind, name, None), functools.cached_property):
        return True
    seen: set[str] = set()
    names = ["forward", "train"]
    while names:
        method = names.pop()
        if method in seen:
            continue
        seen.add(method)
        function = inspect.unwrap(inspect.getattr_static(kind, method, None))  # without decorators
        codes = [function.__code__] if isinstance(function, FunctionType) else []
        while codes:
            code = codes.pop()
            if any(i.opname in ("STORE_ATTR", "DELETE_ATTR") and i.argval == name for i in dis.get_instructions(code)):
                return True
            names += code.co_names
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return False
