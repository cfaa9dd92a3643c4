"""What a round sends, from its plans alone: the schedule that a transport would run, counted instead of carried."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from resist.planning.plan import Plan
from resist.planning.schedule import Message, Schedule, allreduce_bytes, place_replicas, schedule
from resist.subnet.chains import Chain

Way = tuple[str, int]  # ("out" or "in", worker): one direction of a worker's link to the network

# Into what DistributedDataParallel divides the gradients: a small bucket first, so that the exchange begins early.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20


@dataclass(frozen=True)
class Part:
    """The shared part, or one block of a chain.

    numel:      its parameters and float buffers, which is what travels.
    parameters: its parameters alone, which is what the paper counts.
    trainable:  those with a gradient, which is what DistributedDataParallel sends.
    """

    numel: int
    parameters: int
    trainable: int


@dataclass(frozen=True)
class Sizes:
    """The parts of a network, in elements of `itemsize` bytes. blocks: one for each of `chains`."""

    itemsize: int
    shared: Part
    chains: tuple[Chain, ...]
    blocks: tuple[Part, ...]

    def whole(self) -> Part:
        """The full network as one part."""
        parts = [self.shared]
        for chain, block in zip(self.chains, self.blocks, strict=True):
            parts += [block] * chain.num_blocks
        return Part(
            numel=sum(part.numel for part in parts),
            parameters=sum(part.parameters for part in parts),
            trainable=sum(part.trainable for part in parts),
        )


@dataclass(frozen=True)
class RoundTraffic:
    """What one round sends.

    bytes:      summed over workers, by kind: "shared", "blocks" and "state" as the ledger books them; "gradients" and
                "buffers" under DistributedDataParallel.
    ring_bytes: what each worker sends, and receives, in all-reduces; allreduces: how many there are.
    average, hand_over: bytes by way in each of the two phases of point-to-point messages.
    replica_bytes: second copies of blocks that each worker keeps, with `replicate`.
    """

    bytes: Mapping[str, int]
    ring_bytes: int
    allreduces: int
    average: Mapping[Way, int]
    hand_over: Mapping[Way, int]
    replica_bytes: Mapping[int, int] = field(default_factory=dict)

    def links(self, workers: int) -> dict[Way, int]:
        """Bytes over every link, all-reduces included."""
        keys = [(way, worker) for way in ("out", "in") for worker in range(workers)]
        return {key: self.ring_bytes + self.average.get(key, 0) + self.hand_over.get(key, 0) for key in keys}


@dataclass(frozen=True)
class Traffic:
    """A mean round.

    paper_bytes:      the paper's accounting, as of a parameter server: see `paper_bytes`.
    bytes:            real traffic by kind, summed over workers, mean over the rounds looked at.
    link_bytes:       what a worker sends in a round, mean over workers and rounds.
    worst_link_bytes: the busiest link of a round (either way), mean over rounds.
    link_ratio:       the busiest link over the whole run, relative to the mean link.
    """

    paper_bytes: int
    bytes: Mapping[str, float]
    link_bytes: float
    worst_link_bytes: float
    link_ratio: float

    @property
    def total_bytes(self) -> float:
        return sum(self.bytes.values())


def paper_bytes(sizes: Sizes, plans: Mapping[str, Plan], workers: int) -> int:
    """Every worker sends all the parameters that it holds to a server and receives as many:
    itemsize x 2 x (S x shared + copies x block), buffers left out."""
    held = workers * sizes.shared.parameters
    for chain, block in zip(sizes.chains, sizes.blocks, strict=True):
        held += sum(plans[chain.name].capacities) * block.parameters
    return sizes.itemsize * 2 * held


def round_traffic(
    sizes: Sizes,
    plans: Mapping[str, Plan],
    next_plans: Mapping[str, Plan],
    *,
    workers: int,
    optimizer_state: str,
    num_states: int,
    replicate: bool = False,
) -> RoundTraffic:
    """What the synchronization from `plans` to `next_plans` sends (both keyed by chain).

    optimizer_state: the policy, see `resist.sync.averaging`.
    num_states:      values that the optimizer keeps for each weight (momentum: 1, Adam: 2).
    replicate:          whether second copies of blocks are kept, and sent where nobody has one.
    """
    common = all(plan.held_by_all for plan in (*plans.values(), *next_plans.values()))
    ring = allreduce_bytes((sizes.whole() if common else sizes.shared).numel * sizes.itemsize, workers)
    lists = Schedule((), (), {})
    block_bytes = {c.name: b.numel * sizes.itemsize for c, b in zip(sizes.chains, sizes.blocks, strict=True)}
    if not common:
        lists = schedule(plans, next_plans, block_bytes)
    moving = num_states if optimizer_state in ("travel", "average") else 0
    averaged = num_states if optimizer_state == "average" else 0
    safe = place_replicas(lists, next_plans, block_bytes) if replicate else None
    spare, more = Counter[int](), safe.messages if safe else ()
    for (chain, _), keeper in (safe.kept if safe else {}).items():
        spare[keeper] += block_bytes[chain]
    for message in more:
        spare[message.target] += message.num_bytes
    num_bytes = {
        "shared": workers * ring,
        "blocks": lists.num_bytes,
        "state": workers * ring * averaged + lists.num_bytes * moving,
        **({"replica": sum(message.num_bytes for message in more)} if replicate else {}),
    }
    return RoundTraffic(
        num_bytes,
        ring * (1 + averaged),
        1 + averaged if workers > 1 else 0,
        _links(lists.average, 1 + moving),
        Counter(_links(lists.hand_over, 1 + moving)) + Counter(_links(more, 1)),
        spare,
    )


def ddp_traffic(sizes: Sizes, *, workers: int, local_steps: int) -> RoundTraffic:
    """What torch's DistributedDataParallel sends in `local_steps` steps: in each an all-reduce of all gradients, in
    buckets, and before each forward the float buffers of worker 0 to all others (`broadcast_buffers`, on by default),
    here passed on from one worker to the next."""
    whole = sizes.whole()
    gradients = whole.trainable * sizes.itemsize
    ring = allreduce_bytes(gradients, workers)
    buckets = 1 + math.ceil(max(gradients - FIRST_BUCKET_BYTES, 0) / BUCKET_BYTES)
    buffers = local_steps * (whole.numel - whole.parameters) * sizes.itemsize
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
    """The mean of some rounds."""
    over_run: Counter[Way] = Counter()
    worst = 0
    for one in rounds:
        links = one.links(workers)
        over_run.update(links)
        worst += max(links.values())
    mean = sum(over_run.values()) / len(over_run)
    return Traffic(
        paper,
        {kind: sum(one.bytes[kind] for one in rounds) / len(rounds) for kind in rounds[0].bytes},
        mean / len(rounds),
        worst / len(rounds),
        max(over_run.values()) / mean if mean else 1.0,
    )


def _links(messages: Sequence[Message], times: int) -> dict[Way, int]:
    """Bytes by link of messages that are sent `times` times (weights, and each optimizer state that moves)."""
    links: Counter[Way] = Counter()
    for message in messages:
        links["out", message.source] += times * message.num_bytes
        links["in", message.target] += times * message.num_bytes
    return dict(links)
