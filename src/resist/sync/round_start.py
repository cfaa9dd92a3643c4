"""The beginning of a round: copies of what begins it, from which it can be repeated with other members."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resist.blocks.chain import Chain
from resist.planning.members import Members
from resist.planning.plan import Key, RoundPlan
from resist.planning.regrouping import Held
from resist.subnet.buffers import Part
from resist.subnet.flats import Flats
from resist.subnet.network import Subnet
from resist.sync.averaging import VELOCITY
from resist.sync.round_end import RoundEnd
from resist.sync.streaming import Streaming
from resist.sync.transport import Transport
from resist.sync.worker import Worker

Loose = dict[Part, dict[str, Tensor]]


@dataclass(frozen=True)
class WorkerStart:
    """What one worker begins a round with. The state of its optimizers is not part of it.

    Attributes:
        worker: The worker.
        index: Its number in this round.
        held: Its blocks.
        weights: Its weights, as all workers agree on them.
        average: Its average of the weights over time, if there is one.
        velocity: Its outer momentum, if there is one.
        loose: Buffers that are in no flat tensor.
        average_loose: The same of the average.
    """

    worker: Worker
    index: int
    held: Held
    weights: Flats
    average: Flats | None
    velocity: Flats | None
    loose: Loose
    average_loose: Loose


@dataclass(frozen=True)
class RoundStart:
    """What one process keeps of a round's beginning.

    Attributes:
        generation: The job's generation.
        round: The round.
        step: Optimizer steps done.
        members: The workers.
        own: What the hosted workers begin with.
        blocks: Replicas of blocks that a single worker holds: (chain number, block) -> flat tensor of each dtype.
    """

    generation: int
    round: int
    step: int
    members: Members
    own: tuple[WorkerStart, ...]
    blocks: Mapping[Key, Flats] = field(default_factory=dict[Key, Flats])

    def of(self, worker: Worker) -> WorkerStart | None:
        """Return what a worker begins the round with, or None if it was not there."""
        return next((own for own in self.own if own.worker is worker), None)

    @property
    def key(self) -> tuple[int, int]:
        """Generation and round."""
        return self.generation, self.round


def begin_round(
    transport: Transport,
    workers: Sequence[Worker],
    end: RoundEnd,
    *,
    keep_anchor: bool,
    keep_average: bool,
    agreed: bool,
) -> Streaming | None:
    """Copy the weights that begin a round, where something needs them.

    Args:
        transport: Connects the workers.
        workers: The hosted workers.
        end: The end of the round, if it has all its steps.
        keep_anchor: Copy them, whether the means of the round need them or not.
        keep_average: Copy averages over time, too.
        agreed: All workers have equal weights.

    Returns:
        The fragments that are averaged in the course of the round, or None.
    """
    wire, outer = end.wire, end.strategy.outer
    sends_changes = transport.num_workers > 1 and wire.sends_changes
    # Everything is averaged at the end of a round that begins or ends holding all blocks.
    streams = sends_changes and wire.fragments > 0 and end.plan.held_by_all == end.next_plan.held_by_all
    for worker in workers:
        worker.begin_round(
            keep_anchor=keep_anchor,
            keep_average=keep_average,
            outer=outer is not None,
            changes=("all" if end.plan.held_by_all else "shared") if sends_changes else None,
            fragments=wire.fragments if streams else 0,
            agreed=agreed,
        )
    if not streams:
        return None
    return Streaming(transport, workers, end)


@torch.no_grad()
def worker_start(worker: Worker, held: Held) -> WorkerStart:
    """Collect what a worker begins a round with.

    Args:
        worker: The worker, with an anchor, which is not copied.
        held: Its blocks.
    """
    assert worker.anchor is not None, "`Job.mark_anchors` copies it where starts are kept"
    velocity = worker.state.get(VELOCITY)
    return WorkerStart(
        worker,
        worker.index,
        held,
        worker.anchor,
        worker.average_anchor,
        None if velocity is None else {dtype: flat.clone() for dtype, flat in velocity.items()},
        _copied(worker.subnet),
        {} if worker.average is None else _copied(worker.average),
    )


def _copied(subnet: Subnet) -> Loose:
    return {part: {name: value.clone() for name, value in own.items()} for part, own in subnet.loose().items()}


@torch.no_grad()
def first_blocks(
    values: Mapping[str, Tensor], chains: Sequence[Chain], plan: RoundPlan, workers: Sequence[Worker]
) -> dict[Key, Flats]:
    """Make replicas for the first round, which every process can take from the initial network.

    Args:
        values: Tensors of the network by global dotted name.
        chains: The chains.
        plan: Plan of the first round.
        workers: The hosted workers.

    Returns:
        Replicas of the blocks that only the worker before one of them holds.
    """
    hosted, layouts = {worker.index for worker in workers}, workers[0].subnet.layouts
    blocks: dict[Key, Flats] = {}
    for chain, block in plan.keys:
        holders = plan.holders(chain, block)
        if len(holders) > 1 or not hosted & {(holder + 1) % plan.workers for holder in holders}:
            continue
        blocks[chain, block] = {}
        for dtype, layout in layouts.items():
            part = layout.blocks[chain]
            flat = torch.zeros(part.numel, dtype=dtype, device=workers[0].subnet.device)
            for key, piece in part.pieces.items():
                piece.view(flat).copy_(values[chains[chain].tensor_name(block, key)])
            blocks[chain, block][dtype] = flat
    return blocks


def first_buffers(
    values: Mapping[str, Tensor], chains: Sequence[Chain], subnet: Subnet
) -> dict[Key, dict[str, Tensor]]:
    """Copy the buffers of blocks that are in no flat tensor.

    A block that is recovered from its replica begins with them.

    Args:
        values: Tensors of the network by global dotted name.
        chains: The chains.
        subnet: A sub-network.

    Returns:
        (chain number, block) -> buffers by their name in the block.
    """
    loose = {place.key for place, buffer in subnet.buffers.items() if buffer.view is None}
    return {
        (number, block): {
            piece: values[name].clone()
            for key, piece in sorted(loose, key=str)
            if key == number and (name := chain.tensor_name(block, piece)) in values
        }
        for number, chain in enumerate(chains)
        for block in range(chain.num_blocks)
    }


def with_start(starts: Sequence[RoundStart], start: RoundStart) -> list[RoundStart]:
    """Return starts with another one, in place of one of the same round."""
    return [*(other for other in starts if other.key != start.key), start]
