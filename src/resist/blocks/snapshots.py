"""Snapshots: values of attributes, copied so that they refer to nothing of the network."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from resist.blocks.contents import Scope, is_leaf, touches
from resist.blocks.copying import copied
from resist.blocks.modules import buffers_of, parameters_of


class _Missing:
    """Value of an attribute that a block does not have."""

    def __repr__(self) -> str:
        return "missing"

    def __reduce__(self) -> str:
        return "MISSING"


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
    """Copy of a value that may refer to modules or tensors of its own block.

    Attributes:
        value: The copy, with placeholders for them.
        own: The placeholders.
    """

    value: Any
    own: tuple[_Own, ...] = ()

    @property
    def scope(self) -> Scope:
        """Scope of the copy: its placeholders."""
        return Scope(positions={id(own): own.position for own in self.own})

    def parts_in(self, block: nn.Module) -> dict[int, object]:
        """Find what the placeholders stand for.

        Args:
            block: A block.

        Returns:
            Module or tensor of the block by id of the placeholder.
        """
        return {id(own): part_of(block, own.position) for own in self.own}


def snapshot_of(value: Any) -> Snapshot:
    """Return a value of `Varying.values` as a snapshot."""
    return value if isinstance(value, Snapshot) else Snapshot(value)


def part_of(block: nn.Module, position: str) -> object:
    """Find the module or tensor at a position of `Scope.positions`."""
    kind, _, name = position.partition(" ")
    if kind == "module":
        return block.get_submodule(name)
    prefix, _, key = name.rpartition(".")
    module = block.get_submodule(prefix)
    return parameters_of(module).get(key, buffers_of(module).get(key))
