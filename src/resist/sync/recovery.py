"""Recovery: give a worker what it has at the point from which members go on, with blocks that others have lost."""

from collections.abc import Mapping

import torch
from torch import Tensor

from resist.planning.plan import Key
from resist.planning.regrouping import Held
from resist.subnet.flats import Flats
from resist.subnet.network import Subnet
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS
from resist.sync.loose import parts_of
from resist.sync.optimizer_state import start_over
from resist.sync.round_start import WorkerStart
from resist.sync.worker import Worker

Blocks = Mapping[Key, Flats]
Buffers = Mapping[Key, Mapping[str, Tensor]]


def keep_present(worker: Worker, before: Held, after: Held, replicas: Blocks, buffers: Buffers) -> None:
    """Let a worker go on with its present weights, and add blocks that were lost.

    The optimizer has no state of these. Their average begins with their weights, their outer momentum with zero.

    Args:
        worker: The worker, not in the middle of an exchange.
        before: Its blocks.
        after: The same, and behind those of each chain the blocks that were lost.
        replicas: The weights of these blocks, as they began the round.
        buffers: Their buffers that are in no flat tensor.
    """
    worker.take_back()
    worker.fragments, worker.watches = [], []
    if after == before:
        return
    subnet = worker.subnet
    flats = {name: widened(subnet, own, before, after) for name, own in worker.state.items()}
    flats[WEIGHTS] = widened(subnet, subnet.flats, before, after, replicas)
    if worker.average is not None:
        flats[AVERAGE] = widened(subnet, worker.average.flats, before, after, replicas)
    if worker.anchor is not None:
        worker.anchor = widened(subnet, worker.anchor, before, after, replicas)
    if worker.average_anchor is not None:
        worker.average_anchor = widened(subnet, worker.average_anchor, before, after, replicas)
    known = {id(parameter) for parameter in worker.subnet.model.parameters()}
    worker.finish_round(flats, after)
    for optimizer in worker.optimizers:
        start_over(optimizer, [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known])
    _put_buffers(worker, before, after, buffers)


@torch.no_grad()
def return_to(worker: Worker, start: WorkerStart, after: Held, replicas: Blocks, buffers: Buffers) -> None:
    """Let a worker return to the beginning of a round, and add blocks that were lost.

    Its optimizers start over; see `keep_present` for the blocks.

    Args:
        worker: The worker.
        start: What it has begun the round with.
        after: The blocks of `start`, and behind those of each chain the blocks that were lost.
        replicas: The weights of these blocks, as they began the round.
        buffers: Their buffers that are in no flat tensor.
    """
    subnet, before = worker.subnet, start.held
    join(worker)
    flats = {WEIGHTS: widened(subnet, start.weights, before, after, replicas)}
    if worker.average is not None:
        flats[AVERAGE] = widened(subnet, start.average or start.weights, before, after, replicas)
    if start.velocity is not None:
        flats[VELOCITY] = widened(subnet, start.velocity, before, after)
    worker.replace(flats, after)
    worker.reset_state()  # of new parameters, too
    for own, loose in ((worker.subnet, start.loose), (worker.average, start.average_loose)):
        if own is not None:
            for part in (p for p in parts_of(own) if p[0] is None or after[p[0]][p[1]] in before[p[0]]):
                own.put_loose(*part, loose.get(part, {}))
    _put_buffers(worker, before, after, buffers)


def join(worker: Worker) -> None:
    """Let a worker forget everything of its own: it gets all from others."""
    worker.take_back()
    worker.reset_state()
    worker.state.clear()
    worker.fragments, worker.watches, worker.apart = [], [], False
    worker.anchor = worker.average_anchor = None


@torch.no_grad()
def widened(subnet: Subnet, flats: Flats, before: Held, after: Held, replicas: Blocks | None = None) -> Flats:
    """Copy flat tensors to those of more slots.

    Args:
        subnet: The sub-network, for the layouts.
        flats: Flat tensors laid out for `before`, by dtype of the weights.
        before: Blocks of each chain, by slot.
        after: Blocks of each chain, by slot.
        replicas: The values of blocks that are not in `before`. Default: zero.

    Returns:
        Flat tensors laid out for `after`.
    """
    wider: Flats = {}
    for dtype, flat in flats.items():
        old, new = (subnet.layouts[dtype].with_capacities([len(blocks) for blocks in held]) for held in (before, after))
        wide = wider[dtype] = new.new_flat(flat.dtype, flat.device)
        new.slot(None, 0, wide).copy_(old.slot(None, 0, flat))
        for chain, blocks in enumerate(after):
            for slot, block in enumerate(blocks):
                target = new.slot(chain, slot, wide)
                if block in before[chain]:
                    target.copy_(old.slot(chain, before[chain].index(block), flat))
                elif replicas is not None:
                    target.copy_(replicas[chain, block][dtype])
                else:
                    target.zero_()
    return wider


def _put_buffers(worker: Worker, before: Held, after: Held, buffers: Buffers) -> None:
    """Give blocks that were added the buffers of the initial network, and Python attributes as they were built."""
    for subnet in filter(None, (worker.subnet, worker.average)):
        for chain, blocks in enumerate(after):
            for slot, block in enumerate(blocks):
                if block not in before[chain]:
                    subnet.put_loose(chain, slot, buffers.get((chain, block), {}))
