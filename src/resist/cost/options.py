"""Memory that options add to a network: averages, an outer optimizer, replicas, means of changes."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from resist.cost.footprint import Network
from resist.cost.sizes import Part
from resist.cost.traffic import RoundTraffic
from resist.planning.fragments import fragment_sizes
from resist.planning.wire import FORMATS, FP32, Wire


def change_bytes(part: Part, wire: Wire, workers: int, *, anchored: bool = False) -> int:
    """Count the bytes that a worker needs for changes that are averaged.

    These are the numbers that begin the round, which all workers agree on; with a format that loses something, the
    errors of its codes; and with fragments, what is on its way of one of them: a copy of its numbers, what is sent, and
    in such a format what is received. Without fragments that is there only while nothing is trained.

    Args:
        part: What is averaged.
        wire: Formats and fragments.
        workers: Number of workers.
        anchored: Another option keeps the weights that begin the round, which serve for both without fragments.
    """
    numel, compressed = part.trained.get(torch.float32, 0), wire.shared != FP32
    if not numel or not wire.sends_changes:
        return 0
    sizes = fragment_sizes(numel, wire.fragments) if wire.fragments else [numel]
    needed = 0 if anchored and not wire.fragments else numel * torch.float32.itemsize
    if compressed:  # of what the worker sends, and of the pieces that it averages
        pieces = sum(FORMATS[wire.shared].pieces(size, workers)[0] for size in sizes)
        needed += (numel + pieces) * torch.bfloat16.itemsize
    if wire.fragments:
        encoded = max(part.fragment_bytes(wire.shared, wire.fragments))
        needed += max(sizes) * torch.float32.itemsize + (2 if compressed else 1) * encoded
    return needed


def with_average(network: Network) -> Network:
    """Add the memory of an average of the weights."""
    memory, average = network.memory, network.memory.weights
    return replace(network, memory=replace(memory, average=average, peak=memory.peak + average))


def with_outer(network: Network) -> Network:
    """Add the memory of an outer optimizer: two tensors of the size of the weights."""
    memory, outer = network.memory, 2 * network.memory.weights
    return replace(network, memory=replace(memory, outer=outer, peak=memory.peak + outer))


def with_changes(network: Network, changes: int) -> Network:
    """Add the memory of means of changes, see `change_bytes`."""
    memory = network.memory
    return replace(network, memory=replace(memory, changes=changes, peak=memory.peak + changes))


def with_replicas(network: Network, run: Sequence[RoundTraffic], worker: int) -> Network:
    """Add replicas of blocks and the round's first weights, which an outer optimizer keeps anyway."""
    memory = network.memory
    blocks = max(traffic.replica_bytes.get(worker, 0) for traffic in run)
    replicas = blocks + (0 if memory.outer else memory.weights)
    return replace(network, memory=replace(memory, replicas=replicas, peak=memory.peak + replicas))
