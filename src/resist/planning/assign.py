"""Assignments: functions that draw the plan of one chain for one round, as records that can be compared."""

from dataclasses import dataclass
from typing import Protocol

from resist.planning.capacities import Capacities
from resist.planning.plan import Plan, partition


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


@dataclass(frozen=True)
class PartitionBlocks:
    """Draw some of the blocks for each worker, as ResIST does.

    Attributes:
        workers: Number of workers.
        capacities: Number of blocks of each worker, by chain and round.
    """

    workers: int
    capacities: Capacities

    def __call__(self, num_blocks: int, *, chain: str, seed: int, round: int) -> Plan:
        """Draw the plan; see `Assign`."""
        capacities = self.capacities.of(num_blocks, self.workers, chain=chain, round=round)
        return partition(num_blocks, capacities, seed=seed, round=round, chain=chain)


@dataclass(frozen=True)
class AllBlocks:
    """Give every worker every block.

    Attributes:
        workers: Number of workers.
    """

    workers: int

    def __call__(self, num_blocks: int, *, chain: str, seed: int, round: int) -> Plan:
        """Return the plan; see `Assign`."""
        return Plan(num_blocks, (tuple(range(num_blocks)),) * self.workers)
