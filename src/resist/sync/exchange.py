"""Exchange: one synchronization, from the weights of one round to those of the next, as `schedule` lists it.

1. Creating it begins the mean of the shared part over all workers, and sends the blocks that several workers hold to
   their owners, as one batch.
2. `finish` averages them at their owners, sends the means to the next holders, as one batch, and puts everything into
   its slots.

The two are separate so that something else can be computed between them.
"""

from collections.abc import Sequence, Set

import torch
from torch import Tensor

from resist.planning.plan import Key, RoundPlan
from resist.planning.schedule import Message, schedule
from resist.planning.strategy import Strategy
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS, mean_into, outer_step
from resist.sync.payload import Payload, collect_payloads
from resist.sync.transport import Handle, Move, Transport
from resist.sync.worker import Worker


class Exchange:
    """The synchronization between two plans, for the hosted workers.

    Creating it begins the exchange, and `finish` completes it.

    Args:
        transport: Connects the workers.
        workers: The hosted workers. With an outer optimizer, or workers that are dropped, they have anchors.
        strategy: Strategy of the round that ends: its policy for the optimizer's state, and its outer optimizer.
        state_names: Names of the optimizer states that any worker has, equal in all processes.
        plan: Plan of the round that ends.
        next_plan: Plan of the next round.
        dropped: Workers that are left out of every mean. Blocks that only they held return to their anchors.
        replicate: Keep, or send, a replica of each block that would have only one holder.

    Attributes:
        schedule: The messages, which every process lists in the same order.
        payloads: The values that are exchanged, the weights first.

    Raises:
        WorkerLostError: If another process is lost; also by `finish`.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        workers: Sequence[Worker],
        strategy: Strategy,
        state_names: Sequence[str],
        plan: RoundPlan,
        next_plan: RoundPlan,
        dropped: Set[int] = frozenset(),
        replicate: bool = False,
    ) -> None:
        self.transport = transport
        self.workers = {worker.index: worker for worker in workers}
        self.plan, self.next_plan = plan, next_plan
        self.outer, self.dropped = strategy.outer, dropped
        self.payloads = collect_payloads(workers, strategy, state_names)
        # 1. List the messages. Every process computes the same list, so no message says which block goes where.
        self.schedule = schedule(plan, next_plan, workers[0].subnet.block_bytes, replicate=replicate)
        # 2. Undo the round of dropped workers, before anything of it is sent.
        for worker in self.dropped & self.workers.keys():
            self._discard(worker)
        # 3. Begin the mean of the shared part: one collective for each payload, in place. It runs while blocks are
        #    exchanged, and nothing reads the shared part until `finish` has waited for all workers.
        self.means: list[tuple[Handle, list[Tensor]]] = []
        for payload in self.payloads:
            if payload.average_shared and transport.num_workers > 1:
                self._begin_mean(payload)
        # 4. Send the blocks with several holders to their owners: one batch for all payloads. The owners need memory
        #    for each block they receive; the slots are only read. No process waits before `finish`.
        self.moving = [payload for payload in self.payloads if payload.moves]
        self.averaged = [payload for payload in self.moving if payload.average_blocks]
        self.averaging = transport.transfer(
            [self._average_move(payload, m) for payload in self.averaged for m in self.schedule.average]
        )

    def finish(self) -> dict[Key, Tensor]:
        """Wait until everything has arrived.

        Afterwards the workers have the sub-networks of the next plan.

        Returns:
            (chain number, block) -> flat tensor (numel,) of each replica that this process keeps.

        Raises:
            WorkerLostError: If another process is lost.
        """
        # 1. Owners wait for the other holders of their blocks, and average. Their slots then have the means.
        arrived, size = self.averaging.finish(), len(self.schedule.average)
        for number, payload in enumerate(self.averaged):
            self._average(payload, arrived[number * size : (number + 1) * size])
        # 2. Owners take the outer step on their blocks, before they hand them over: its momentum goes along.
        for (chain, block), owner in self.schedule.owners.items():
            if owner in self.workers:
                self._outer_step(owner, chain, self.plan.slot(chain, block, worker=owner))
        # 3. Send the blocks from the slots of their owners to their next holders, and replicas along with them, as one
        #    batch. Slots keep their blocks until the batch is complete, since they are being read; so blocks arrive in
        #    tensors of their own. Each process waits for the owners that send to it, and for those that it sends to.
        for payload in self.payloads:
            self._prepare(payload)
        moves = [self._hand_over_move(payload, m) for payload in self.moving for m in self.schedule.hand_over]
        replicas = self._make_replicas()
        moves += [self._replica_move(m, replicas) for m in self.schedule.replicas]
        self.transport.transfer(moves).finish()
        # 4. Wait for all workers: the mean of the shared part. Dropped workers have contributed zeros to a sum that was
        #    divided by the number of all workers.
        for mean, parts in self.means:
            mean.finish()
            for part in parts if self.dropped else ():
                part.mul_(self.transport.num_workers / (self.transport.num_workers - len(self.dropped)))
        # 5. The outer step on the shared part: every worker takes it for itself, from equal values. If all workers hold
        #    all blocks, these were part of the same mean.
        for worker in self.workers:
            self._outer_step(worker, None, 0)
            for chain, block in self.plan.keys if self.schedule.held_by_all else ():
                self._outer_step(worker, chain, block)  # block i is in slot i
        # 6. Put the blocks that have arrived into their slots, and resize the networks where capacities change.
        for payload in self.payloads:
            self._settle(payload)
        for index, worker in self.workers.items():
            flats = {payload.name: payload.flats[index] for payload in self.payloads}
            worker.finish_round(flats, self.next_plan.held(index))
        return replicas

    @torch.no_grad()
    def _discard(self, worker: int) -> None:
        """Undo the round of a dropped worker: weights as at its beginning, optimizer state zero."""
        for payload in self.payloads:
            if payload.name in (WEIGHTS, AVERAGE):
                payload.flats[worker].copy_(self._anchor(worker))
            elif payload.name != VELOCITY:
                payload.flats[worker].zero_()

    def _anchor(self, worker: int) -> Tensor:
        anchor = self.workers[worker].anchor
        assert anchor is not None, "`Job.mark_anchors` copies them where an option needs them"
        return anchor

    def _begin_mean(self, payload: Payload) -> None:
        """Begin the mean over all workers: of the shared part, or of everything if all workers hold all blocks."""
        parts: list[Tensor] = []
        for worker, flat in payload.flats.items():
            parts.append(flat if self.schedule.held_by_all else self.workers[worker].subnet.slot(None, 0, flat))
            if worker in self.dropped:
                parts[-1].zero_()
        self.means.append((self.transport.mean(parts, payload.traffic_kind("shared")), parts))

    def _slot(self, payload: Payload, chain: int, block: int, worker: int) -> Tensor:
        """The slot in which `worker` holds `block` before the synchronization."""
        slot = self.plan.slot(chain, block, worker=worker)
        return self.workers[worker].subnet.slot(chain, slot, payload.flats[worker])

    def _move(self, payload: Payload, m: Message, incoming: Tensor | None, traffic_kind: str) -> Move:
        """Send the slot of the source, if it is hosted here; receive in `incoming`."""
        outgoing = self._slot(payload, m.chain, m.block, m.source) if m.source in self.workers else None
        return Move(traffic_kind, m.source, m.target, m.num_bytes, outgoing, incoming)

    def _new_block(self, chain: int) -> Tensor:
        subnet = next(iter(self.workers.values())).subnet
        return subnet.flat.new_empty(subnet.block_layouts[chain].numel)

    def _average_move(self, payload: Payload, m: Message) -> Move:
        # Between two workers of this process, the owner reads the slot itself.
        received = m.target in self.workers and m.source not in self.workers
        return self._move(payload, m, self._new_block(m.chain) if received else None, payload.traffic_kind("blocks"))

    @torch.no_grad()
    def _average(self, payload: Payload, arrived: Sequence[Tensor | None]) -> None:
        """Average the blocks whose owners are hosted here, in the slots of the owners."""
        received: dict[Key, list[Tensor]] = {}
        for message, tensor in zip(self.schedule.average, arrived, strict=True):
            if message.target in self.workers and message.source not in self.dropped:
                assert tensor is not None
                received.setdefault((message.chain, message.block), []).append(tensor)
        for (chain, block), tensors in received.items():
            owner = self.schedule.owners[chain, block]
            slot = self._slot(payload, chain, block, owner)
            if owner in self.dropped:
                slot.copy_(tensors.pop(0))
            mean_into(slot, tensors)

    def _hand_over_move(self, payload: Payload, m: Message) -> Move:
        slot = self.next_plan.slot(m.chain, m.block, worker=m.target)
        incoming = payload.arriving.get((m.target, m.chain, slot))
        return self._move(payload, m, incoming, payload.traffic_kind("blocks"))

    @torch.no_grad()
    def _make_replicas(self) -> dict[Key, Tensor]:
        """Copy the blocks that their keepers hand over, and make room for replicas that arrive."""
        replicas: dict[Key, Tensor] = {}
        for (chain, block), keeper in self.schedule.keepers.items():
            if keeper in self.workers:
                if keeper == self.schedule.owners[chain, block]:
                    replicas[chain, block] = self._slot(self.payloads[0], chain, block, keeper).clone()
                else:
                    replicas[chain, block] = self._new_block(chain)
        return replicas

    def _replica_move(self, m: Message, replicas: dict[Key, Tensor]) -> Move:
        incoming = replicas[m.chain, m.block] if m.target in self.workers else None
        return self._move(self.payloads[0], m, incoming, "replica")

    @torch.no_grad()
    def _prepare(self, payload: Payload) -> None:
        """Make room for blocks that arrive, and copy blocks that change their slot within a worker.

        Memory: one block for each block that arrives or changes its slot; a second flat tensor for each worker whose
        capacities change. `_settle` frees the former; `Worker.finish_round` frees the old flat tensors.
        """
        if self.schedule.held_by_all:
            return
        for index, worker in self.workers.items():
            subnet, capacities = worker.subnet, self.next_plan.capacities(index)
            resized = subnet.empty(capacities) if capacities != subnet.capacities else None
            if resized is not None:
                payload.resized[index] = resized
            for chain, (before, after) in enumerate(
                zip(self.plan.held(index), self.next_plan.held(index), strict=True)
            ):
                for slot, block in enumerate(after):
                    # Values that do not move are used as they are; of those that do, only the owner has the mean.
                    valid = self.schedule.owners[chain, block] == index or not payload.moves
                    # A valid block stays in its slot without a copy, unless the whole flat tensor is replaced.
                    if resized is None and valid and before[slot] == block:
                        continue
                    # Everything else goes to a tensor of its own, since the slot may still have to be read: for a
                    # message, or for another slot of this worker. In a new flat tensor, its place is free already.
                    if resized is None:
                        arriving = self._new_block(chain)
                    else:
                        arriving = subnet.slot(chain, slot, resized, capacities=capacities)
                    payload.arriving[index, chain, slot] = arriving
                    # From another slot of this worker, or zero for a state that does not move. Otherwise the owner
                    # sends it.
                    if valid and block in before:
                        arriving.copy_(self._slot(payload, chain, block, index))
                    elif not payload.moves:
                        arriving.zero_()

    def _outer_step(self, worker: int, chain: int | None, slot: int) -> None:
        """Take the outer step, if there is one, on the mean in a slot, or in the shared part (`chain` is None)."""
        if self.outer is None:
            return
        subnet = self.workers[worker].subnet
        num_trained = subnet.layout.part(chain).num_trained
        velocities = next(payload.flats for payload in self.payloads if payload.name == VELOCITY)
        weights, anchor, velocity = (
            subnet.slot(chain, slot, flat)[:num_trained]
            for flat in (self.payloads[0].flats[worker], self._anchor(worker), velocities[worker])
        )
        outer_step(weights, anchor, velocity, self.outer)

    @torch.no_grad()
    def _settle(self, payload: Payload) -> None:
        """Put the blocks of the next plan into their slots. Nothing reads the slots any more."""
        # Where capacities change, the blocks are in the new flat tensor already, and only the shared part is missing:
        # it is copied last, since its mean was complete only now. The old tensor is freed when the network is resized.
        for worker, resized in payload.resized.items():
            subnet = self.workers[worker].subnet
            subnet.slot(None, 0, resized).copy_(subnet.slot(None, 0, payload.flats[worker]))
            payload.flats[worker] = resized
        # Elsewhere the flat tensor stays, with the parameters on it, and blocks are copied from where they arrived.
        for (worker, chain, slot), arriving in payload.arriving.items():
            if worker not in payload.resized:
                self.workers[worker].subnet.slot(chain, slot, payload.flats[worker]).copy_(arriving)
        payload.arriving.clear()
