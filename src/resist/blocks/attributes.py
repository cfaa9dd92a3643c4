"""Attributes that differ along a chain: they go with their block, as its weights do.

The values are those of build time; `resist.blocks.placement` puts them into the slots.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from resist.blocks.comparison import Comparison
from resist.blocks.contents import Scope, attributes_of_module, is_importable, is_leaf, slots_of
from resist.blocks.copying import copied
from resist.blocks.hooks import Hooks
from resist.blocks.modules import named_modules
from resist.blocks.own_changes import is_changed_by_itself
from resist.blocks.snapshots import MISSING, Content, snapshot_of

AttributeKey = tuple[str, str]  # dotted name of a module within the block, name of its attribute
CLASS, HOOKS = "__class__", "hooks"  # names of what is no attribute in the table of a module


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

    def part(self, start: int, end: int) -> "Varying | None":
        """Cut out the values of a part of the chain.

        Args:
            start: First block.
            end: Last block, not included.

        Returns:
            The attribute of the part; None if it does not differ there.
        """
        values = self.values[start:end]
        first, *others = map(snapshot_of, values)
        differs = any(not Comparison(first.scope, other.scope).same(first.value, other.value) for other in others)
        return Varying(self.module, self.name, values) if differs else None

    def put(self, block: nn.Module, number: int) -> None:
        """Set the attribute to a copy of its value in another block.

        Args:
            block: Block of a sub-network to change.
            number: Number of the chain's block whose value is set.
        """
        module, value = block.get_submodule(self.module), snapshot_of(self.values[number])
        new = copied(value.value, value.parts_in(block))
        if self.name == HOOKS:
            (Hooks(module, frozenset()) if new is MISSING else new).put(module, self._numbers)
        else:
            set_value(module, self.name, new)

    @property
    def _numbers(self) -> frozenset[int]:
        """Numbers of the hooks of all blocks."""
        values = [snapshot_of(value).value for value in self.values]
        return frozenset[int]().union(*(value.numbers for value in values if isinstance(value, Hooks)))

    def is_put(self, block: nn.Module, number: int | None) -> bool:
        """Check that a block still has the value that was put there.

        Args:
            block: Block of a sub-network.
            number: Number of the chain's block whose value was set, None if there was none.

        Returns:
            False if the value has been changed since.
        """
        if number is None:
            return True
        value, module = self.values[number], block.get_submodule(self.module)
        present = (Hooks(module, self._numbers) or MISSING) if self.name == HOOKS else value_of(module, self.name)
        if is_leaf(value) and type(value) is type(present):
            return value == present or repr(value) == repr(present)
        expected = snapshot_of(value)
        return Comparison(expected.scope, Scope(block)).same(expected.value, present)

    def is_changed_by_itself(self, block: nn.Module, number: int | None) -> bool:
        """Check whether the block has changed the attribute itself; see the function of this name.

        Args:
            block: Block of a sub-network, in which it is no longer as it was put.
            number: As in `is_put`.
        """
        if number is None or self.name in (CLASS, HOOKS):
            return False
        module, before = block.get_submodule(self.module), snapshot_of(self.values[number]).value
        return is_changed_by_itself(module, self.name, before, value_of(module, self.name))


def value_of(module: nn.Module, name: str) -> Any:
    """Return an attribute as it is kept, past any property; `MISSING` if there is none."""
    if name == CLASS:
        return type(module)
    if name in module.__dict__:
        return module.__dict__[name]
    slot = slots_of(type(module)).get(name)
    try:
        return MISSING if slot is None else slot.__get__(module)
    except AttributeError:
        return MISSING


def set_value(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute as it is kept, past any `__setattr__` or property that would derive other values from it."""
    if name == CLASS:
        object.__setattr__(module, name, value)
    elif name in slots_of(type(module)):
        if value is not MISSING:
            object.__setattr__(module, name, value)
        elif value_of(module, name) is not MISSING:
            object.__delattr__(module, name)
    elif value is MISSING:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = value


def attributes(block: nn.Module) -> dict[AttributeKey, Content]:
    """Collect the attributes of a block.

    Args:
        block: A block, on any device.

    Returns:
        All attributes of all its modules that torch does not keep itself, by (dotted name of the module, attribute).
        The class of a module is one if it was made for this module only.
    """
    scope = Scope(block)
    found: dict[AttributeKey, Content] = {}
    for prefix, module in named_modules(block, remove_duplicate=False):
        if isinstance(module, ScriptModule):  # its attributes cannot be set, see `resist.blocks.compatibility.fixed`
            continue
        for name, value in attributes_of_module(module).items():
            if not (isinstance(value, Tensor) and value.grad_fn is not None):  # a result that the module keeps
                found[prefix, name] = Content(value, scope)
        if hooks := Hooks(module):
            found[prefix, HOOKS] = Content(hooks, scope)
        if not is_importable(type(module)) and not hasattr(module, "parametrizations"):
            found[prefix, CLASS] = Content(type(module), scope)
    return found


def unequal(
    first: Mapping[AttributeKey, Content], second: Mapping[AttributeKey, Content]
) -> Iterable[tuple[AttributeKey, Content | None, Content | None]]:
    """Iterate over the attributes that differ between two blocks.

    Args:
        first: Result of `attributes` for one block.
        second: That of another one.

    Yields:
        The attribute and its contents, None in a block that does not have it.
    """
    scopes = [next((content.scope for content in block.values()), None) for block in (first, second)]
    comparison = Comparison(scopes[0], scopes[1]) if scopes[0] and scopes[1] else None
    for key in dict.fromkeys((*first, *second)):
        left, right = first.get(key), second.get(key)
        if left is None or right is None or comparison is None or not comparison.same(left.value, right.value):
            yield key, left, right


def varying(blocks: Sequence[Mapping[AttributeKey, Content]]) -> tuple[Varying, ...]:
    """Select the attributes that differ among blocks.

    Args:
        blocks: Result of `attributes` for each block.

    Returns:
        The attributes with their values, in the order of the first block.
    """
    differing: dict[AttributeKey, None] = {}
    for block in blocks[1:]:
        differing.update(dict.fromkeys(key for key, _, _ in unequal(blocks[0], block)))
    order = {key: number for number, key in enumerate(blocks[0])}
    return tuple(
        Varying(*key, tuple(block[key].snapshot() if key in block else MISSING for block in blocks))
        for key in sorted(differing, key=lambda key: order.get(key, len(order)))
    )
