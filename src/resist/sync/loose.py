"""Loose values: what goes with a block, or with the shared part, and is not laid out as the weights.

That is optimizer state of another shape than its weight, numbers of Python and step counts in it, buffers of integers,
and float buffers that are in no flat tensor. Each part of a worker (one block, or the shared part) is packed into bytes
and described by a digest, and all processes compare the digests with what they agree on at the end of a round anyway.
Only bytes that differ are sent, after the exchange of the weights and along the same schedule: from the holders of a
block to its owner, which combines them, and from there to the next holders. So a network without such values, or whose
values are equal everywhere (Adam's step count), sends no message more.
"""

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from resist.planning.plan import RoundPlan
from resist.planning.schedule import Schedule
from resist.subnet.buffers import Part
from resist.subnet.layout import Place
from resist.subnet.network import Subnet
from resist.sync.optimizer_state import StateTypes, begin_anew, movable_state
from resist.sync.packing import Entry, InFlat, Unmovable, Value, combine, entry_of, pack, unpack
from resist.sync.transport import Move, Transport
from resist.sync.worker import Worker

SHARED: Part = (None, 0)
STATE, BUFFERS, AVERAGED = "state", "buffers", "average"  # kinds of values of a part; the last: buffers of an average
_ROOT = 0  # the worker that combines what all workers have


@dataclass(frozen=True)
class Rule:
    """What moves at a synchronization.

    Attributes:
        policy: The strategy's policy for the optimizer's state.
        held_by_all: Every worker holds every block, before and after: blocks follow the rule of the shared part.
    """

    policy: str
    held_by_all: bool

    def moves_state(self, part: Part) -> bool:
        """Return True if the optimizer's state of a part is exchanged."""
        return self.policy == "average" or (self.policy == "travel" and not self.of_everyone(part))

    def of_everyone(self, part: Part) -> bool:
        """Return True if all workers have a part, and keep it."""
        return part == SHARED or self.held_by_all


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
    worker: Worker, types: Mapping[str, StateTypes], rule: Rule, *, without_state: bool = False
) -> LooseParts:
    """Pack the loose values of a worker. Waits for their device.

    Args:
        worker: The worker.
        types: States that have flat tensors; see `flat_states`.
        rule: What moves.
        without_state: Leave out the optimizer's state, whose round does not count.

    Returns:
        The values of all its parts.
    """
    loose, device = LooseParts(), worker.subnet.device
    trees: dict[Part, dict[str, dict[str, Value]]] = {part: {} for part in parts_of(worker.subnet)}
    loose.states = {part: {} for part in trees}
    for parameter, place in () if without_state else worker.subnet.parameter_places():
        part: Part = (place.chain, place.slot)
        optimizer = next((o for o in worker.optimizers if o.state.get(parameter)), None)
        if optimizer is None:
            continue
        loose.states[part][place.piece] = optimizer.state[parameter]
        if rule.moves_state(part):
            tree = trees[part].setdefault(STATE, {})
            tree[place.piece] = movable_state(optimizer, parameter, types)
            if isinstance(tree[place.piece], Unmovable):
                loose.unmovable.add(part)
    for kind, subnet in ((BUFFERS, worker.subnet), (AVERAGED, worker.average)):
        for part, buffers in subnet.loose().items() if subnet is not None else ():
            # All workers have the shared part, and each keeps its own counters and indices.
            moving = {n: b for n, b in buffers.items() if not rule.of_everyone(part) or b.is_floating_point()}
            if moving:
                trees[part][kind] = dict(moving)
    loose.packed = {part: pack(tree, device) for part, tree in trees.items()}
    loose.entries = {part: entry_of(packed) for part, packed in loose.packed.items()}
    return loose


def parts_of(subnet: Subnet) -> list[Part]:
    """List the shared part and the slots of a sub-network, ascending."""
    return [SHARED, *((chain, slot) for chain, capacity in enumerate(subnet.capacities) for slot in range(capacity))]


