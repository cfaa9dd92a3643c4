"""Hooks of a module, as a value that goes with a block."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from typing import Any

from torch import nn

from resist.blocks.modules import hook_tables_of


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
