"""Replicas: a second copy of every block, so that no round is lost with any one worker."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from resist.planning.plan import Key, RoundPlan
from resist.subnet.flats import Flats
from resist.sync.transport import Transport
from resist.sync.worker import Worker


@dataclass(frozen=True)
class Replica:
    """Weights that one process keeps: its own workers' and replicas.

    Together, the processes have the complete network, and still have it without any one worker.

    Attributes:
        round: Rounds done when the network was synchronized.
        step: Optimizer steps done by then.
        tensors: Tensors by global dotted name: those of the hosted workers, and replicas of blocks that a worker of
            another process holds alone.
    """

    round: int
    step: int
    tensors: dict[str, Tensor]


@torch.no_grad()
def collect_replica(
    workers: Sequence[Worker], *, plan: RoundPlan, blocks: Mapping[Key, Flats], round: int, step: int
) -> Replica:
    """Collect the weights that one process keeps.

    Nothing is copied: the tensors are views.

    Args:
        workers: The hosted workers; their anchors are the weights as they were synchronized.
        plan: Plan of the round that begins.
        blocks: Blocks kept for other workers: (chain number, block) -> flat tensor of each dtype.
        round: Rounds done.
        step: Optimizer steps done.

    Returns:
        The replica.
    """
    tensors: dict[str, Tensor] = {}
    for worker in workers:
        tensors |= worker.subnet.state(plan.held(worker.index), worker.anchor)
    chains, layouts = workers[0].subnet.chains, workers[0].subnet.layouts
    for (chain, block), flats in blocks.items():
        for dtype, flat in flats.items():
            pieces = layouts[dtype].blocks[chain].pieces
            tensors |= {chains[chain].tensor_name(block, key): piece.view(flat) for key, piece in pieces.items()}
    return Replica(round, step, tensors)


def keep_newest(transport: Transport, replicas: list[Replica], replica: Replica) -> None:
    """Append `replica` and, when all processes have theirs, drop older ones.

    Waits for all processes. Until they have answered, this process holds the replicas of two rounds: if another process
    is lost in this moment, the remaining ones have at least one of the two complete.

    Args:
        transport: Connects the processes.
        replicas: Replicas of this process, changed in place.
        replica: The newest one.

    Raises:
        WorkerLostError: If another process is lost.
    """
    replicas.append(replica)
    transport.all_gather_text("kept")
    del replicas[:-1]
