"""Schedules: the messages of one synchronization, as data.

A synchronization has two phases. In the first, every holder of a block sends it to the block's owner, which averages
them. In the second, the owner sends the average to the block's next holders. A worker that is the only holder of a
block, before and after, sends nothing. Where every worker holds every block, before and after, blocks need no messages:
they are averaged over all workers, together with the shared part. The transport runs the messages of a schedule, the
cost model counts them, and the report draws them.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from resist.planning.plan import Key, RoundPlan


@dataclass(frozen=True)
class Message:
    """One block on its way from one worker to another.

    Attributes:
        phase: "average" (holder to owner), "hand_over" (owner to next holder) or "replica" (owner to the worker that
            keeps a replica).
        chain: Number of the chain.
        block: Number of the block in its chain.
        source: Worker that sends.
        target: Worker that receives.
        num_bytes: Size of the block in bytes.
    """

    phase: str
    chain: int
    block: int
    source: int
    target: int
    num_bytes: int


@dataclass(frozen=True)
class Schedule:
    """Messages of one synchronization.

    Attributes:
        average: Messages of the first phase, in the order in which every worker issues them.
        hand_over: Messages of the second phase, in the same sense.
        owners: Owner of each block: (chain number, block) -> the worker that averages it. Empty if `held_by_all`.
        held_by_all: True if every worker holds every block, before and after. Blocks are then part of the mean over all
            workers.
        keepers: (chain number, block) -> the worker that keeps a replica, for each block with a single next holder. An
            owner that hands its block over keeps the weights without a message. Empty without `replicate`.
        replicas: Messages of the other replicas, sent with the second phase.
    """

    average: tuple[Message, ...] = ()
    hand_over: tuple[Message, ...] = ()
    owners: Mapping[Key, int] = field(default_factory=dict[Key, int])
    held_by_all: bool = False
    keepers: Mapping[Key, int] = field(default_factory=dict[Key, int])
    replicas: tuple[Message, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """All messages, in their order."""
        return self.average + self.hand_over + self.replicas

    @property
    def num_bytes(self) -> int:
        """Bytes of all messages."""
        return sum(message.num_bytes for message in self.messages)


def schedule(plan: RoundPlan, next_plan: RoundPlan, block_bytes: Sequence[int], *, replicate: bool = False) -> Schedule:
    """List the messages that lead from one plan to the next.

    An owner that also holds its block in the next round saves a message, so only such holders are candidates, if there
    are any. Among them the owner is the one that keeps the busiest link least busy. Placing a block takes time in
    proportion to its holders, and placing a replica to the number of workers.

    With `replicate`, any single worker can be lost afterwards. Blocks with several next holders need no replica. A
    replica that has to be sent goes to the worker that receives the fewest bytes so far.

    Args:
        plan: Plan of the present round.
        next_plan: Plan of the next round, for the same chains and workers.
        block_bytes: Size of one block of each chain in bytes.
        replicate: Place replicas; needs at least two workers.

    Returns:
        The schedule, with the messages of each phase in the order of chains and blocks.
    """
    if plan.held_by_all and next_plan.held_by_all:
        return Schedule(held_by_all=True)
    links = _Links(plan.workers)
    owners = _choose_owners(links, plan, next_plan, block_bytes)
    # All workers issue the messages in this one order, so that every send meets its receive.
    average: list[Message] = []
    hand_over: list[Message] = []
    for chain, block in plan.keys:
        owner, num_bytes = owners[chain, block], block_bytes[chain]
        for holder in plan.holders(chain, block):
            if holder != owner:
                average.append(Message("average", chain, block, holder, owner, num_bytes))
        for target in next_plan.holders(chain, block):
            if target != owner:
                hand_over.append(Message("hand_over", chain, block, owner, target, num_bytes))
    keepers: dict[Key, int] = {}
    replicas: list[Message] = []
    if replicate:
        keepers, replicas = _place_replicas(links.incoming, owners, next_plan, block_bytes)
    return Schedule(tuple(average), tuple(hand_over), owners, keepers=keepers, replicas=tuple(replicas))


def _choose_owners(
    links: "_Links", plan: RoundPlan, next_plan: RoundPlan, block_bytes: Sequence[int]
) -> dict[Key, int]:
    """Choose the owner of each block; adds messages to `links`."""
    owners: dict[Key, int] = {}
    # Blocks with few holders leave little choice: they are placed first, so that the others can avoid the links that
    # they use.
    for chain, block in sorted(plan.keys, key=lambda key: len(plan.holders(*key))):
        holders, targets = plan.holders(chain, block), next_plan.holders(chain, block)
        owners[chain, block] = links.place(block, holders, targets, block_bytes[chain])
    return owners


def _place_replicas(
    received: list[int], owners: Mapping[Key, int], next_plan: RoundPlan, block_bytes: Sequence[int]
) -> tuple[dict[Key, int], list[Message]]:
    """Choose the keeper of each replica, and list the messages.

    Adds their bytes to `received`, by worker.
    """
    keepers: dict[Key, int] = {}
    replicas: list[Message] = []
    for chain, block in next_plan.keys:
        owner, holders = owners[chain, block], next_plan.holders(chain, block)
        if len(holders) > 1:
            continue
        if owner not in holders:
            # The owner hands the block over, and so has its weights already.
            keepers[chain, block] = owner
            continue
        keeper = min((worker for worker in range(len(received)) if worker != owner), key=received.__getitem__)
        received[keeper] += block_bytes[chain]
        keepers[chain, block] = keeper
        replicas.append(Message("replica", chain, block, owner, keeper, block_bytes[chain]))
    return keepers, replicas


class _Links:
    """Bytes so far on every worker's outgoing and incoming link."""

    def __init__(self, workers: int) -> None:
        self.outgoing = [0] * workers
        self.incoming = [0] * workers
        self.largest: int = 0  # of both lists
        self.squares = 0  # sum over both lists

    def place(self, block: int, holders: Sequence[int], targets: Sequence[int], num_bytes: int) -> int:
        """Choose the owner of a block and add the block's messages.

        Takes O(holders + targets). The best owner has the least (largest load, sum of squares of the loads, (owner -
        block) mod workers). The last term rotates equal candidates from block to block.
        """
        # Suppose first that the owner is an additional worker: every holder sends once, every target receives once.
        next_holders = set(targets)
        sent = {worker: self.outgoing[worker] + num_bytes for worker in holders}
        received = {worker: self.incoming[worker] + num_bytes for worker in targets}
        squares = self.squares
        squares += sum(load * load - (load - num_bytes) ** 2 for load in (*sent.values(), *received.values()))
        # Loads only grow, so the new maximum is the old one or one of these. Two of them are enough to know the maximum
        # without any one worker.
        sent_max, received_max = _two_largest(sent), _two_largest(received)
        best: tuple[int, int, int] | None = None
        chosen = outgoing = incoming = -1
        for owner in [worker for worker in holders if worker in next_holders] or holders:
            # Correct the loads of the owner: it does not send to itself, but receives from the other holders and sends
            # to the other targets.
            stays = owner in next_holders
            new_outgoing = self.outgoing[owner] + (len(targets) - stays) * num_bytes
            new_incoming = self.incoming[owner] + (len(holders) - 1) * num_bytes
            new_squares = squares + new_outgoing**2 - sent[owner] ** 2
            new_squares += new_incoming**2 - received.get(owner, self.incoming[owner]) ** 2
            others = (load for worker, load in (*sent_max, *received_max) if worker != owner)
            cost = (
                max(self.largest, new_outgoing, new_incoming, *others),
                new_squares,
                (owner - block) % len(self.outgoing),
            )
            if best is None or cost < best:
                best, chosen, outgoing, incoming = cost, owner, new_outgoing, new_incoming
        assert best is not None, "a plan holds every block"
        # Add the messages of the chosen owner.
        for worker, load in sent.items():
            self.outgoing[worker] = load
        for worker, load in received.items():
            self.incoming[worker] = load
        self.outgoing[chosen], self.incoming[chosen] = outgoing, incoming
        self.largest, self.squares = best[0], best[1]
        return chosen


def _two_largest(loads: Mapping[int, int]) -> list[tuple[int, int]]:
    """The two items with the largest values."""
    return heapq.nlargest(2, loads.items(), key=lambda item: item[1])


def allreduce_bytes(num_bytes: int, workers: int) -> int:
    """Compute the bytes that each worker sends in a ring all-reduce.

    Args:
        num_bytes: Size of the tensor in bytes.
        workers: Number of workers S.

    Returns:
        2 (S - 1) / S of `num_bytes`, rounded down.
    """
    return 2 * (workers - 1) * num_bytes // workers