def to_text(loose: Mapping[int, LooseParts]) -> dict[str, Any]:
    """Describe the loose values of the hosted workers, in a form for JSON that is short where parts are equal.

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


@dataclass
class _Item:
    """A block, or the shared part, at a synchronization.

    Attributes:
        holders: Worker -> the part in which it has it before.
        owner: The worker that combines it.
        targets: Worker -> the part in which it has it afterwards.
        result: Description of the combined value, once it is known.
    """

    holders: dict[int, Part]
    owner: int
    targets: dict[int, Part]
    senders: list[int] = field(default_factory=list[int])
    result: Entry | None = None


class LooseExchange:
    """The exchange of the loose values, after the exchange of the weights.

    Args:
        transport: Connects the workers.
        workers: The hosted workers, with the networks of the next plan.
        loose: Hosted worker -> its values before the exchange.
        described: The descriptions of those of all workers.
        rule: What moves.
        schedule: The schedule of the exchange.
        plan: Plan of the round that ends.
        next_plan: Plan of the next round.
        dropped: Workers whose round does not count.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        workers: Sequence[Worker],
        loose: Mapping[int, LooseParts],
        described: Described,
        rule: Rule,
        schedule: Schedule,
        plan: RoundPlan,
        next_plan: RoundPlan,
        dropped: Set[int] = frozenset(),
    ) -> None:
        self.transport, self.loose, self.described, self.rule = transport, loose, described, rule
        self.workers = {worker.index: worker for worker in workers}
        self.plan, self.next_plan, self.dropped = plan, next_plan, dropped
        self.items = self._items(schedule)
        self.values: dict[tuple[int, Part], Tensor] = {}  # what arrives: (worker, part afterwards) -> packed

    def run(self) -> None:
        """Exchange all values. Every process has to call it; it waits only for processes that send to this one.

        Raises:
            WorkerLostError: If another process is lost.
        """
        combined = self._combine()
        self._agree_on_sizes(combined)
        self._hand_over(combined)
        for worker in self.workers.values():
            slots = _Slots(worker)
            for item in self.items:
                if worker.index in item.targets:
                    self._place(worker.index, item, slots)

    def _items(self, schedule: Schedule) -> list[_Item]:
        everyone = range(self.plan.workers)
        shared = dict.fromkeys(everyone, SHARED)
        items = [_Item(shared, _ROOT, shared)]
        for chain, block in self.plan.keys:
            holders, targets = (
                dict[int, Part]((w, (chain, plan.slot(chain, block, worker=w))) for w in plan.holders(chain, block))
                for plan in (self.plan, self.next_plan)
            )
            items.append(_Item(holders, schedule.owners.get((chain, block), _ROOT), targets))
        for item in items:
            self._find_senders(item)
        return items

    def _entry(self, item: _Item, worker: int) -> Entry:
        return self.described.entry(worker, self.plan, item.holders[worker])

    def _find_senders(self, item: _Item) -> None:
        """Find the holders that send to the owner: all whose round counts, unless they have equal values."""
        live = [worker for worker in item.holders if worker not in self.dropped] or list(item.holders)
        entries = [self._entry(item, worker) for worker in live]
        if len(set(entries)) == 1:
            item.senders = [] if item.owner in live else live[:1]
            item.result = entries[0]
        else:
            item.senders = [worker for worker in live if worker != item.owner]
            if len({entry.structure for entry in entries}) == 1:
                item.result = Entry(entries[0].size, entries[0].structure, "")  # content as yet unknown

    def _send(self, moves: Sequence[tuple[int, int, int, Tensor | None]]) -> list[Tensor | None]:
        """Carry out (source, target, size, packed value) moves, where there are any."""
        batch: list[Move] = []
        for source, target, size, packed in moves:
            outgoing = incoming = None
            if source in self.workers:
                assert packed is not None
                outgoing = packed.to(self.workers[source].subnet.device)
            elif target in self.workers:
                incoming = torch.empty(size, dtype=torch.uint8, device=self.workers[target].subnet.device)
            batch.append(Move("state", source, target, size, outgoing, incoming))
        return self.transport.transfer(batch).finish() if batch else []

    def _combine(self) -> dict[int, Tensor]:
        """Combine the values at their owners. Returns item number -> packed, for owners that are hosted here."""
        moves = [
            (source, item.owner, self._entry(item, source).size, self._own(item, source))
            for item in self.items
            for source in item.senders
        ]
        arrived = iter(self._send(moves))
        combined: dict[int, Tensor] = {}
        for number, item in enumerate(self.items):
            received = [next(arrived) for _ in item.senders]
            if item.owner not in self.workers or not received:
                continue
            own = self._own(item, item.owner) if item.owner not in self.dropped else None
            device = self.workers[item.owner].subnet.device
            values = [unpack(packed, device) for packed in (own, *received) if packed is not None]
            combined[number] = pack(combine(values), device)
            if item.owner in item.targets:
                self.values[item.owner, item.targets[item.owner]] = combined[number]
        return combined

    def _own(self, item: _Item, worker: int) -> Tensor | None:
        return self.loose[worker].packed[item.holders[worker]] if worker in self.loose else None

    def _agree_on_sizes(self, combined: Mapping[int, Tensor]) -> None:
        """Agree on the sizes of combined values that the processes cannot know. Waits for all of them, if any is."""
        unknown = [number for number, item in enumerate(self.items) if item.result is None]
        if not unknown:
            return
        own = {number: len(combined[number]) for number in unknown if number in combined}
        for text in self.transport.all_gather_text(json.dumps(own)):
            for number, size in json.loads(text).items():
                self.items[int(number)].result = Entry(size, "", "")

    def _hand_over(self, combined: Mapping[int, Tensor]) -> None:
        """Send the values to the next holders that have no equal ones."""
        moves: list[tuple[int, int, int, Tensor | None]] = []
        parts: list[tuple[int, Part]] = []
        for number, item in enumerate(self.items):
            assert item.result is not None
            for target, part in item.targets.items():
                if target == item.owner or self._find_equal(item, target) is not None:
                    continue
                packed = combined.get(number, self._own(item, item.owner))
                moves.append((item.owner, target, item.result.size, packed))
                parts.append((target, part))
        for (target, part), packed in zip(parts, self._send(moves), strict=True):
            if packed is not None:
                self.values[target, part] = packed

    def _find_equal(self, item: _Item, worker: int) -> Part | None:
        """A part that `worker` had before with the same content, the one in the same place first."""
        assert item.result is not None
        part = item.targets[worker]
        before = [part] if part == SHARED else [(part[0], s) for s in range(self.plan.capacities(worker)[part[0] or 0])]
        before.sort(key=lambda other: other != part)
        return next((p for p in before if self.described.entry(worker, self.plan, p) == item.result), None)

    def _place(self, worker: int, item: _Item, slots: "_Slots") -> None:
        """Put the values of one part of a worker into their place, if they are not there already."""
        part, origin = item.targets[worker], item.holders.get(worker)
        loose, moves_state = self.loose[worker], self.rule.moves_state(part)
        own = {} if origin is None else loose.states[origin]
        if part != origin and not moves_state:
            slots.put_state(part, own, {})
        packed = self.values.get((worker, part))
        if packed is None and part != origin:
            source = self._find_equal(item, worker)
            assert source is not None
            if source != part or part in loose.unmovable:
                packed = loose.packed[source]
        if packed is None:
            return
        tree = unpack(packed, slots.worker.subnet.device)
        if moves_state:
            slots.put_state(part, tree.get(STATE, {}), own)
        for kind, subnet in ((BUFFERS, slots.worker.subnet), (AVERAGED, slots.worker.average)):
            if subnet is not None:
                subnet.put_loose(*part, tree.get(kind, {}))


