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
    workers, wire = strategy.workers, wire or Wire()
    averages_state = strategy.optimizer_state == "average"
    moving = state if averages_state or strategy.optimizer_state == "travel" else NO_STATE
    messages = schedule(plan, next_plan, sizes.block_bytes(wire), replicate=replicate)
    # Where every worker holds every block, blocks are averaged in the all-reduce of the shared part.
    common = sizes.whole() if messages.held_by_all else sizes.shared
    # Everything is averaged at the end of a round that begins or ends holding all blocks.
    fragments = wire.fragments if plan.held_by_all == next_plan.held_by_all and workers > 1 else 0
    of_weights = _Means.of([common.mean_bytes(wire.shared, fragments=fragments)], workers)
    of_state = [common.mean_bytes(*own) for own in moving.formats(wire.state) if averages_state]
    of_state += [common.mean_bytes(wire.average)] if average else []
    means_of_state = _Means.of(of_state, workers)
    means = of_weights + means_of_state
    with_block = _state_of_blocks(sizes, moving, wire, average=average)
    # All holders of a block have the same outer momentum, so it is handed over, but not averaged.
    momentum = sizes.block_bytes(wire) if strategy.outer is not None else (0,) * len(sizes.blocks)
    handed = [own + more for own, more in zip(with_block, momentum, strict=True)]
    to_root = _state_to_root(sizes, moving, blocks=messages.held_by_all) if averages_state else 0
    there, back = _through_root(workers, to_root)
    num_bytes = {
        "shared": of_weights.sent,
        "blocks": sum(message.num_bytes for message in (*messages.average, *messages.hand_over)),
        "state": means_of_state.sent
        + 2 * (workers - 1) * to_root
        + sum(with_block[message.chain] for message in messages.average)
        + sum(handed[message.chain] for message in messages.hand_over),
        **({"replica": sum(message.num_bytes for message in messages.replicas)} if replicate else {}),
    }
    replica_bytes = Counter[int]()
    for (chain, _), keeper in messages.keepers.items():
        replica_bytes[keeper] += sizes.blocks[chain].num_bytes
    return RoundTraffic(
        bytes=num_bytes,
        ring_bytes=means.ring(means.plain + means.encoded),
        allreduces=len(means.plain),
        average=_links(messages.average, with_block) + there,
        hand_over=_links(messages.hand_over, handed) + _links(messages.replicas, [0] * len(sizes.blocks)) + back,
        replica_bytes=replica_bytes,
        compressed=len(means.encoded),
        scattered=means.ring(means.encoded) // 2,
        fragments=tuple(allreduce_bytes(n, workers) for n in common.fragment_bytes(wire.shared, fragments)),
    )


@dataclass(frozen=True)
class _Means:
    """Bytes of each all-reduce, and of each compressed mean, of which there are none for one worker."""

    workers: int
    plain: tuple[int, ...]
    encoded: tuple[int, ...]

    @classmethod
    def of(cls, means: Sequence[tuple[list[int], list[int]]], workers: int) -> "_Means":
        several = means if workers > 1 else ()
        return cls(workers, *(tuple(n for own in several for n in own[place]) for place in (0, 1)))

    def __add__(self, other: "_Means") -> "_Means":
        return _Means(self.workers, self.plain + other.plain, self.encoded + other.encoded)

    def ring(self, sizes: Sequence[int]) -> int:
        """Bytes that each worker sends in some of them."""
        return sum(allreduce_bytes(n, self.workers) for n in sizes)

    @property
    def sent(self) -> int:
        """Bytes that all workers send."""
        return self.workers * self.ring(self.plain) + 2 * (self.workers - 1) * sum(self.encoded)


def _state_of_blocks(sizes: Sizes, state: StateSizes, wire: Wire, *, average: bool) -> list[int]:
    """Bytes of the state that goes with a block of each chain, with an average of its weights."""
    return [
        sum(block.block_bytes(*own) for own in state.formats(wire.state))
        + (block.block_bytes(wire.average) if average else 0)
        + loose
        for block, loose in zip(sizes.blocks, _loose(sizes, state), strict=True)
    ]


def _state_to_root(sizes: Sizes, state: StateSizes, *, blocks: bool) -> int:
    """Bytes of the state of another form that goes to worker 0 and back, to be averaged."""
    of_blocks = zip(sizes.chains, _loose(sizes, state), strict=True) if blocks else ()
    return state.loose_shared + sum(chain.num_blocks * loose for chain, loose in of_blocks)


def _loose(sizes: Sizes, state: StateSizes) -> tuple[int, ...]:
    return state.loose_blocks or (0,) * len(sizes.blocks)


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
