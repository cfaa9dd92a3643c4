"""Plans: which worker holds which blocks in one round.

A `Plan` is about one chain, a `RoundPlan` about all of them. A plan is a pure function of (seed, round, chain,
capacities). Every worker computes it for itself, so no message is needed to agree on it. The shuffles are sorts by a
keyed hash, and not `random.shuffle`, because Python does not promise to keep the sequence of its generator from one
version to the next: two machines with different versions of Python draw the same plan.

    >>> partition(5, (3, 2), seed=0, round=0).capacities
    (3, 2)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Protocol

from resist.errors import UserError

Key = tuple[int, int]  # (chain number, block)


@dataclass(frozen=True)
class Plan:
    """Assignment of the blocks of one chain to workers for one round.

    Attributes:
        num_blocks: Number of blocks in the chain. They are numbered 0 to num_blocks - 1.
        blocks: Blocks of each worker: `blocks[worker][slot]` is a block number. Ascending, but for blocks that a worker
            recovers when others are lost, which come last.
    """

    num_blocks: int
    blocks: tuple[tuple[int, ...], ...]

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self.blocks)

    @property
    def capacities(self) -> tuple[int, ...]:
        """Number of blocks of each worker."""
        return tuple(len(held) for held in self.blocks)

    @property
    def held_by_all(self) -> bool:
        """True if every worker holds every block, in the slot of its number, as in local SGD."""
        everything = tuple(range(self.num_blocks))
        return all(held == everything for held in self.blocks)

    @cached_property
    def _holders(self) -> tuple[tuple[int, ...], ...]:
        """Holders of every block, collected in one pass over the plan."""
        holders: list[list[int]] = [[] for _ in range(self.num_blocks)]
        for worker, held in enumerate(self.blocks):
            for block in held:
                holders[block].append(worker)
        return tuple(map(tuple, holders))

    def holders(self, block: int) -> tuple[int, ...]:
        """Return the workers that hold a block.

        Args:
            block: Number of the block.

        Returns:
            The workers, ascending; empty if there is no such block.
        """
        return self._holders[block] if 0 <= block < self.num_blocks else ()

    def slot(self, block: int, *, worker: int) -> int:
        """Find the slot in which a worker holds a block.

        Args:
            block: Number of the block.
            worker: Number of the worker.

        Returns:
            The slot.

        Raises:
            ValueError: If the worker does not hold the block.
        """
        return self.blocks[worker].index(block)


@dataclass(frozen=True)
class RoundPlan:
    """Assignment of the blocks of all chains to workers for one round.

    A chain is identified by its number: its position in the order of the job's chains.

    Attributes:
        plans: Plan of each chain, for the same workers.
        workers: Number of workers; needed only where there is no chain.
    """

    plans: tuple[Plan, ...]
    workers: int = 0

    def __post_init__(self) -> None:
        if self.plans:
            object.__setattr__(self, "workers", self.plans[0].workers)

    @property
    def held_by_all(self) -> bool:
        """True if every worker holds all blocks, as in local SGD."""
        return all(plan.held_by_all for plan in self.plans)

    @property
    def keys(self) -> list[Key]:
        """Every block as (chain number, block), ascending."""
        return [(chain, block) for chain, plan in enumerate(self.plans) for block in range(plan.num_blocks)]

    def held(self, worker: int) -> tuple[tuple[int, ...], ...]:
        """Return the blocks that a worker holds.

        Args:
            worker: Number of the worker.

        Returns:
            Blocks of each chain: block `held[chain][slot]` is in that slot.
        """
        return tuple(plan.blocks[worker] for plan in self.plans)

    def capacities(self, worker: int) -> tuple[int, ...]:
        """Return a worker's capacity in each chain.

        Args:
            worker: Number of the worker.

        Returns:
            Capacity for each chain.
        """
        return tuple(len(blocks) for blocks in self.held(worker))

    def holders(self, chain: int, block: int) -> tuple[int, ...]:
        """Return the workers that hold a block; see `Plan.holders`.

        Args:
            chain: Number of the chain.
            block: Number of the block.

        Returns:
            The workers, ascending.
        """
        return self.plans[chain].holders(block)

    def slot(self, chain: int, block: int, *, worker: int) -> int:
        """Find the slot in which a worker holds a block; see `Plan.slot`.

        Args:
            chain: Number of the chain.
            block: Number of the block.
            worker: Number of the worker.

        Returns:
            The slot.

        Raises:
            ValueError: If the worker does not hold the block.
        """
        return self.plans[chain].slot(block, worker=worker)


class ChainLike(Protocol):
    """Properties of a chain that its plans depend on.

    See `resist.blocks.chains.Chain`.
    """

    @property
    def name(self) -> str:
        """Name of the chain."""
        ...

    @property
    def num_blocks(self) -> int:
        """Number of blocks in the chain."""
        ...


def equal_capacities(num_blocks: int, workers: int, min_depth: int = 0, *, chain: str = "") -> tuple[int, ...]:
    """Compute the smallest equal capacity that holds every block.

    With more workers than blocks, several of them hold a block.

    Args:
        num_blocks: Number of blocks in the chain.
        workers: Number of workers.
        min_depth: Lower bound of the capacity.
        chain: Name of the chain, for error messages.

    Returns:
        For each worker max(ceil(num_blocks / workers), min_depth).

    Raises:
        UserError: If there are fewer blocks than `min_depth`, or an argument is out of range.
    """
    where = f"chain {chain}" if chain else "the chain"
    if workers < 1:
        raise UserError(f"`workers={workers}`; must be at least 1")
    if min_depth < 0:
        raise UserError(f"`min_depth={min_depth}` is negative; give 0 to {num_blocks}")
    if min_depth > num_blocks:
        raise UserError(f"`min_depth={min_depth}` exceeds the {num_blocks} blocks of {where}; lower it or add chains")
    return (max(-(-num_blocks // workers), min_depth),) * workers


def check_capacities(num_blocks: int, capacities: Sequence[int], *, chain: str = "") -> tuple[int, ...]:
    """Check that a plan with these capacities exists.

    Args:
        num_blocks: Number of blocks in the chain.
        capacities: Number of blocks of each worker.
        chain: Name of the chain, for error messages.

    Returns:
        The capacities as a tuple.

    Raises:
        UserError: If a capacity is outside 1 to `num_blocks`, or their sum is less than `num_blocks`.
    """
    where = f"chain {chain}" if chain else "the chain"
    given = f"`capacities={' '.join(map(str, capacities))}`"
    for worker, capacity in enumerate(capacities):
        if not 1 <= capacity <= num_blocks:
            raise UserError(
                f"{given}: capacity {capacity} of worker {worker} is outside 1 to {num_blocks}, the blocks of {where}; "
                "change it"
            )
    if sum(capacities) < num_blocks:
        raise UserError(
            f"{given} hold {sum(capacities)} of the {num_blocks} blocks of {where}; raise them until every block has "
            "a worker"
        )
    return tuple(capacities)


def partition(num_blocks: int, capacities: Sequence[int], *, seed: int, round: int, chain: str = "") -> Plan:
    """Draw the plan of one round.

    Every block is held, every worker holds exactly its capacity of different blocks, and the numbers of holders of any
    two blocks differ by at most one. Each worker's set is uniform among the sets of its size, so over the rounds worker
    w holds each block with probability capacity_w / num_blocks.

    The blocks are taken from shuffled lists, one worker after another, in a shuffled order of workers. A worker that
    uses up a list continues with a new one, in which the blocks that it has just taken are put at the end. So no
    worker draws a block twice, and a list is always used up before the next is begun.

    Args:
        num_blocks: Number of blocks in the chain.
        capacities: Number of blocks of each worker.
        seed: Seed of the run.
        round: Number of the round.
        chain: Name of the chain, which gives each chain its own sequence of plans.

    Returns:
        The plan. It depends on the arguments alone; no global random state is read or written.

    Raises:
        UserError: If no plan has these capacities; see `check_capacities`.
    """
    capacities = check_capacities(num_blocks, capacities, chain=chain)
    key = (seed, round, chain)
    held: list[tuple[int, ...]] = [()] * len(capacities)
    deck: list[int] = []
    decks = 0
    # The workers draw in a shuffled order, so that it is not always the same ones that hold the blocks with
    # several holders.
    for worker in shuffled(len(capacities), "workers", *key):
        # Take from the current list first.
        hand = deck[: capacities[worker]]
        deck = deck[capacities[worker] :]
        missing = capacities[worker] - len(hand)
        if missing:
            # The list is used up. Begin the next one, with the blocks that this worker has taken at its end. A capacity
            # is at most num_blocks, so the blocks before them are enough for the rest.
            new_deck = shuffled(num_blocks, "deck", decks, *key)
            decks += 1
            deck = [block for block in new_deck if block not in hand] + [block for block in new_deck if block in hand]
            hand, deck = hand + deck[:missing], deck[missing:]
        held[worker] = tuple(sorted(hand))
    return Plan(num_blocks, tuple(held))


def keyed_int(*key: object) -> int:
    """Derive a 63-bit integer from `key` alone, to seed a generator."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def shuffled(num: int, *key: object) -> list[int]:
    """Shuffle the numbers 0 to num - 1 by `key` alone.

    Args:
        num: How many numbers.
        *key: Values with a stable `repr`, which choose the order.

    Returns:
        A permutation, uniform over keys.
    """
    return sorted(range(num), key=lambda item: blake2b(repr((key, item)).encode(), digest_size=16).digest())
