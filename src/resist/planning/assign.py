"""Assignments: functions that draw the plan of one chain for one round, as records that can be compared."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from resist.errors import UserError
from resist.planning.capacities import Capacities
from resist.planning.members import Members
from resist.planning.plan import ChainLike, Plan, partition

# Rounds between two draws over which bytes are averaged, at most.
MOST_BETWEEN = 200


class Assign(Protocol):
    """Function that draws the plan of one chain for one round."""

    def __call__(self, num_blocks: int, *, chain: str, seed: int, round: int) -> Plan:
        """Draw the plan.

        Args:
            num_blocks: Number of blocks in the chain.
            chain: Name of the chain.
            seed: Seed of the run.
            round: Number of the round.

        Returns:
            The plan, which depends on the arguments alone.
        """
        ...


def whole_draws(rounds: int, redraw_every: int) -> int:
    """Extend some rounds to the end of a draw, so that their mean is that of a long run.

    Blocks of a single holder are sent in the last round of a draw only.

    Args:
        rounds: Number of rounds from the first one of a run, at least 1.
        redraw_every: Rounds from one draw to the next. More than 200 count as 200: without such rare draws.

    Returns:
        The number of rounds, a multiple of `redraw_every`.
    """
    every = min(redraw_every, MOST_BETWEEN)
    return -(-rounds // every) * every


@dataclass(frozen=True)
class PartitionBlocks:
    """Draw some of the blocks for each worker, as ResIST does.

    Attributes:
        workers: Number of workers.
        capacities: Number of blocks of each worker, by chain and round.
        members: The workers, if they are others than those that `capacities` is about.
        redraw_every: Rounds from one draw to the next. In between every worker keeps its blocks.
    """

    workers: int
    capacities: Capacities
    members: Members | None = None
    redraw_every: int = 1

    def __call__(self, num_blocks: int, *, chain: str, seed: int, round: int) -> Plan:
        """Draw the plan; see `Assign`."""
        capacities = self._of(num_blocks, chain, round)
        return partition(num_blocks, capacities, seed=seed, round=round // self.redraw_every, chain=chain)

    def _of(self, num_blocks: int, chain: str, round: int) -> tuple[int, ...]:
        if self.members is None:
            return self.capacities.of(num_blocks, self.workers, chain=chain, round=round)
        return self.members.capacities(self.capacities, num_blocks, chain=chain, round=round)

    def check(self, chains: Sequence[ChainLike]) -> None:
        """Check the capacities of all rounds for some chains.

        Args:
            chains: All chains that are partitioned.

        Raises:
            UserError: If they do not fit a chain, or the workers may not hold it.
        """
        if self.members is None:
            self.capacities.check(self.workers, chains)
            return
        for round in self.capacities.rounds:
            for chain in chains:
                self._of(chain.num_blocks, chain.name, round)


@dataclass(frozen=True)
class AllBlocks:
    """Give every worker every block.

    Attributes:
        workers: Number of workers.
        members: The workers, if they are others than the strategy was given.
    """

    workers: int
    members: Members | None = None

    def __call__(self, num_blocks: int, *, chain: str, seed: int, round: int) -> Plan:
        """Return the plan; see `Assign`."""
        for worker, most in enumerate(self.members.most if self.members is not None else ()):
            if most is not None and most < num_blocks:
                raise UserError(
                    f"worker {worker} may hold {most} blocks of a chain (`most={most}`), and here every worker holds "
                    f"all {num_blocks} of chain {chain}; raise `most`"
                )
        return Plan(num_blocks, (tuple(range(num_blocks)),) * self.workers)
