"""Traffic of a round, counted from the schedule of its messages."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from resist.cost.sizes import NO_STATE, Sizes, StateSizes
from resist.planning.plan import RoundPlan
from resist.planning.schedule import Message, allreduce_bytes, schedule
from resist.planning.strategy import Strategy
from resist.planning.wire import Wire

Way = tuple[str, int]  # ("out" or "in", worker): one direction of a worker's link to the network

# Buckets of gradients in DistributedDataParallel: the first one is small, so that the exchange begins early.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20


@dataclass(frozen=True)
class RoundTraffic:
    """Traffic of one round.

    Attributes:
        bytes: Bytes sent by all workers, by traffic kind: "shared", "blocks", "state" and "replica" as a transport
            counts them; "gradients" and "buffers" under DistributedDataParallel.
        ring_bytes: Bytes that each worker sends, and receives, in all-reduces and compressed means.
        allreduces: Number of all-reduces.
        compressed: Number of compressed means: two messages one after the other, however many workers there are.
        scattered: Bytes that each worker sends in the first halves of compressed means, to all others; in `ring_bytes`.
        fragments: Bytes that each worker sends for each fragment that is averaged during the round; in `ring_bytes`.
            Each is an all-reduce or a compressed mean, and counted as such.
        average: Bytes by direction of a link in the phase that averages blocks.
        hand_over: Bytes by direction of a link in the phase that hands blocks over.
        replica_bytes: Bytes of replicas that each worker keeps.
    """

    bytes: Mapping[str, int]
    ring_bytes: int
    allreduces: int
    average: Mapping[Way, int]
    hand_over: Mapping[Way, int]
    replica_bytes: Mapping[int, int] = field(default_factory=dict)
    compressed: int = 0
    scattered: int = 0
    fragments: tuple[int, ...] = ()

    def links(self, workers: int) -> dict[Way, int]:
        """Return the bytes over each direction of every worker's link, with all-reduces."""
        keys = [(way, worker) for way in ("out", "in") for worker in range(workers)]
        return {key: self.ring_bytes + self.average.get(key, 0) + self.hand_over.get(key, 0) for key in keys}


@dataclass(frozen=True)
class Traffic:
    """Traffic of a mean round.

    Attributes:
        paper_bytes: Bytes as the paper counts them, see `paper_bytes`.
        bytes: Bytes sent by all workers, by traffic kind, mean over rounds.
        link_bytes: Bytes over one direction of a link, mean over links and rounds.
        worst_link_bytes: Bytes over the busiest direction of a link, mean over rounds.
        link_ratio: Bytes of the whole run over the busiest direction of a link, relative to the mean.
    """

    paper_bytes: int
    bytes: Mapping[str, float]
    link_bytes: float
    worst_link_bytes: float
    link_ratio: float

    @property
    def total_bytes(self) -> float:
        """Bytes sent by all workers, of all traffic kinds."""
        return sum(self.bytes.values())


def paper_bytes(sizes: Sizes, plan: RoundPlan, *, workers: int) -> int:
    """Count the bytes of a round as the paper does.

    Every worker sends the parameters that it holds to a server and receives as many, without buffers:
    2 x (S x shared + sum of capacities x block).

    Args:
        sizes: Parts of the network.
        plan: Plan of the round.
        workers: Number of workers.

    Returns:
        Bytes that all workers send and receive.
    """
    held = workers * sizes.shared.parameters
    for chain, block in zip(plan.plans, sizes.blocks, strict=True):
        held += sum(chain.capacities) * block.parameters
    return 2 * held


