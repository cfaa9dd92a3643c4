"""Attributes that differ along a chain: they go with their block, as its weights do.

The values are those of build time; `resist.blocks.placement` puts them into the slots.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.jit import ScriptModule

from resist.blocks.comparison import Comparison
from resist.blocks.contents import Scope, attributes_of_module, is_importable, is_leaf, slots_of, touches
from resist.blocks.copying import copied
from resist.blocks.hooks import Hooks
from resist.blocks.modules import buffers_of, named_modules, parameters_of

AttributeKey = tuple[str, str]  # dotted name of a module within the block, name of its attribute
CLASS, HOOKS = "__class__", "hooks"  # names of what is no attribute in the table of a module


class _Missing:
    """Value of an attribute that a block does not have."""

    def __repr__(self) -> str:
        return "missing"

    def __deepcopy__(self, memo: object) -> "_Missing":
        return self


MISSING = _Missing()


class _Own:
    """Stands for a module or tensor of the block that a copied value is put into."""

    def __init__(self, position: str) -> None:
        self.position = position


@dataclass(frozen=True)
class Content:
    """Value of an attribute in one block.

    Attributes:
        value: The value.
        scope: Scope of the block.
    """

    value: Any
    scope: Scope = field(compare=False)

    def __repr__(self) -> str:
        """Text that differs for values that differ."""
        if is_leaf(self.value):
            return repr(self.value)
        if isinstance(self.value, tuple | list) and all(map(is_leaf, self.value)):
            return repr(self.value)
        return f"<{type(self.value).__name__} {id(self.value)}>"

    def snapshot(self) -> Any:
        """Copy the value, so that it refers to nothing of the network.

        Returns:
            The value, or a `Snapshot` of one that refers to modules or tensors of its own block.

        Raises:
            Exception: If the value cannot be copied.
        """
        if is_leaf(self.value) or isinstance(self.value, type):
            return self.value
        own: dict[int, object] = {}

        def collect(part: object) -> bool:
            if part in self.scope:
                own[id(part)] = _Own(self.scope.positions[id(part)])
            return False

        touches(self.value, collect)
        value = copied(self.value, own)
        return Snapshot(value, tuple(own.values())) if own else value  # type: ignore[arg-type]

    def obstacle(self) -> str:
        """Explain why the value cannot go with its block.

        Returns:
            A part of a sentence; "" if it can.
        """
        reasons: list[str] = []

        def check(part: object) -> bool:
            if part in self.scope:
                return False
            if isinstance(part, Tensor) and part.requires_grad and part.is_leaf:
                reasons.append("holds a parameter that is not registered in the network")
            elif isinstance(part, nn.Module) and any(True for _ in (*part.parameters(), *part.buffers())):
                reasons.append(f"refers to a {type(part).__name__} that is not registered in the block")
            return bool(reasons)

        if touches(self.value, check):
            return reasons[0]
        try:
            self.snapshot()
        except Exception as error:  # values of users can raise anything
            return f"cannot be copied ({type(error).__name__})"
        return ""


@dataclass(frozen=True)
class Snapshot:
    """Copy of a value that refers to modules or tensors of its own block.

    Attributes:
        value: The copy, with placeholders for them.
        own: The placeholders.
    """

    value: Any
    own: tuple[_Own, ...]

    def in_block(self, block: nn.Module) -> dict[int, object]:
        """Find what the placeholders stand for.

        Args:
            block: A block.

        Returns:
            Module or tensor of the block by id of the placeholder.
        """
        return {id(own): _part(block, own.position) for own in self.own}


def _part(block: nn.Module, position: str) -> object:
    kind, _, name = position.partition(" ")
    if kind == "module":
        return block.get_submodule(name)
    prefix, _, key = name.rpartition(".")
    module = block.get_submodule(prefix)
    return parameters_of(module).get(key, buffers_of(module).get(key))


class _SnapshotScope(Scope):
    """Scope of a snapshot: its placeholders."""

    def __init__(self, value: Any) -> None:
        own = value.own if isinstance(value, Snapshot) else ()
        self.objects = list(own)
        self.positions = {id(one): one.position for one in own}


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
        differs = any(not _same_snapshots(values[0], value) for value in values)
        return Varying(self.module, self.name, values) if differs else None

    def put(self, block: nn.Module, number: int) -> None:
        """Set the attribute to a copy of its value in another block.

        Args:
            block: Block of a sub-network to change.
            number: Number of the chain's block whose value is set.
        """
        module, value = block.get_submodule(self.module), self.values[number]
        new = copied(value.value, value.in_block(block)) if isinstance(value, Snapshot) else copied(value, {})
        if self.name == HOOKS:
            (Hooks(module, frozenset()) if new is MISSING else new).put(module, self._numbers)
        else:
            _set(module, self.name, new)

    @property
    def _numbers(self) -> frozenset[int]:
        """Numbers of the hooks of all blocks."""
        values = [value.value if isinstance(value, Snapshot) else value for value in self.values]
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
        value = self.values[number]
        module = block.get_submodule(self.module)
        hooks = Hooks(module, self._numbers) or MISSING
        present = hooks if self.name == HOOKS else _get(module, self.name)
        if is_leaf(value) and type(value) is type(present):
            return value == present or repr(value) == repr(present)
        expected = value.value if isinstance(value, Snapshot) else value
        return Comparison(_SnapshotScope(value), Scope(block)).same(expected, present)


def _same_snapshots(left: Any, right: Any) -> bool:
    scopes = _SnapshotScope(left), _SnapshotScope(right)
    left, right = (value.value if isinstance(value, Snapshot) else value for value in (left, right))
    return Comparison(*scopes).same(left, right)


def _get(module: nn.Module, name: str) -> Any:
    if name == CLASS:
        return type(module)
    if name in module.__dict__:
        return module.__dict__[name]
    slot = slots_of(type(module)).get(name)
    try:
        return MISSING if slot is None else slot.__get__(module)
    except AttributeError:
        return MISSING


def _set(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute as it is kept, past any `__setattr__` or property that would derive other values from it."""
    if name == CLASS:
        object.__setattr__(module, name, value)
    elif name in slots_of(type(module)):
        if value is not MISSING:
            object.__setattr__(module, name, value)
        elif _get(module, name) is not MISSING:
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
