"""Exchange: one synchronization, from the weights of one round to those of the next, as `schedule` lists it.

1. Creating it begins the mean of the shared part over all workers, and sends the blocks that several workers hold to
   their owners, as one batch.
2. `finish` averages them at their owners, sends the means to the next holders, as one batch, and puts everything into
   its slots.

The two are separate so that something else can be computed between them.
"""

from collections.abc import Iterable, Mapping, Sequence, Set

import torch
from torch import Tensor

from resist.planning.plan import Plan
from resist.planning.schedule import Message, ReplicaPlacement, Schedule, place_replicas, schedule
from resist.planning.strategy import OuterSGD
from resist.subnet.chains import Chain
from resist.subnet.network import Subnet
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS, mean_into, outer_step
from resist.sync.payload import Key, Payload
from resist.sync.transport import Handle, Move, Transport


class Exchange:
    """The synchronization between two plans, for the hosted workers. Create it, then `finish` it.

    Args:
        transport: Connects the workers.
        subnets: Worker -> sub-network, for the hosted workers.
        payloads: The values to exchange, the weights first; the same list in every process.
        plans: Chain name -> plan of the round that ends.
        next_plans: Chain name -> plan of the next round.
        outer: The outer optimizer, or None to use the mean as it is.
        anchors: Worker -> the weights at the beginning of the round. Needed with `outer`, `dropped` or `replicate`.
        dropped: Workers that are left out of every mean. Blocks that only they held return to their anchors.
        replicate: Keep, or send, a replica of each block that would have only one holder.

    Attributes:
        replicas: After `finish`: (chain number, block) -> flat tensor (numel,) of the replicas in this process.

    Raises:
        WorkerLostError: If another process is lost; also by `finish`.
    """

    def __init__(
        self,
        transport: Transport,
        subnets: dict[int, Subnet],
        *,
        payloads: Sequence[Payload],
        plans: dict[str, Plan],
        next_plans: dict[str, Plan],
        outer: OuterSGD | None = None,
        anchors: Mapping[int, Tensor] | None = None,
        dropped: Set[int] = frozenset(),
        replicate: bool = False,
    ) -> None:
        self.transport, self.subnets, self.payloads = transport, subnets, payloads
        self.plans, self.next_plans = plans, next_plans
        self.outer, self.anchors, self.dropped = outer, anchors or {}, dropped
        any_subnet = next(iter(subnets.values()))
        self.chains: tuple[Chain, ...] = any_subnet.chains
        self.numbers = {chain.name: number for number, chain in enumerate(self.chains)}
        self.numel = [layout.numel for layout in any_subnet.block_layouts]
        self.replicas: dict[Key, Tensor] = {}
        # 1. List the messages. Every process computes the same list, so no message says which block goes where.
        self.held_by_all = all(plan.held_by_all for plan in (*plans.values(), *next_plans.values()))
        self._plan_messages(any_subnet.dtype.itemsize, replicate)
        # 2. Undo the round of dropped workers, before anything of it is sent.
        for worker in self.dropped & subnets.keys():
            self._discard(worker)
        # 3. Begin the mean of the shared part: one collective for each payload, in place. It runs while blocks are
        #    exchanged, and nothing reads the shared part until `finish` has waited for all workers.
        self.means: list[tuple[Handle, list[Tensor]]] = []
        for payload in payloads:
            if payload.average_shared and transport.num_workers > 1:
                self._begin_mean(payload, any_subnet.shared_layout.numel)
        # 4. Send the blocks with several holders to their owners: one batch for all payloads. The owners need memory
        #    for each block they receive; the slots are only read. No process waits before `finish`.
        self.moving = [payload for payload in payloads if payload.moves]
        self.averaged = [payload for payload in self.moving if payload.average_blocks]
        self.averaging = transport.transfer(
            [self._average_move(payload, m) for payload in self.averaged for m in self.schedule.average]
        )

    def finish(self) -> None:
        """Wait until everything has arrived; afterwards the flat tensors are those of the next plan."""
        # 1. Owners wait for the other holders of their blocks, and average. Their slots then have the means.
        arrived, size = self.averaging.finish(), len(self.schedule.average)
        for number, payload in enumerate(self.averaged):
            self._average(payload, arrived[number * size : (number + 1) * size])
        # 2. Owners take the outer step on their blocks, before they hand them over: its momentum goes along.
        for (chain, block), owner in self.schedule.owners.items():
            if owner in self.subnets:
                self._outer_step(owner, self.numbers[chain], self.plans[chain].slot(owner, block))
        # 3. Send the blocks from the slots of their owners to their next holders, and replicas along with them, as one
        #    batch. Slots keep their blocks until the batch is complete, since they are being read; so blocks arrive in
        #    tensors of their own. Each process waits for the owners that send to it, and for those that it sends to.
        for payload in self.payloads:
            self._prepare(payload)
        moves = [self._hand_over_move(payload, m) for payload in self.moving for m in self.schedule.hand_over]
        self.transport.transfer(moves + self._replica_moves()).finish()
        # 4. Wait for all workers: the mean of the shared part. Dropped workers have contributed zeros to a sum that was
        #    divided by the number of all workers.
        for mean, parts in self.means:
            mean.finish()
            for part in parts if self.dropped else ():
                part.mul_(self.transport.num_workers / (self.transport.num_workers - len(self.dropped)))
        # 5. The outer step on the shared part: every worker takes it for itself, from equal values. If all workers hold
        #    all blocks, these were part of the same mean.
        for worker, subnet in self.subnets.items():
            self._outer_step(worker, None, 0)
            for number, capacity in enumerate(subnet.capacities if self.held_by_all else ()):
                for slot in range(capacity):
                    self._outer_step(worker, number, slot)
        # 6. Put the blocks that have arrived into their slots.
        for payload in self.payloads:
            self._settle(payload)

    def _plan_messages(self, itemsize: int, replicate: bool) -> None:
        block_bytes = {c.name: n * itemsize for c, n in zip(self.chains, self.numel, strict=True)}
        self.schedule, self.placement = Schedule((), (), {}), ReplicaPlacement({}, ())
        if not self.held_by_all:  # otherwise blocks are part of the mean over all workers
            self.schedule = schedule(self.plans, self.next_plans, block_bytes)
        if replicate:
            self.placement = place_replicas(self.schedule, self.next_plans, block_bytes)

    @torch.no_grad()
    def _discard(self, worker: int) -> None:
        """Undo the round of a dropped worker: weights as at its beginning, optimizer state zero."""
        for payload in self.payloads:
            if payload.name in (WEIGHTS, AVERAGE):
                payload.flats[worker].copy_(self.anchors[worker])
            elif payload.name != VELOCITY:
                payload.flats[worker].zero_()

    def _begin_mean(self, payload: Payload, shared_numel: int) -> None:
        """Begin the mean over all workers: of the shared part, or of everything if all workers hold all blocks."""
        parts = [flat if self.held_by_all else flat[:shared_numel] for flat in payload.flats.values()]
        for worker, part in zip(payload.flats, parts, strict=True):
            if worker in self.dropped:
                part.zero_()
        self.means.append((self.transport.mean(parts, payload.traffic_kind("shared")), parts))

    def _slot(self, payload: Payload, worker: int, chain: str, block: int) -> Tensor:
        """The slot in which `worker` holds `block` before the synchronization."""
        slot = self.plans[chain].slot(worker, block)
        return self.subnets[worker].slot(self.numbers[chain], slot, payload.flats[worker])

    def _average_move(self, payload: Payload, m: Message) -> Move:
        outgoing = self._slot(payload, m.source, m.chain, m.block) if m.source in payload.flats else None
        incoming = None
        if m.target in payload.flats and outgoing is None:
            incoming = torch.empty_like(self._slot(payload, m.target, m.chain, m.block))
        return Move(payload.traffic_kind("blocks"), m.source, m.target, m.num_bytes, outgoing, incoming)

    @torch.no_grad()
    def _average(self, payload: Payload, arrived: Sequence[Tensor | None]) -> None:
        """Average the blocks whose owners are hosted here, in the slots of the owners."""
        received: dict[tuple[int, str, int], list[Tensor]] = {}
        for message, tensor in zip(self.schedule.average, arrived, strict=True):
            if message.target in payload.flats and message.source not in self.dropped:
                assert tensor is not None
                received.setdefault((message.target, message.chain, message.block), []).append(tensor)
        for (owner, chain, block), tensors in received.items():
            slot = self._slot(payload, owner, chain, block)
            if owner in self.dropped:
                slot.copy_(tensors.pop(0))
            mean_into(slot, tensors)

    @torch.no_grad()
    def _replica_moves(self) -> list[Move]:
        """Keep a copy of blocks that are handed over from here, and list the replicas that have to be sent."""
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

    @torch.no_grad()
    def _prepare(self, payload: Payload) -> None:
        """Make room for blocks that arrive, and copy blocks that change their slot within a worker.

        Memory: one block for each block that arrives or changes its slot; a second flat tensor for each worker whose
        capacities change. `_settle` frees the former, and the flat tensor before in the latter case.
        """
        if self.held_by_all:
            return
        for worker, subnet in self.subnets.items():
            flat = payload.flats[worker]
            capacities = [self.next_plans[chain.name].capacities[worker] for chain in self.chains]
            resized = subnet.empty(capacities) if tuple(capacities) != subnet.capacities else None
            if resized is not None:
                payload.resized[worker] = resized
            for chain, number, slot, block in self._next_slots(worker):
                before = self.plans[chain].blocks[worker]
                same_slot = slot < len(before) and before[slot] == block
                # Values that do not move are used as they are; of those that do, only the owner has the mean.
                valid = self.schedule.owners[chain, block] == worker or not payload.moves
                # A valid block stays in its slot without a copy, unless the whole flat tensor is replaced.
                if resized is None and same_slot and valid:
                    continue
                # Everything else goes to a tensor of its own, since the slot may still have to be read: for a message,
                # or for another slot of this worker. In a new flat tensor, its final place is free already.
                if resized is not None:
                    arriving = subnet.slot(number, slot, resized, capacities)
                else:
                    arriving = torch.empty_like(subnet.slot(number, slot, flat))
                payload.arriving[worker, (number, slot)] = arriving
                # From another slot of this worker, or zero for a state that does not move. Otherwise the owner sends.
                if block in before and valid:
                    arriving.copy_(self._slot(payload, worker, chain, block))
                elif not payload.moves:
                    arriving.zero_()

    def _outer_step(self, worker: int, chain: int | None, slot: int) -> None:
        """Take the outer step, if there is one, on the mean in a slot, or in the shared part (`chain` is None)."""
        if self.outer is None:
            return
        subnet = self.subnets[worker]
        layout = subnet.shared_layout if chain is None else subnet.block_layouts[chain]
        velocities = next(payload.flats for payload in self.payloads if payload.name == VELOCITY)
        weights, anchor, velocity = (
            (flat if chain is None else subnet.slot(chain, slot, flat))[: layout.num_trained]
            for flat in (self.payloads[0].flats[worker], self.anchors[worker], velocities[worker])
        )
        outer_step(weights, anchor, velocity, self.outer)

    def _hand_over_move(self, payload: Payload, m: Message) -> Move:
        outgoing = self._slot(payload, m.source, m.chain, m.block) if m.source in payload.flats else None
        slot = self.next_plans[m.chain].slot(m.target, m.block)
        incoming = payload.arriving.get((m.target, (self.numbers[m.chain], slot)))
        return Move(payload.traffic_kind("blocks"), m.source, m.target, m.num_bytes, outgoing, incoming)

    @torch.no_grad()
    def _settle(self, payload: Payload) -> None:
        """Put the blocks of the next plan into their slots. Nothing reads the slots any more."""
        # Where capacities change, the blocks are in the new flat tensor already, and only the shared part is missing:
        # it is copied last, since its mean was complete only now. The old tensor is freed when the network is resized.
        for worker, resized in payload.resized.items():
            size = self.subnets[worker].shared_layout.numel
            resized[:size].copy_(payload.flats[worker][:size])
            payload.flats[worker] = resized
        # Elsewhere the flat tensor stays, with the parameters on it, and blocks are copied from where they arrived.
        for (worker, (number, slot)), arriving in payload.arriving.items():
            if worker not in payload.resized:
                self.subnets[worker].slot(number, slot, payload.flats[worker]).copy_(arriving)
        payload.arriving.clear()

    def _next_slots(self, worker: int) -> Iterable[tuple[str, int, int, int]]:
        """(chain name, chain number, slot, block) of the next plan."""
        for number, chain in enumerate(self.chains):
            for slot, block in enumerate(self.next_plans[chain.name].blocks[worker]):
                yield chain.name, number, slot, block
