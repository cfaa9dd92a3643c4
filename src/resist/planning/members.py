"""Members: the workers of a strategy that goes on with other workers than it was given, and the blocks that they hold.

>>> fit(7, (2, 2), (None, 3))
(4, 3)
"""

from collections.abc import Sequence
from dataclasses import dataclass

from resist.errors import UserError
from resist.planning.capacities import Capacities
from resist.planning.plan import equal_capacities


@dataclass(frozen=True)
class Members:
    """The workers of a strategy, which may be others than it was given.

    Attributes:
        origins: For each worker, the worker of the strategy as it was given whose place it takes; None: a further one.
        most: For each worker, the blocks of a chain that it may hold at most; None: no bound.
        given: Number of workers that the strategy was given.
    """

    origins: tuple[int | None, ...]
    most: tuple[int | None, ...]
    given: int

    @classmethod
    def first(cls, workers: int) -> "Members":
        """Return the workers that a strategy is given."""
        return cls(tuple(range(workers)), (None,) * workers, workers)

    @property
    def workers(self) -> int:
        """Number of workers."""
        return len(self.origins)

    def capacities(self, record: Capacities, num_blocks: int, *, chain: str, round: int) -> tuple[int, ...]:
        """Compute the capacities of one chain in one round.

        By the rule of a minimum depth they follow the number of workers. Where the record has a value for each worker,
        a worker takes that of its origin, and a further one the smallest.

        Args:
            record: The capacities of the strategy as it was given.
            num_blocks: Number of blocks in the chain.
            chain: Name of the chain.
            round: Number of the round.

        Returns:
            Number of blocks of each worker; see `fit`.

        Raises:
            UserError: If the workers may not hold all blocks.
        """
        amount, depth = record.deciding(chain, round)
        if amount is None:
            wanted = equal_capacities(num_blocks, self.workers, min(depth, num_blocks), chain=chain)
        elif isinstance(amount, tuple):
            wanted = tuple(min(amount) if origin is None else amount[origin] for origin in self.origins)
        else:
            wanted = (amount,) * self.workers
        return fit(num_blocks, wanted, self.most, chain=chain)


def fit(num_blocks: int, wanted: Sequence[int], most: Sequence[int | None], *, chain: str = "") -> tuple[int, ...]:
    """Raise capacities until every block of a chain has a worker, within the bounds of the workers.

    Args:
        num_blocks: Number of blocks in the chain.
        wanted: Number of blocks of each worker, at least 1. They are raised in proportion.
        most: The bound of each worker; None: no bound.
        chain: Name of the chain, for error messages.

    Returns:
        Number of blocks of each worker, 1 to `num_blocks`. None exceeds its bound.

    Raises:
        UserError: If the bounds are too small for all blocks.
    """
    bounds = [num_blocks if bound is None else min(bound, num_blocks) for bound in most]
    if sum(bounds) < num_blocks:
        raise UserError(
            f"{len(bounds)} workers may hold {sum(bounds)} of the {num_blocks} blocks of chain {chain} "
            f"(`most={' '.join(map(str, most))}`); raise `most`, or go on with more workers"
        )
    held = [min(amount, bound) for amount, bound in zip(wanted, bounds, strict=True)]
    while sum(held) < num_blocks:
        free = [worker for worker, bound in enumerate(bounds) if held[worker] < bound]
        held[min(free, key=lambda worker: ((held[worker] + 1) / wanted[worker], worker))] += 1
    return tuple(held)