class _Slots:
    """The slots of one worker, to put optimizer state into them."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._parameters: dict[Part, dict[str, nn.Parameter]] = {}
        for parameter, place in worker.subnet.parameter_places():
            self._parameters.setdefault((place.chain, place.slot), {})[place.piece] = parameter
        self._optimizer_of = {
            id(parameter): optimizer
            for optimizer in worker.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def put_state(self, part: Part, states: Mapping[str, Value], own: Mapping[str, Any]) -> None:
        """Replace the optimizer's state of a part.

        Args:
            part: The part.
            states: Name of each parameter with state -> its state; see `movable_state`.
            own: State from the place that this block had in this worker before, for what cannot move.
        """
        for piece, parameter in self._parameters.get(part, {}).items():
            optimizer, state = self._optimizer_of.get(id(parameter)), states.get(piece)
            if optimizer is None:
                continue
            if piece in own and isinstance(state, Unmovable):
                optimizer.state[parameter] = self._linked(part, piece, own[piece])
            elif isinstance(state, dict):
                optimizer.state[parameter] = self._linked(part, piece, cast(dict[str, Value], state))
            else:
                begin_anew(optimizer, [parameter])

    @torch.no_grad()
    def _linked(self, part: Part, piece: str, state: Mapping[str, Value]) -> dict[str, Value]:
        """A state with views of the flat tensors of the worker."""
        linked = dict(state)
        place = Place(*part, piece)
        dtype = self._parameters[part][piece].dtype
        for name, flats in self.worker.state.items():
            marker = linked.get(name)
            if dtype not in flats or marker is None:
                continue
            view = self.worker.subnet.view(place, flats)
            if isinstance(marker, InFlat):
                linked[name] = view.mul_(marker.scale) if marker.scale != 1.0 else view
            elif isinstance(marker, Tensor) and marker.shape == view.shape and marker.dtype == view.dtype:
                linked[name] = view
        return linked
