"""A synchronisation: from the weights of one round to those of the next, as `schedule` lists it.

1. making it: the shared part goes into a mean over all workers; copies of blocks go to their owners, as one batch.
2. finish:    owners fold, folded blocks go to their next holders, as one batch, and end up in their slots.

The two are apart so that something else may be computed between them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resist.chains import Chain
from resist.comm import Handle, Move, Transport
from resist.fold import VELOCITY, mean_into, outer_step
from resist.plan import Plan
from resist.schedule import Message, Schedule, schedule
from resist.strategy import Outer
from resist.subnet import Subnet

Key = tuple[int, int]  # (chain number, block or slot)


WEIGHTS = "weights"


@dataclass
class Copy:
    """One kind of value for each hosted worker, laid out as its sub-network is: the weights, or one optimizer state.

    name:     WEIGHTS, or the optimizer's own name of the state ("momentum_buffer", "exp_avg").
    flats:    worker -> the flat tensor.
    moves:    whether blocks take their value along; else it stays with blocks that stay, and is zero for others.
    averages: whether the shared part becomes its mean over all workers.
    folds:    whether a block's holders are averaged before it moves; else they are equal, or the owner's value counts.
    """

    name: str
    flats: dict[int, Tensor]
    moves: bool
    averages: bool
    folds: bool = True
    arriving: dict[tuple[int, Key], Tensor] = field(default_factory=dict)
    resized: dict[int, Tensor] = field(default_factory=dict)

    def kind(self, part: str) -> str:
        """What the ledger books `part` ("shared" or "blocks") as."""
        return part if self.name == WEIGHTS else "state"


class Exchange:
    """The synchronisation between two plans, for the workers hosted here. Make it, then `finish` it."""

    def __init__(
        self,
        transport: Transport,
        subnets: dict[int, Subnet],
        copies: Sequence[Copy],
        plans: dict[str, Plan],
        next_plans: dict[str, Plan],
        outer: Outer | None = None,
        anchors: dict[int, Tensor] | None = None,
    ) -> None:
        self.transport, self.subnets, self.copies = transport, subnets, copies
        self.plans, self.next_plans = plans, next_plans
        any_subnet = next(iter(subnets.values()))
        self.chains: tuple[Chain, ...] = any_subnet.chains
        self.numbers = {chain.name: number for number, chain in enumerate(self.chains)}
        self.numel = [layout.numel for layout in any_subnet.block_layouts]
        self.common = all(plan.held_by_all for plan in (*plans.values(), *next_plans.values()))
        self.schedule = self._schedule(any_subnet.dtype.itemsize)
        self.outer, self.anchors = outer, anchors or {}
        self.moving = [one for one in copies if one.moves]
        self.folded = [one for one in self.moving if one.folds]
        self.means: list[Handle] = []
        for one in copies:
            if one.averages and transport.num_workers > 1:
                parts = [flat if self.common else flat[: any_subnet.shared_layout.numel] for flat in one.flats.values()]
                self.means.append(transport.mean(parts, one.kind("shared")))
        self.folding = transport.transfer([self._fold_move(one, m) for one in self.folded for m in self.schedule.fold])

    def finish(self) -> None:
        """Wait for everything that is under way; afterwards the sub-networks are those of the next plan."""
        arrived, size = self.folding.finish(), len(self.schedule.fold)
        for number, one in enumerate(self.folded):
            self._fold(one, arrived[number * size : (number + 1) * size])
        for (chain, block), owner in self.schedule.owners.items():
            if owner in self.subnets:
                self._outer_step(owner, self.numbers[chain], self.plans[chain].slot(owner, block))
        for one in self.copies:
            self._prepare(one)
        self.transport.transfer(
            [self._hand_over_move(one, m) for one in self.moving for m in self.schedule.hand_over]
        ).finish()
        for mean in self.means:
            mean.finish()
        for worker, subnet in self.subnets.items():
            self._outer_step(worker, None, 0)
            for number, capacity in enumerate(subnet.capacities if self.common else ()):
                for slot in range(capacity):
                    self._outer_step(worker, number, slot)
        for one in self.copies:
            self._settle(one)

    def _schedule(self, itemsize: int) -> Schedule:
        if self.common:  # everything belongs to the mean over all workers
            return Schedule((), (), {})
        return schedule(
            self.plans, self.next_plans, {c.name: n * itemsize for c, n in zip(self.chains, self.numel, strict=True)}
        )

    def _slot(self, one: Copy, worker: int, chain: str, block: int) -> Tensor:
        """The slot in which `worker` holds `block` before the synchronisation."""
        slot = self.plans[chain].slot(worker, block)
        return self.subnets[worker].slot(self.numbers[chain], slot, one.flats[worker])

    def _fold_move(self, one: Copy, m: Message) -> Move:
        outgoing = self._slot(one, m.source, m.chain, m.block) if m.source in one.flats else None
        incoming = None
        if m.target in one.flats and outgoing is None:
            incoming = torch.empty_like(self._slot(one, m.target, m.chain, m.block))
        return Move(one.kind("blocks"), m.source, m.target, m.num_bytes, outgoing, incoming)

    @torch.no_grad()
    def _fold(self, one: Copy, arrived: Sequence[Tensor | None]) -> None:
        copies: dict[tuple[int, str, int], list[Tensor]] = {}
        for message, tensor in zip(self.schedule.fold, arrived, strict=True):
            if message.target in one.flats:
                assert tensor is not None
                copies.setdefault((message.target, message.chain, message.block), []).append(tensor)
        for (owner, chain, block), others in copies.items():
            mean_into(self._slot(one, owner, chain, block), others)

    @torch.no_grad()
    def _prepare(self, one: Copy) -> None:
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
        velocities = next(one.flats for one in self.copies if one.name == VELOCITY)
        weights, anchor, velocity = (
            (flat if chain is None else subnet.slot(chain, slot, flat))[: layout.num_trained]
            for flat in (self.copies[0].flats[worker], self.anchors[worker], velocities[worker])
        )
        outer_step(weights, anchor, velocity, self.outer)

    def _hand_over_move(self, one: Copy, m: Message) -> Move:
        outgoing = self._slot(one, m.source, m.chain, m.block) if m.source in one.flats else None
        slot = self.next_plans[m.chain].slot(m.target, m.block)
        incoming = one.arriving.get((m.target, (self.numbers[m.chain], slot)))
        return Move(one.kind("blocks"), m.source, m.target, m.num_bytes, outgoing, incoming)

    @torch.no_grad()
    def _settle(self, one: Copy) -> None:
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
            near = [worker for worker in holders if transport.host(worker) == transport.host(on)]
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
