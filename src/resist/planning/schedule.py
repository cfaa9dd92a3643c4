"""Schedules: the messages that lead from one plan to the next, as data.

A synchronization has two phases. In the first every copy of a block goes to the block's owner, who folds them. In the
second the owner sends the folded block to its next holders. A worker that holds a block and goes on holding it alone
sends nothing. The same list is run by a transport, counted by the ledger and drawn by a report.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from resist.planning.plan import Plan


@dataclass(frozen=True)
class Message:
    """One block on its way. `phase` is "average" (a copy to the owner), "hand_over" (owner to next holder) or "replica"
    (a second copy)."""

    phase: str
    chain: str
    block: int
    source: int
    target: int
    num_bytes: int


@dataclass(frozen=True)
class Schedule:
    """fold, hand_over: the messages of the two phases, in the order in which every worker issues them.
    owners: (chain, block) -> the worker that folds the block."""

    average: tuple[Message, ...]
    hand_over: tuple[Message, ...]
    owners: Mapping[tuple[str, int], int]

    @property
    def messages(self) -> tuple[Message, ...]:
        return self.average + self.hand_over

    @property
    def num_bytes(self) -> int:
        return sum(message.num_bytes for message in self.messages)


def schedule(plans: Mapping[str, Plan], next_plans: Mapping[str, Plan], block_bytes: Mapping[str, int]) -> Schedule:
    """The messages from `plans` to `next_plans`; all three arguments are keyed by chain.

    An owner that goes on holding its block saves a message, so such owners come first. Among equals the owner is
    chosen that keeps the busiest link least busy. Blocks that leave no choice are counted first, so that the others
    are placed around them.
    """
    load: Counter[tuple[str, int]] = Counter()  # ("out" or "in", worker) -> bytes
    owners: dict[tuple[str, int], int] = {}
    chosen: dict[tuple[str, int], list[Message]] = {}
    keys = [(chain, block) for chain, plan in plans.items() for block in range(plan.num_blocks)]
    for chain, block in sorted(keys, key=lambda key: len(plans[key[0]].holders(key[1]))):
        holders, targets = plans[chain].holders(block), next_plans[chain].holders(block)
        staying = [worker for worker in holders if worker in targets]
        best: tuple[tuple[int, int, int], int, list[Message]] | None = None
        for owner in staying or holders:
            messages = _messages(chain, block, owner, holders, targets, block_bytes[chain])
            after = load + _load(messages)
            spread = sum(value * value for value in after.values())
            rank = (max(after.values(), default=0), spread, (owner - block) % plans[chain].workers)
            if best is None or rank < best[0]:
                best = (rank, owner, messages)
        assert best is not None, "a plan holds every block"
        owners[chain, block], chosen[chain, block] = best[1], best[2]
        load += _load(best[2])
    ordered = [message for key in keys for message in chosen[key]]
    return Schedule(
        average=tuple(message for message in ordered if message.phase == "average"),
        hand_over=tuple(message for message in ordered if message.phase == "hand_over"),
        owners=owners,
    )


def _messages(
    chain: str, block: int, owner: int, holders: Iterable[int], targets: Iterable[int], num_bytes: int
) -> list[Message]:
    fold = [Message("average", chain, block, holder, owner, num_bytes) for holder in holders if holder != owner]
    on = [Message("hand_over", chain, block, owner, target, num_bytes) for target in targets if target != owner]
    return fold + on


def _load(messages: Iterable[Message]) -> Counter[tuple[str, int]]:
    load: Counter[tuple[str, int]] = Counter()
    for message in messages:
        load["out", message.source] += message.num_bytes
        load["in", message.target] += message.num_bytes
    return load


@dataclass(frozen=True)
class ReplicaPlacement:
    """Second copies of the blocks that would have only one holder after a synchronization.

    kept:     (chain, block) -> the worker that keeps what it hands over: it need only not forget it.
    messages: ("replica") copies of blocks that stay alone where they are, to a worker that has none.
    """

    kept: Mapping[tuple[str, int], int]
    messages: tuple[Message, ...]


def place_replicas(plan: Schedule, next_plans: Mapping[str, Plan], block_bytes: Mapping[str, int]) -> ReplicaPlacement:
    """Where a second copy of each block lies, so that any one of two or more workers can be lost. Copies that have to
    be sent go to those that have been sent the fewest bytes."""
    kept: dict[tuple[str, int], int] = {}
    messages: list[Message] = []
    received = Counter({worker: 0 for one in next_plans.values() for worker in range(one.workers)})
    for message in plan.messages:
        received[message.target] += message.num_bytes
    for (chain, block), owner in sorted(plan.owners.items()):
        holders = next_plans[chain].holders(block)
        if len(holders) > 1:
            continue
        if owner not in holders:
            kept[chain, block] = owner
            continue
        keeper = min((w for w in received if w != owner), key=lambda worker: (received[worker], worker))
        received[keeper] += block_bytes[chain]
        messages.append(Message("replica", chain, block, owner, keeper, block_bytes[chain]))
    return ReplicaPlacement(kept, tuple(messages))


def allreduce_bytes(num_bytes: int, workers: int) -> int:
    """What each of `workers` sends (and receives) in a ring all-reduce of `num_bytes`: 2 (S - 1) / S of it."""
    return 2 * (workers - 1) * num_bytes // workers
