"""Loose values: what goes with a block, or with the shared part, and is not laid out as the weights.

That is optimizer state of another shape than its weight, numbers of Python and step counts in it, buffers of integers,
and float buffers that are in no flat tensor. Each part of a worker (one block, or the shared part) is packed into bytes
and described by a digest, and all processes compare the digests with what they agree on at the end of a round anyway.
Only bytes that differ are sent, after the exchange of the weights and along the same schedule: from the holders of a
block to its owner, which combines them, and from there to the next holders. So a network without such values, or whose
values are equal everywhere (Adam's step count), sends no message more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from resist.planning.plan import RoundPlan
from resist.subnet.buffers import Part
from resist.subnet.network import Subnet
from resist.sync.optimizer_state import StateTypes, movable_state, states_by_id
from resist.sync.packing import Entry, Unmovable, Value, entry_of, pack
from resist.sync.round_end import SHARED, RoundEnd
from resist.sync.worker import Worker

STATE, BUFFERS, AVERAGED = "state", "buffers", "average"  # kinds of values of a part; the last: buffers of an average


@dataclass
class LooseParts:
    """The loose values of one worker at the end of a round.

    Attributes:
        packed: Part -> packed values, (size,) uint8.
        entries: Part -> their description.
        states: Part -> the optimizer's state of each of its parameters, as objects, for blocks that stay.
        unmovable: Parts with state that cannot move.
    """

    packed: dict[Part, Tensor] = field(default_factory=dict[Part, Tensor])
    entries: dict[Part, Entry] = field(default_factory=dict[Part, Entry])
    states: dict[Part, dict[str, Any]] = field(default_factory=dict[Part, dict[str, Any]])
    unmovable: set[Part] = field(default_factory=set[Part])


def collect_loose(
    worker: Worker, types: Mapping[str, StateTypes], end: RoundEnd, *, without_state: bool = False
) -> LooseParts:
    """Pack the loose values of a worker. Waits for their device.

    Args:
        worker: The worker.
        types: States that have flat tensors; see `flat_states`.
        end: The end of the round, which decides what moves.
        without_state: Leave out the optimizer's state, whose round does not count.

    Returns:
        The values of all its parts.
    """
    loose, device = LooseParts(), worker.subnet.device
    trees: dict[Part, dict[str, dict[str, Value]]] = {part: {} for part in parts_of(worker.subnet)}
    loose.states = {part: {} for part in trees}
    states = states_by_id(worker.optimizers)
    for _, parameter, place, _ in () if without_state else worker.subnet.placed:
        part: Part = (place.chain, place.slot)
        if id(parameter) not in states:
            continue
        optimizer, loose.states[part][place.piece] = states[id(parameter)]
        if end.moves_state(part):
            tree = trees[part].setdefault(STATE, {})
            tree[place.piece] = movable_state(optimizer, parameter, types)
            if isinstance(tree[place.piece], Unmovable):
                loose.unmovable.add(part)
    for kind, subnet in ((BUFFERS, worker.subnet), (AVERAGED, worker.average)):
        for part, buffers in subnet.loose().items() if subnet is not None else ():
            # All workers have the shared part, and each keeps its own counters and indices. Those that join get them.
            every = (end.regroups and part == SHARED) or not end.of_everyone(part)
            moving = {name: buffer for name, buffer in buffers.items() if every or buffer.is_floating_point()}
            if moving:
                trees[part][kind] = dict(moving)
    loose.packed = {part: pack(tree, device) for part, tree in trees.items()}
    loose.entries = {part: entry_of(packed) for part, packed in loose.packed.items()}
    return loose


def parts_of(subnet: Subnet) -> list[Part]:
    """List the shared part and the slots of a sub-network, ascending."""
    return [SHARED, *((chain, slot) for chain, capacity in enumerate(subnet.capacities) for slot in range(capacity))]


def to_text(loose: Mapping[int, LooseParts]) -> dict[str, Any]:
    """Describe the loose values of the hosted workers for JSON.

    Short where parts are equal.

    Args:
        loose: Hosted worker -> its values.

    Returns:
        Distinct descriptions, and for each worker the numbers of those of its parts; one list for all equal workers.
    """
    numbers: dict[Entry, int] = {}
    rows: list[list[int]] = []
    for parts in loose.values():
        rows.append([numbers.setdefault(parts.entries[part], len(numbers)) for part in parts.entries])
        rows[-1] = rows[-1][:1] if len(set(rows[-1])) == 1 else rows[-1]
    equal = len({tuple(row) for row in rows}) == 1
    entries = [[entry.size, entry.structure, entry.content] for entry in numbers]
    return {"workers": list(loose), "entries": entries, "parts": rows[:1] if equal else rows}


class Described:
    """The descriptions of the loose values of all workers.

    Args:
        texts: The result of `to_text` of each process.
    """

    def __init__(self, texts: Sequence[Mapping[str, Any]]) -> None:
        self._rows: dict[int, list[Entry]] = {}
        for text in texts:
            entries = [Entry(*entry) for entry in text["entries"]]
            for number, worker in enumerate(text["workers"]):
                row = text["parts"][number if len(text["parts"]) > 1 else 0]
                self._rows[worker] = [entries[index] for index in row]

    def entry(self, worker: int, plan: RoundPlan, part: Part) -> Entry:
        """Return the description of one part of a worker.

        Args:
            worker: The worker.
            plan: The plan of the round that ends.
            part: The part.
        """
        row, (chain, slot) = self._rows[worker], part
        if len(row) == 1:
            return row[0]
        return row[0 if chain is None else 1 + sum(plan.capacities(worker)[:chain]) + slot]
