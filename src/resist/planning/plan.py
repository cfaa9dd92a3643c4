"""Plans: which worker holds which blocks of a chain in one round.

A plan is a pure function of (seed, round, chain, capacities). Every worker computes it for itself, so no message is
spent on it. The shuffles are sorts by a keyed hash rather than `random.shuffle`, whose sequence Python does not promise
to keep from one version to the next: two hosts with different Pythons draw the same plan.

    >>> partition(5, (3, 2), seed=0, round=0).capacities
    (3, 2)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from resist.errors import UserError


@dataclass(frozen=True)
class Plan:
    """Who holds what in one round.

    num_blocks: blocks in the chain, numbered 0..num_blocks-1.
    blocks:     for each worker the blocks it holds, ascending: `blocks[worker][slot]` is a block.
    """

    num_blocks: int
    blocks: tuple[tuple[int, ...], ...]

    @property
    def workers(self) -> int:
        return len(self.blocks)

    @property
    def capacities(self) -> tuple[int, ...]:
        return tuple(len(held) for held in self.blocks)

    @property
    def held_by_all(self) -> bool:
        """Whether every worker holds every block, which makes a round of ResIST a round of local SGD."""
        return all(len(held) == self.num_blocks for held in self.blocks)

    def holders(self, block: int) -> tuple[int, ...]:
        """The workers that hold `block`, ascending."""
        return tuple(worker for worker, held in enumerate(self.blocks) if block in held)

    def slot(self, worker: int, block: int) -> int:
        """The slot of `worker` in which `block` lies."""
        return self.blocks[worker].index(block)


def equal_capacities(num_blocks: int, workers: int, min_depth: int = 0, *, chain: str = "") -> tuple[int, ...]:
    """The same capacity for every worker: ceil(num_blocks / workers), or `min_depth` where that is more."""
    where = f"chain {chain}" if chain else "the chain"
    if workers < 1:
        raise UserError(f"workers={workers} is not a number of workers; give at least 1")
    if workers > num_blocks:
        raise UserError(
            f"workers={workers} exceeds the {num_blocks} blocks of {where}; use at most {num_blocks} workers, "
            "a deeper network, or explicit capacities"
        )
    if min_depth < 0:
        raise UserError(f"min_depth={min_depth} is negative; give 0 to {num_blocks}")
    if min_depth > num_blocks:
        raise UserError(f"min_depth={min_depth} exceeds the {num_blocks} blocks of {where}; lower it or add chains")
    return (max(-(-num_blocks // workers), min_depth),) * workers


def check_capacities(num_blocks: int, capacities: Sequence[int], *, chain: str = "") -> tuple[int, ...]:
    """Return `capacities` as a tuple, or say why no plan can have them."""
    where = f"chain {chain}" if chain else "the chain"
    for worker, capacity in enumerate(capacities):
        if not 1 <= capacity <= num_blocks:
            raise UserError(
                f"capacity {capacity} of worker {worker} is outside 1 to {num_blocks}, the blocks of {where}; change it"
            )
    if sum(capacities) < num_blocks:
        raise UserError(
            f"capacities {tuple(capacities)} hold {sum(capacities)} of the {num_blocks} blocks of {where}; "
            "raise them until every block has a worker"
        )
    return tuple(capacities)


def partition(num_blocks: int, capacities: Sequence[int], *, seed: int, round: int, chain: str = "") -> Plan:
    """Draw the plan of one round.

    Every block is held, every worker holds exactly its capacity of different blocks, and the numbers of holders of any
    two blocks differ by at most one. Each worker's set is uniform among the sets of its size, so over the rounds worker
    w holds each block with probability capacity_w / num_blocks.

    The blocks are dealt from shuffled decks, one worker after another, in a shuffled order of workers. A worker that
    comes to the end of a deck goes on with a new one, in which the blocks that it has just taken lie at the bottom:
    so it never draws a block twice, and a deck is always used up before the next is opened.
    """
    capacities = check_capacities(num_blocks, capacities, chain=chain)
    key = (seed, round, chain)
    held: list[tuple[int, ...]] = [()] * len(capacities)
    deck: list[int] = []
    decks = 0
    for worker in shuffled(len(capacities), "workers", *key):
        hand = deck[: capacities[worker]]
        deck = deck[capacities[worker] :]
        missing = capacities[worker] - len(hand)
        if missing:
            fresh = shuffled(num_blocks, "deck", decks, *key)
            decks += 1
            deck = [b for b in fresh if b not in hand] + [b for b in fresh if b in hand]
            hand, deck = hand + deck[:missing], deck[missing:]
        held[worker] = tuple(sorted(hand))
    return Plan(num_blocks, tuple(held))


def keyed_int(*key: object) -> int:
    """A 63-bit integer that depends on `key` alone: the seed of whatever that key names."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def shuffled(num: int, *key: object) -> list[int]:
    """The numbers 0..num-1 in an order that depends on `key` alone, uniform over keys."""
    return sorted(range(num), key=lambda item: blake2b(repr((key, item)).encode(), digest_size=16).digest())
