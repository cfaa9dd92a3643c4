"""The exchange of the loose values at a synchronization, along the schedule of the weights; see `resist.sync.loose`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from resist.planning.schedule import Schedule
from resist.subnet.buffers import Part
from resist.subnet.layout import Place
from resist.sync.loose import AVERAGED, BUFFERS, STATE
from resist.sync.optimizer_state import start_over
from resist.sync.packing import Entry, InFlat, Unmovable, Value, combine, pack, unpack
from resist.sync.round_agreement import RoundAgreement
from resist.sync.round_end import SHARED, RoundEnd
from resist.sync.transport import Move, Transport
from resist.sync.worker import Worker

_ROOT = 0  # the worker that combines what all workers have


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
        end: The end of the round.
        agreed: What the processes have agreed on, with the values before the exchange.
        schedule: The schedule of the exchange of the weights.
    """

    def __init__(
        self,
        transport: Transport,
        workers: Sequence[Worker],
        end: RoundEnd,
        agreed: RoundAgreement,
        schedule: Schedule,
    ) -> None:
        self.transport, self.end, self.joined = transport, end, agreed.joined
        self.plan, self.next_plan = end.plan, end.next_plan
        self.loose, self.described, self.dropped = agreed.loose, agreed.described, agreed.left_out
        self.workers = {worker.index: worker for worker in workers}
        self.items = self._items(schedule)
        self.values: dict[tuple[int, Part], Tensor] = {}  # what arrives: (worker, part afterwards) -> packed

    def run(self) -> None:
        """Exchange all values.

        Every process has to call it; it waits only for processes that send to this one.

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
        """Find the holders that send to the owner.

        All whose round counts, unless they have equal values.
        """
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
        """Combine the values at their owners.

        Returns item number -> packed, for owners that are hosted here.
        """
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
        """Agree on sizes of combined values that processes cannot know.

        Waits for all of them, if there are any.
        """
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
        """A part of `worker` that had the same content before.

        The one in the same place comes first.
        """
        assert item.result is not None
        part = item.targets[worker]
        before = [part] if part == SHARED else [(part[0], s) for s in range(self.plan.capacities(worker)[part[0] or 0])]
        before.sort(key=lambda other: other != part)
        return next((p for p in before if self.described.entry(worker, self.plan, p) == item.result), None)

    def _place(self, worker: int, item: _Item, slots: "_Slots") -> None:
        """Put the values of one part of a worker into their place."""
        part, origin = item.targets[worker], item.holders.get(worker)
        loose, moves_state = self.loose[worker], self.end.moves_state(part)
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
        if part == SHARED and self.end.regroups and worker not in self.joined:  # its own counters and indices stay
            for kind in tree.keys() & {BUFFERS, AVERAGED}:
                tree[kind] = {name: value for name, value in tree[kind].items() if value.is_floating_point()}
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
        for _, parameter, place, _ in worker.subnet.placed:
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
                start_over(optimizer, [parameter])

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
