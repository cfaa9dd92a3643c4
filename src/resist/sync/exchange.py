"""Exchange: one synchronization, from the weights of one round to those of the next, as `schedule` lists it.

1. Creating it begins the mean of the shared part over all workers, and sends the blocks that several workers hold to
   their owners, as one batch.
2. `finish` averages them at their owners, sends the means to the next holders, as one batch, and puts everything into
   its slots.

The two are separate so that something else can be computed between them.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resist.planning.plan import Key
from resist.planning.schedule import Message, schedule
from resist.planning.slots import fill_order
from resist.planning.wire import FP32
from resist.subnet.flats import Flats
from resist.subnet.pieces import Layout
from resist.sync.anchors import discard_round, take_outer_step
from resist.sync.averaging import WEIGHTS, mean_into
from resist.sync.encoded_blocks import EncodedBlocks
from resist.sync.payload import Payload, collect_payloads
from resist.sync.round_agreement import RoundAgreement
from resist.sync.round_end import RoundEnd
from resist.sync.shared_mean import SharedMean
from resist.sync.transport import Move, Transport
from resist.sync.worker import Worker


class Exchange:
    """The synchronization between two plans, for the hosted workers.

    Creating it begins the exchange, and `finish` completes it.

    Args:
        transport: Connects the workers.
        workers: The hosted workers. With an outer optimizer, or workers that are dropped, they have anchors.
        end: The end of the round.
        agreed: The optimizer states that any worker has, and workers that are left out of every mean. Blocks that only
            they held return to their anchors.
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
        workers: Sequence[Worker],
        end: RoundEnd,
        agreed: RoundAgreement,
        *,
        replicate: bool = False,
    ) -> None:
        self.transport = transport
        self.workers = {worker.index: worker for worker in workers}
        self.end, self.plan, self.next_plan = end, end.plan, end.next_plan
        self.dropped = agreed.left_out
        self.payloads = collect_payloads(workers, end, agreed.states)
        self.encoded = EncodedBlocks(end, workers[0].subnet)
        # 1. List the messages. Every process computes the same list, so no message says which block goes where.
        weights = [payload for payload in self.payloads if payload.name == WEIGHTS]
        block_bytes = [sum(self._num_bytes(p, chain) for p in weights) for chain in range(len(self.plan.plans))]
        self.schedule = schedule(self.plan, self.next_plan, block_bytes, replicate=replicate)
        # 2. Undo the round of dropped workers, before anything of it is sent.
        for worker in agreed.nonfinite.keys() & self.workers.keys():
            discard_round(self.workers[worker], self.payloads)
        # 3. Begin the mean of the shared part, but for fragments that were averaged before: one collective for each
        #    payload, in place. It runs while blocks are exchanged, and nothing reads the shared part until `finish` has
        #    waited for all workers.
        averaged = [payload for payload in self.payloads if payload.average_shared and transport.num_workers > 1]
        self.means = [SharedMean(transport, payload, self.workers, end, self.dropped) for payload in averaged]
        # 4. Send the blocks with several holders to their owners: one batch for all payloads. The owners need memory
        #    for each block they receive; the slots are only read. No process waits before `finish`.
        self.moving = [payload for payload in self.payloads if payload.moves]
        self.sent = self._messages([payload for payload in self.moving if payload.average_blocks], "average")
        self.averaging = transport.transfer([self._average_move(payload, m) for payload, m in self.sent])

    def finish(self) -> dict[Key, Flats]:
        """Wait until everything has arrived.

        Afterwards the workers have the sub-networks of the next plan.

        Returns:
            (chain number, block) -> flat tensors, by dtype, of each replica that this process keeps.

        Raises:
            WorkerLostError: If another process is lost.
        """
        # 1. Owners wait for the other holders of their blocks, and average. Their slots then have the means.
        self._average(self.averaging.finish())
        # 2. Owners take the outer step on their blocks, before they hand them over: its momentum goes along.
        for (chain, block), owner in self.schedule.owners.items():
            # A block that only dropped workers held stays as it was: momentum does not move it.
            if owner in self.workers and not set(self.plan.holders(chain, block)) <= self.dropped:
                self._outer_step(owner, chain, self.plan.slot(chain, block, worker=owner))
        # 3. Send the blocks from the slots of their owners to their next holders, and replicas along with them, as one
        #    batch. Slots that are read keep their blocks until the batch is complete; others receive at once. Each
        #    process waits for the owners that send to it, and for those that it sends to.
        handed = self._messages(self.moving, "hand_over")
        for payload, m in handed if self.end.wire.compresses else ():
            if payload.block_format != FP32 and m.source in self.workers:
                # The owner has what the others get, whether it holds the block any more or not.
                slot = self._slot(payload, m.chain, m.block, m.source)
                self.encoded.round(payload, m, slot)
        replicas = self._make_replicas()
        weights = [payload for payload in self.payloads if payload.name == WEIGHTS]
        copied = self._messages(weights, "replicas")
        for payload in self.payloads:
            self._prepare(payload, handed + copied)
        moves = [self._hand_over_move(payload, m) for payload, m in handed]
        moves += [self._replica_move(payload, m, replicas) for payload, m in copied]
        transfer = self.transport.transfer(moves)
        # 4. Wait for all workers: the mean of the shared part. If compressed, its second half goes with the blocks.
        for mean in self.means:
            mean.advance()
        for (payload, m), tensor in zip(handed + copied, transfer.finish(), strict=True):
            if payload.block_format != FP32 and m.target in self.workers:
                assert tensor is not None
                self.encoded.decode(payload, m, tensor, into=self._target(payload, m, replicas))
        for mean in self.means:
            mean.finish()
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
            flats: dict[str, Flats] = {}
            for payload in self.payloads:
                flats.setdefault(payload.name, {})[payload.dtype] = payload.flats[index]
            worker.finish_round(flats, self.next_plan.held(index))
        return replicas

    def _messages(self, payloads: Sequence[Payload], phase: str) -> list[tuple[Payload, Message]]:
        """The messages of a phase, for each payload.

        A block without weights of a dtype is no message.
        """
        messages: Sequence[Message] = getattr(self.schedule, phase)
        return [(payload, m) for payload in payloads for m in messages if self._numel(payload, m.chain)]

    def _numel(self, payload: Payload, chain: int) -> int:
        return self._block(payload, chain).numel

    def _block(self, payload: Payload, chain: int) -> Layout:
        return next(iter(self.workers.values())).subnet.layouts[payload.dtype].blocks[chain]

    def _num_bytes(self, payload: Payload, chain: int) -> int:
        return payload.block_bytes(self._block(payload, chain))

    def _slot(self, payload: Payload, chain: int, block: int, worker: int) -> Tensor:
        """The slot in which `worker` holds `block` before the synchronization."""
        slot = self.plan.slot(chain, block, worker=worker)
        return self.workers[worker].subnet.slot(chain, slot, payload.flats[worker], dtype=payload.dtype)

    def _move(self, payload: Payload, m: Message, incoming: Tensor | None, traffic_kind: str) -> Move:
        """The move of one slot; received in `incoming`, or encoded in a tensor of its own."""
        outgoing = self._slot(payload, m.chain, m.block, m.source) if m.source in self.workers else None
        num_bytes = self._num_bytes(payload, m.chain)
        if payload.block_format != FP32:
            outgoing = None if outgoing is None else self.encoded.encode(payload, m, outgoing)
            received = m.target in self.workers and m.source not in self.workers
            incoming = self.encoded.room(num_bytes) if received else None
        return Move(traffic_kind, m.source, m.target, num_bytes, outgoing, incoming)

    def _new_block(self, payload: Payload, chain: int) -> Tensor:
        return next(iter(payload.flats.values())).new_empty(self._numel(payload, chain))

    def _average_move(self, payload: Payload, m: Message) -> Move:
        # Between two workers of this process, the owner reads the slot itself.
        received = m.target in self.workers and m.source not in self.workers
        return self._move(
            payload, m, self._new_block(payload, m.chain) if received else None, payload.traffic_kind("blocks")
        )

    @torch.no_grad()
    def _average(self, arrived: Sequence[Tensor | None]) -> None:
        """Average the blocks in the slots of owners hosted here."""
        received: dict[tuple[int, int, int], tuple[Payload, list[Tensor]]] = {}
        for (payload, m), tensor in zip(self.sent, arrived, strict=True):
            if m.target in self.workers and m.source not in self.dropped:
                assert tensor is not None
                if payload.block_format != FP32:
                    tensor = self.encoded.decode(payload, m, tensor)
                received.setdefault((id(payload), m.chain, m.block), (payload, []))[1].append(tensor)
        for (_, chain, block), (payload, tensors) in received.items():
            owner = self.schedule.owners[chain, block]
            slot = self._slot(payload, chain, block, owner)
            if owner in self.dropped:
                slot.copy_(tensors.pop(0))
            mean_into(slot, tensors)

    def _hand_over_move(self, payload: Payload, m: Message) -> Move:
        return self._move(payload, m, self._target(payload, m, {}), payload.traffic_kind("blocks"))

    def _target(self, payload: Payload, m: Message, replicas: Mapping[Key, Flats]) -> Tensor | None:
        """The tensor that a handed block, or a replica, is to fill here."""
        if m.phase == "replica":
            return replicas[m.chain, m.block][payload.dtype] if m.target in self.workers else None
        return payload.arriving.get((m.target, m.chain, self.next_plan.slot(m.chain, m.block, worker=m.target)))

    @torch.no_grad()
    def _make_replicas(self) -> dict[Key, Flats]:
        """Copy replicas that stay, and make room for those that arrive."""
        replicas: dict[Key, Flats] = {}
        weights = [payload for payload in self.payloads if payload.name == WEIGHTS]
        for (chain, block), keeper in self.schedule.keepers.items():
            if keeper in self.workers:
                here = keeper == self.schedule.owners[chain, block]
                replicas[chain, block] = {
                    p.dtype: self._slot(p, chain, block, keeper).clone() if here else self._new_block(p, chain)
                    for p in weights
                }
        return replicas

    def _replica_move(self, payload: Payload, m: Message, replicas: dict[Key, Flats]) -> Move:
        return self._move(payload, m, self._target(payload, m, replicas), "replica")

    @torch.no_grad()
    def _prepare(self, payload: Payload, sent: Sequence[tuple[Payload, Message]]) -> None:
        """Copy blocks that change their slot, and find the place of those that arrive.

        Blocks arrive in their slot, or in memory of their own where messages read the slot: at most one block for each
        block that is sent. A worker whose capacities change has a second flat tensor. `_settle` frees the former,
        `Worker.finish_round` the old flat tensors.

        Args:
            payload: The payload.
            sent: What messages read from the slots.
        """
        if self.schedule.held_by_all:
            return
        for index, worker in self.workers.items():
            subnet, capacities = worker.subnet, self.next_plan.capacities(index)
            resized = None
            if capacities != subnet.capacities:
                layout, flat = subnet.layouts[payload.dtype].with_capacities(capacities), payload.flats[index]
                resized = payload.resized[index] = layout.new_flat(flat.dtype, flat.device)
            for chain, after in enumerate(self.next_plan.held(index)):
                # Values that do not move are used as they are; of those that do, only the owner has the mean.
                here = {b for b in after if self.schedule.owners[chain, b] == index or not payload.moves}
                read = {m.block for p, m in sent if p is payload and (m.source, m.chain) == (index, chain)}
                before = self.plan.held(index)[chain]
                for fill in fill_order(before, after, here, read, refill=resized is not None):
                    if resized is not None:
                        arriving = subnet.slot(chain, fill.slot, resized, dtype=payload.dtype, capacities=capacities)
                    elif fill.apart:
                        arriving = self._new_block(payload, chain)
                    else:
                        arriving = subnet.slot(chain, fill.slot, payload.flats[index], dtype=payload.dtype)
                    payload.arriving[index, chain, fill.slot] = arriving
                    # From another slot of this worker, or zero for a state that does not move. Otherwise the owner
                    # sends it.
                    if fill.source is not None:
                        arriving.copy_(self._slot(payload, chain, before[fill.source], index))
                    elif not payload.moves:
                        arriving.zero_()

    def _outer_step(self, worker: int, chain: int | None, slot: int) -> None:
        """Take the outer step, if there is one, on one part."""
        if self.end.strategy.outer is not None and self.end.steps:
            streamed = self.end.streamed is not None and (chain is None or self.schedule.held_by_all)
            take_outer_step(
                self.workers[worker], self.payloads, self.end.strategy.outer, chain, slot, streamed=streamed
            )

    @torch.no_grad()
    def _settle(self, payload: Payload) -> None:
        """Put the blocks of the next plan into their slots.

        Nothing reads the slots any more.
        """
        # Where capacities change, the blocks are in the new flat tensor already, and only the shared part is missing:
        # it is copied last, since its mean was complete only now. The old tensor is freed when the network is resized.
        for worker, resized in payload.resized.items():
            subnet, capacities = self.workers[worker].subnet, self.next_plan.capacities(worker)
            before = subnet.slot(None, 0, payload.flats[worker], dtype=payload.dtype)
            subnet.slot(None, 0, resized, dtype=payload.dtype, capacities=capacities).copy_(before)
            payload.flats[worker] = resized
        # Elsewhere the flat tensor stays, with the parameters on it, and blocks that did not arrive there are copied.
        for (worker, chain, number), arriving in payload.arriving.items():
            slot = self.workers[worker].subnet.slot(chain, number, payload.flats[worker], dtype=payload.dtype)
            if worker not in payload.resized and slot.data_ptr() != arriving.data_ptr():
                slot.copy_(arriving)
        payload.arriving.clear()
