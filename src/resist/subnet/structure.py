"""Structure of a network: its tables of modules and parameters, to find out quickly whether it is still the same."""

from typing import Any

from torch import nn

from resist.blocks.contents import TABLES

Table = dict[str, Any]


class Structure:
    """The modules, parameters and names of buffers of a network at one time.

    To walk over a network by name takes long, and is needed several times in a round; to compare its tables does not.

    Args:
        model: The network.
    """

    def __init__(self, model: nn.Module) -> None:
        kind = type(model)
        # A network may list its parameters in a way of its own, and a scripted one has no tables.
        self._usual = (
            kind.named_parameters is nn.Module.named_parameters
            and kind.named_modules is nn.Module.named_modules
            and all(type(vars(module).get(name)) is dict for module in model.modules() for name in TABLES)
        )
        # Where a table is, its name there, the table, its keys, and the ids of its values; of buffers only the keys.
        self._tables: list[tuple[Table, str, Table, list[str], list[int]]] = []
        self._alive: list[list[object]] = []  # keeps the ids valid
        for module in model.modules() if self._usual else ():
            attributes = vars(module)
            for name in TABLES:
                table: Table = attributes[name]
                values = list(table.values()) if name != "_buffers" else []
                self._tables.append((attributes, name, table, list(table), list(map(id, values))))
                self._alive.append(values)

    def stays(self) -> bool:
        """True if the network has the same modules, parameters and names of buffers under the same names."""
        for attributes, name, table, keys, ids in self._tables:
            if attributes[name] is not table:
                return False
            if (table or keys) and (list(table) != keys or (ids and list(map(id, table.values())) != ids)):
                return False
        return self._usual
