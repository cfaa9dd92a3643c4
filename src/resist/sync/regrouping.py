"""Regrouping: a job goes on in the same processes, with other members.

1. Each process says where it stands, and all choose the same point to go on from; see `resist.planning.regrouping`.
2. Each worker takes what it has at that point, and keepers of replicas add the blocks that were lost.
3. An exchange, as at the end of any round, leads from there to a plan of the strategy for the new number of workers.
   Those that join hold nothing before it. It is not compressed: who joins has no anchor for changes.

Everything that can be refused is refused before the weights of any process change.
"""

from collections.abc import Mapping, Sequence

import torch

from resist.planning.plan import Key
from resist.subnet.flats import Flats
from resist.sync.averaging import VELOCITY
from resist.sync.recovery import join, keep_present, return_to
from resist.sync.round_agreement import agree_on_round
from resist.sync.synchronization import collect, exchange
from resist.sync.target import GroupedJob, Target
from resist.sync.transport import Transport
from resist.sync.worker import Worker


def move(job: GroupedJob, transport: Transport, workers: Sequence[Worker], target: Target) -> dict[Key, Flats]:
    """Lead the hosted workers to the target. Their numbers are the new ones afterwards, or the old ones if it fails.

    Args:
        job: The job.
        transport: Connects the new members.
        workers: The workers of this process that stay, in the order of `transport.hosted`.
        target: Where they go on.

    Returns:
        The replicas that this process keeps: (chain number, block) -> flat tensor of each dtype.

    Raises:
        AgreedError: In all processes, if their optimizers or averages do not fit each other.
        DivergedError: In all processes, if a worker has diverged.
        WorkerLostError: If another process is lost. The weights are then those of no round.
    """
    before = [worker.index for worker in workers]
    try:
        for worker, index in zip(workers, transport.hosted, strict=True):
            worker.index = index
        _take_up(job, target, workers)
        agreed = agree_on_round(transport, workers, target.end, {}, target.regrouping.joined)
        job.dropped = agreed.nonfinite
        collect(workers, target.end, agreed, on_nonfinite=job.on_nonfinite)
        _share_anchors(transport, workers, target)
        return exchange(transport, workers, target.end, agreed, replicate=job.replicate)
    except BaseException:
        for worker, index in zip(workers, before, strict=True):
            worker.index = index
        raise


def _take_up(job: GroupedJob, target: Target, workers: Sequence[Worker]) -> None:
    """Give the hosted workers, which have their new numbers, what they have at the point to go on from."""
    point, plan = target.regrouping.point, target.end.plan
    start = next((start for start in job.starts if start.key == (point.generation, point.round)), None)
    replicas: Mapping[Key, Flats] = {} if start is None else start.blocks
    for worker in workers:
        former, after = target.regrouping.former.get(worker.index), plan.held(worker.index)
        own = None if start is None or point.steps else start.of(worker)
        if former is None:
            join(worker)
        elif own is None:
            keep_present(worker, job.plan.held(former), after, replicas, job.first_buffers)
        else:
            return_to(worker, own, after, replicas, job.first_buffers)
        if target.end.strategy.outer is not None and VELOCITY not in worker.state:
            for dtype in worker.subnet.flats:
                worker.state_flat(VELOCITY, dtype)
        for subnet in filter(None, (worker.subnet, worker.average)):
            subnet.changing = set(target.changing)


@torch.no_grad()
def _share_anchors(transport: Transport, workers: Sequence[Worker], target: Target) -> None:
    """Give workers that join what the outer optimizer needs for its step on the shared part: where the round began.

    Waits for all processes, if there is such a step.
    """
    joined = target.regrouping.joined
    if not joined or not target.end.steps or target.end.strategy.outer is None:
        return
    for worker in workers:  # copies: what begins the round has to stay, in case that another process is lost
        flats = worker.subnet.flats.items() if worker.anchor is None else worker.anchor.items()
        worker.anchor = {d: torch.zeros_like(f) if worker.index in joined else f.clone() for d, f in flats}
    scale = transport.num_workers / (transport.num_workers - len(joined))
    for dtype in workers[0].subnet.flats:
        anchors = [worker.anchor[dtype] for worker in workers if worker.anchor is not None]
        shared = [w.subnet.slot(None, 0, flat, dtype=dtype) for w, flat in zip(workers, anchors, strict=True)]
        transport.mean(shared, "shared", scale).finish()
