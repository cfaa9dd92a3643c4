"""What depends on the weights at the beginning of a round: the outer step, and undoing a round."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resist.planning.strategy import OuterSGD
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS, outer_step
from resist.sync.fragments import write_anchors
from resist.sync.payload import Payload
from resist.sync.worker import Worker


@torch.no_grad()
def discard_round(worker: Worker, payloads: Sequence[Payload]) -> None:
    """Undo the round of a dropped worker.

    Weights and averages are as at its beginning, optimizer state is zero. Fragments that were averaged since are as all
    workers agree on them.

    Args:
        worker: The worker, which has anchors.
        payloads: The payloads.
    """
    for payload in payloads:
        flat = payload.flats[worker.index]
        if payload.name == WEIGHTS:
            flat.copy_(_anchor(worker, payload.dtype))
            if payload.dtype == torch.float32:
                write_anchors(worker.fragments, flat)
        elif payload.name == AVERAGE:
            assert worker.average_anchor is not None, "`Worker.begin_round` copies it where an option needs it"
            flat.copy_(worker.average_anchor[payload.dtype])
        elif payload.name != VELOCITY:
            flat.zero_()


def take_outer_step(
    worker: Worker,
    payloads: Sequence[Payload],
    outer: OuterSGD,
    chain: int | None,
    slot: int,
    *,
    streamed: bool = False,
) -> None:
    """Take the outer step on one part.

    Args:
        worker: The worker, which has an anchor.
        payloads: The payloads, with the outer momentum.
        outer: The outer optimizer.
        chain: Number of the chain; None for the shared part.
        slot: Slot of the chain; 0 for the shared part.
        streamed: The part is averaged in fragments, each of which takes the step of what trains in single precision.
    """
    subnet = worker.subnet
    for payload in payloads:
        if payload.name == VELOCITY:
            flats = subnet.flats[payload.dtype], _anchor(worker, payload.dtype), payload.flats[worker.index]
            # Weights that train, and frozen ones that train by now; not running statistics.
            part = subnet.layouts[payload.dtype].part(chain)
            frozen = {name for key, name in subnet.changing if key == chain} & part.frozen
            trained = not streamed or payload.dtype != torch.float32
            for start, end in part.ranges(frozen, trained=trained):
                weights, anchor, velocity = (
                    subnet.slot(chain, slot, flat, dtype=payload.dtype)[start:end] for flat in flats
                )
                outer_step(weights, anchor, velocity, outer)


def _anchor(worker: Worker, dtype: torch.dtype) -> Tensor:
    assert worker.anchor is not None, "`Job.mark_anchors` copies them where an option needs them"
    return worker.anchor[dtype]
