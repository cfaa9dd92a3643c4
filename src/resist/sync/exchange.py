"""A synchronization: from the weights of one round to those of the next, as `schedule` lists it.

1. making it: the shared part goes into a mean over all workers; copies of blocks go to their owners, as one batch.
2. finish:    owners fold, folded blocks go to their next holders, as one batch, and end up in their slots.

The two are apart so that something else may be computed between them.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resist.planning.plan import Plan
from resist.planning.schedule import Message, ReplicaPlacement, Schedule, place_replicas, schedule
from resist.planning.strategy import OuterSGD
from resist.subnet.chains import Chain
from resist.subnet.network import Subnet
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS, mean_into, outer_step
from resist.sync.transport import Handle, Move, Transport

Key = tuple[int, int]  # (chain number, block or slot)


@dataclass
class Payload:
    """One kind of value for each hosted worker, laid out as its sub-network is: the weights, or one optimizer state.

    name:     WEIGHTS, or the optimizer's own name of the state ("momentum_buffer", "exp_avg").
    flats:    worker -> the flat tensor.
    moves:    whether blocks take their value along; else it stays with blocks that stay, and is zero for others.
    average_shared: whether the shared part becomes its mean over all workers.
    average_blocks: whether a block becomes its mean over its holders; else they are equal, or the owner's value counts.
    """

    name: str
    flats: dict[int, Tensor]
    moves: bool
    average_shared: bool
    average_blocks: bool = True
    arriving: dict[tuple[int, Key], Tensor] = field(default_factory=dict)
    resized: dict[int, Tensor] = field(default_factory=dict)

    def kind(self, part: str) -> str:
        """What the transport books `part` ("shared" or "blocks") as."""
        return part if self.name == WEIGHTS else "state"


class Exchange:
    """The synchronization between two plans, for the workers hosted here. Make it, then `finish` it.

    anchors:  for each hosted worker the weights with which the round began, where something needs them.
    dropped: workers that are left out of every mean; blocks that only they held go back to their start.
    replicate: keep (or send) a replica of each block that would have one holder only: `replicas`, afterwards, are those
             kept here, by (chain number, block).
    """

    def __init__(
        self,
        transport: Transport,
        subnets: dict[int, Subnet],
        copies: Sequence[Payload],
        plans: dict[str, Plan],
        next_plans: dict[str, Plan],
        outer: OuterSGD | None = None,
        anchors: Mapping[int, Tensor] | None = None,
        dropped: Set[int] = frozenset(),
        replicate: bool = False,
    ) -> None:
        self.transport, self.subnets, self.payloads = transport, subnets, copies
        self.plans, self.next_plans = plans, next_plans
        any_subnet = next(iter(subnets.values()))
        self.chains: tuple[Chain, ...] = any_subnet.chains
        self.numbers = {chain.name: number for number, chain in enumerate(self.chains)}
        self.numel = [layout.numel for layout in any_subnet.block_layouts]
        self.common = all(plan.held_by_all for plan in (*plans.values(), *next_plans.values()))
        self._plan_messages(any_subnet.dtype.itemsize, replicate)
        self.outer, self.anchors, self.dropped = outer, anchors or {}, dropped
        self.replicas: dict[Key, Tensor] = {}
        for worker in self.dropped & subnets.keys():
            self._discard(worker)
        self.moving = [one for one in copies if one.moves]
        self.averaged = [one for one in self.moving if one.average_blocks]
        self.means: list[tuple[Handle, list[Tensor]]] = []
        for one in copies:
            if one.average_shared and transport.num_workers > 1:
                parts = [flat if self.common else flat[: any_subnet.shared_layout.numel] for flat in one.flats.values()]
                for worker, part in zip(one.flats, parts, strict=True):
                    if worker in dropped:
                        part.zero_()
                self.means.append((transport.mean(parts, one.kind("shared")), parts))
        self.averaging = transport.transfer(
            [self._average_move(one, m) for one in self.averaged for m in self.schedule.average]
        )

    def finish(self) -> None:
        """Wait for everything that is under way; afterwards the sub-networks are those of the next plan."""
        arrived, size = self.averaging.finish(), len(self.schedule.average)
        for number, one in enumerate(self.averaged):
            self._average(one, arrived[number * size : (number + 1) * size])
        for (chain, block), owner in self.schedule.owners.items():
            if owner in self.subnets:
                self._outer_step(owner, self.numbers[chain], self.plans[chain].slot(owner, block))
        for one in self.payloads:
            self._prepare(one)
        moves = [self._hand_over_move(one, m) for one in self.moving for m in self.schedule.hand_over]
        self.transport.transfer(moves + self._replica_moves()).finish()
        for mean, parts in self.means:
            mean.finish()
            for part in parts if self.dropped else ():  # which counted as zeros
                part.mul_(self.transport.num_workers / (self.transport.num_workers - len(self.dropped)))
        for worker, subnet in self.subnets.items():
            self._outer_step(worker, None, 0)
            for number, capacity in enumerate(subnet.capacities if self.common else ()):
                for slot in range(capacity):
                    self._outer_step(worker, number, slot)
        for one in self.payloads:
            self._settle(one)

    def _plan_messages(self, itemsize: int, replicate: bool) -> None:
        block_bytes = {c.name: n * itemsize for c, n in zip(self.chains, self.numel, strict=True)}
        self.schedule, self.placement = Schedule((), (), {}), ReplicaPlacement({}, ())
        if not self.common:  # else everything belongs to the mean over all workers
            self.schedule = schedule(self.plans, self.next_plans, block_bytes)
        if replicate:
            self.placement = place_replicas(self.schedule, self.next_plans, block_bytes)

    @torch.no_grad()
    def _discard(self, worker: int) -> None:
        """Undo the round of a dropped worker: its weights as at the start, its optimizer's state forgotten."""
        for one in self.payloads:
            if one.name in (WEIGHTS, AVERAGE):
                one.flats[worker].copy_(self.anchors[worker])
            elif one.name != VELOCITY:
                one.flats[worker].zero_()

    @torch.no_grad()
    def _replica_moves(self) -> list[Move]:
        """Keep the blocks that are handed over from here, and list the second copies that have to be sent."""
        weights = self.payloads[0]
        for (chain, block), keeper in self.placement.kept.items():
            if keeper in self.subnets:
                self.replicas[self.numbers[chain], block] = self._slot(weights, keeper, chain, block).clone()
        moves: list[Move] = []
        for m in self.placement.messages:
            outgoing = self._slot(weights, m.source, m.chain, m.block) if m.source in self.subnets else None
            incoming = None
            if m.target in self.subnets:
                template = next(iter(weights.flats.values()))
                incoming = template.new_empty(self.numel[self.numbers[m.chain]])
                self.replicas[self.numbers[m.chain], m.block] = incoming
            moves.append(Move("replica", m.source, m.target, m.num_bytes, outgoing, incoming))
        return moves

    def _slot(self, one: Payload, worker: int, chain: str, block: int) -> Tensor:
        """The slot in which `worker` holds `block` before the synchronization."""
        slot = self.plans[chain].slot(worker, block)
        return self.subnets[worker].slot(self.numbers[chain], slot, one.flats[worker])

    def _average_move(self, one: Payload, m: Message) -> Move:
        outgoing = self._slot(one, m.source, m.chain, m.block) if m.source in one.flats else None
        incoming = None
        if m.target in one.flats and outgoing is None:
            incoming = torch.empty_like(self._slot(one, m.target, m.chain, m.block))
        return Move(one.kind("blocks"), m.source, m.target, m.num_bytes, outgoing, incoming)

    @torch.no_grad()
    def _average(self, one: Payload, arrived: Sequence[Tensor | None]) -> None:
        copies: dict[tuple[int, str, int], list[Tensor]] = {}
        for message, tensor in zip(self.schedule.average, arrived, strict=True):
            if message.target in one.flats and message.source not in self.dropped:
                assert tensor is not None
                copies.setdefault((message.target, message.chain, message.block), []).append(tensor)
        for (owner, chain, block), others in copies.items():
            slot = self._slot(one, owner, chain, block)
            if owner in self.dropped:
                slot.copy_(others.pop(0))
            mean_into(slot, others)

    @torch.no_grad()
    def _prepare(self, one: Payload) -> None:
        """Make room for what arrives, and put what stays where it will lie."""
        if self.common:
            return
        for worker, subnet in self.subnets.items():
            flat = one.flats[worker]
            capacities = [self.next_plans[chain.name].capacities[worker] for chain in self.chains]
            resized = subnet.empty(capacities) if tuple(capacities) != subnet.capacities else None
            if resized is not None:
                one.resized[worker] = resized
            for chain, number, slot, block in self._next_slots(worker):
                before = self.plans[chain].blocks[worker]
                same_slot = slot < len(before) and before[slot] == block
                owner = self.schedule.owners[chain, block] == worker
                if resized is None and same_slot and (owner or not one.moves):
                    continue
                if resized is not None:
                    arriving = subnet.slot(number, slot, resized, capacities)
                else:
                    arriving = torch.empty_like(subnet.slot(number, slot, flat))
                one.arriving[worker, (number, slot)] = arriving
                if block in before and (owner or not one.moves):
                    arriving.copy_(self._slot(one, worker, chain, block))
                elif not one.moves:
                    arriving.zero_()

    def _outer_step(self, worker: int, chain: int | None, slot: int) -> None:
        """The outer optimizer, if there is one, on the mean in a slot, or on that of the shared part (no chain)."""
        if self.outer is None:
            return
        subnet = self.subnets[worker]
        layout = subnet.shared_layout if chain is None else subnet.block_layouts[chain]
        velocities = next(one.flats for one in self.payloads if one.name == VELOCITY)
        weights, anchor, velocity = (
            (flat if chain is None else subnet.slot(chain, slot, flat))[: layout.num_trained]
            for flat in (self.payloads[0].flats[worker], self.anchors[worker], velocities[worker])
        )
        outer_step(weights, anchor, velocity, self.outer)

    def _hand_over_move(self, one: Payload, m: Message) -> Move:
        outgoing = self._slot(one, m.source, m.chain, m.block) if m.source in one.flats else None
        slot = self.next_plans[m.chain].slot(m.target, m.block)
        incoming = one.arriving.get((m.target, (self.numbers[m.chain], slot)))
        return Move(one.kind("blocks"), m.source, m.target, m.num_bytes, outgoing, incoming)

    @torch.no_grad()
    def _settle(self, one: Payload) -> None:
        """Everything has arrived and everything was sent: the slots may be overwritten."""
        for worker, resized in one.resized.items():
            size = self.subnets[worker].shared_layout.numel
            resized[:size].copy_(one.flats[worker][:size])
            one.flats[worker] = resized
        for (worker, (number, slot)), arriving in one.arriving.items():
            if worker not in one.resized:
                self.subnets[worker].slot(number, slot, one.flats[worker]).copy_(arriving)
        one.arriving.clear()

    def _next_slots(self, worker: int) -> Iterable[tuple[str, int, int, int]]:
        for number, chain in enumerate(self.chains):
            for slot, block in enumerate(self.next_plans[chain.name].blocks[worker]):
                yield chain.name, number, slot, block


def assembly(
    transport: Transport, subnets: dict[int, Subnet], plans: dict[str, Plan], full: Subnet | None, on: int
) -> Handle:
    """Begin to bring every block to `full`, the network that worker `on` assembles (None where it lives elsewhere).

    A block comes from a holder in `on`'s own process if there is one, else from its holders in turn.
    """
    moves: list[Move] = []
    template = next(iter(subnets.values()))
    for number, chain in enumerate(template.chains):
        for block in range(chain.num_blocks):
            holders = plans[chain.name].holders(block)
            near = [worker for worker in holders if transport.process_of(worker) == transport.process_of(on)]
            source = on if on in holders else (near or holders)[block % len(near or holders)]
            outgoing = incoming = None
            if source in subnets:
                slot = plans[chain.name].slot(source, block)
                outgoing = subnets[source].slot(number, slot, subnets[source].flat)
            if full is not None:
                incoming = full.slot(number, block, full.flat)
            if source == on:
                if incoming is not None and outgoing is not None:
                    incoming.copy_(outgoing)
                continue
            num_bytes = template.block_layouts[number].numel * template.dtype.itemsize
            moves.append(Move("evaluate", source, on, num_bytes, outgoing, incoming))
    return transport.transfer(moves)