def round_traffic(
    sizes: Sizes,
    plan: RoundPlan,
    next_plan: RoundPlan,
    *,
    strategy: Strategy,
    state: StateSizes = NO_STATE,
    average: bool = False,
    replicate: bool = False,
    wire: Wire | None = None,
) -> RoundTraffic:
    """Count the messages of the synchronization between two rounds.

    Args:
        sizes: Parts of the network.
        plan: Plan of the round that ends.
        next_plan: Plan of the next round.
        strategy: Strategy of the round that ends: its workers, its policy for the optimizer's state (see
            `resist.sync.optimizer_state`), and its outer optimizer, whose momentum is handed over with each block.
        state: The optimizer's state. Default: it has none.
        average: Count an average of the weights (EMA), which is exchanged as the weights are.
        replicate: Keep a replica of each block with a single next holder, as in `Job`.
        wire: Formats of what is sent, as in `Job`. Default: nothing is compressed.

    Returns:
        The traffic. The momentum of the outer optimizer and the average of the weights are part of "state".
    """
    workers, policy = strategy.workers, strategy.optimizer_state
    wire = wire or Wire()
    block_bytes = sizes.block_bytes(wire)
    messages = schedule(plan, next_plan, block_bytes, replicate=replicate)
    # Where every worker holds every block, blocks are averaged in the all-reduce of the shared part.
    common = sizes.whole() if messages.held_by_all else sizes.shared
    moving = state if policy in ("travel", "average") else NO_STATE
    # Everything is averaged at the end of a round that begins or ends holding all blocks.
    fragments = wire.fragments if plan.held_by_all == next_plan.held_by_all and workers > 1 else 0
    of_weights = [common.mean_bytes(wire.shared, fragments=fragments)]
    of_state = [common.mean_bytes(*state) for state in moving.formats(wire.state) if policy == "average"]
    of_state += [common.mean_bytes(wire.average)] if average else []
    # State that goes with a block of each chain. All holders of a block have the same outer momentum, so it is handed
    # over, but not averaged.
    loose = moving.loose_blocks or (0,) * len(sizes.blocks)
    with_block = [
        sum(block.block_bytes(*state) for state in moving.formats(wire.state))
        + rest
        + (block.block_bytes(wire.average) if average else 0)
        for block, rest in zip(sizes.blocks, loose, strict=True)
    ]
    handed = [
        own + (block.block_bytes(wire.blocks) if strategy.outer is not None else 0)
        for own, block in zip(with_block, sizes.blocks, strict=True)
    ]
    # State of another form that is averaged goes to worker 0 and back.
    to_root = moving.loose_shared if policy == "average" else 0
    if policy == "average" and messages.held_by_all:
        to_root += sum(chain.num_blocks * rest for chain, rest in zip(sizes.chains, loose, strict=True))
    there, back = _through_root(workers, to_root)
    num_bytes = {
        "shared": _total(of_weights, workers),
        "blocks": sum(message.num_bytes for message in (*messages.average, *messages.hand_over)),
        "state": _total(of_state, workers)
        + 2 * (workers - 1) * to_root
        + sum(with_block[message.chain] for message in messages.average)
        + sum(handed[message.chain] for message in messages.hand_over),
        **({"replica": sum(message.num_bytes for message in messages.replicas)} if replicate else {}),
    }
    replica_bytes = Counter[int]()
    for (chain, _), keeper in messages.keepers.items():
        replica_bytes[keeper] += sizes.blocks[chain].num_bytes
    return RoundTraffic(
        num_bytes,
        sum(allreduce_bytes(n, workers) for plain, encoded in of_weights + of_state for n in plain + encoded),
        sum(len(plain) for plain, _ in of_weights + of_state) if workers > 1 else 0,
        _links(messages.average, with_block) + there,
        _links(messages.hand_over, handed) + _links(messages.replicas, [0] * len(sizes.blocks)) + back,
        replica_bytes,
        sum(len(encoded) for _, encoded in of_weights + of_state) if workers > 1 else 0,
        sum(allreduce_bytes(n, workers) for _, encoded in of_weights + of_state for n in encoded) // 2,
        tuple(allreduce_bytes(n, workers) for n in common.fragment_bytes(wire.shared, fragments)),
    )


def _total(means: Sequence[tuple[list[int], list[int]]], workers: int) -> int:
    """Bytes that all workers send in all-reduces and compressed means."""
    plain = sum(workers * allreduce_bytes(n, workers) for own, _ in means for n in own)
    return plain + sum(2 * (workers - 1) * n for _, own in means for n in own)


def ddp_traffic(sizes: Sizes, *, workers: int, local_steps: int) -> RoundTraffic:
    """Count the messages of torch's DistributedDataParallel in a round.

    Each step has an all-reduce of all gradients, in buckets, and before the forward pass a broadcast of the float
    buffers of worker 0 (`broadcast_buffers`, on by default), which each worker passes on to the next.

    Args:
        sizes: Parts of the network.
        workers: Number of workers.
        local_steps: Steps in a round.

    Returns:
        The traffic, of the kinds "gradients" and "buffers".
    """
    whole = sizes.whole()
    gradients = whole.trainable
    ring = allreduce_bytes(gradients, workers)
    buckets = 1 + math.ceil(max(gradients - FIRST_BUCKET_BYTES, 0) / BUCKET_BYTES)
    buffers = local_steps * whole.buffers
    passed_on = {("out", worker): buffers for worker in range(workers - 1)}
    passed_on |= {("in", worker): buffers for worker in range(1, workers)}
    return RoundTraffic(
        {"gradients": local_steps * workers * ring, "buffers": (workers - 1) * buffers},
        local_steps * ring,
        local_steps * buckets if workers > 1 else 0,
        {},
        passed_on,
    )


def mean_traffic(rounds: Sequence[RoundTraffic], workers: int, paper: int) -> Traffic:
    """Average the traffic of rounds.

    Args:
        rounds: Traffic of each round.
        workers: Number of workers.
        paper: Bytes of a round as the paper counts them.

    Returns:
        The mean over rounds, and the ratio of the busiest link over the whole run.
    """
    over_run: Counter[Way] = Counter()
    worst = 0
    for traffic in rounds:
        links = traffic.links(workers)
        over_run.update(links)
        worst += max(links.values())
    mean = sum(over_run.values()) / len(over_run)
    return Traffic(
        paper,
        {name: sum(traffic.bytes[name] for traffic in rounds) / len(rounds) for name in rounds[0].bytes},
        mean / len(rounds),
        worst / len(rounds),
        max(over_run.values()) / mean if mean else 1.0,
    )


def _links(messages: Sequence[Message], further: Sequence[int]) -> Counter[Way]:
    """Bytes by direction of a link; with a block of each chain go `further` bytes."""
    links: Counter[Way] = Counter()
    for message in messages:
        num_bytes = message.num_bytes + further[message.chain]
        links["out", message.source] += num_bytes
        links["in", message.target] += num_bytes
    return links


def _through_root(workers: int, num_bytes: int) -> tuple[Counter[Way], Counter[Way]]:
    """Bytes by direction of a link where each other worker sends to worker 0, and gets as much back."""
    others = range(1, workers)
    total = (workers - 1) * num_bytes
    there = Counter[Way]({("in", 0): total, **{("out", worker): num_bytes for worker in others}})
    back = Counter[Way]({("out", 0): total, **{("in", worker): num_bytes for worker in others}})
    return there, back
