"""Strategies: records that say who holds what, for how long, and how it is folded. A new method is a constructor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from resist.errors import UserError
from resist.plan import Plan, check_capacities, equal_capacities, partition

# Blocks that a worker keeps at the least, unless told otherwise: the depth that the paper's Table 1 implies at S = 8.
MIN_DEPTH = 4


@dataclass(frozen=True)
class Strategy:
    """What a round is.

    assign:          (num_blocks, chain name, seed, round) -> the plan of that round for one chain
    local_steps:     optimizer steps between two synchronisations (the paper's l)
    optimizer_state: what becomes of it at a synchronisation: see `resist.fold`
    then, at_round:  the strategy that takes over at that round, if any
    """

    name: str
    workers: int
    local_steps: int
    assign: Callable[[int, str, int, int], Plan]
    optimizer_state: str = "travel"
    then: "Strategy | None" = None
    at_round: int = 0

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError(f"workers={self.workers} is not a number of workers; give at least 1")
        if self.local_steps < 1:
            raise UserError(f"local_steps={self.local_steps} is not a number of steps; give at least 1")

    def at(self, round: int) -> "Strategy":
        """The strategy in force in `round`."""
        return self.then.at(round) if self.then is not None and round >= self.at_round else self


def resist(
    workers: int,
    local_steps: int = 50,
    *,
    min_depth: int | None = None,
    capacities: Sequence[int] | None = None,
    optimizer_state: str = "travel",
) -> Strategy:
    """ResIST (Dun et al., 2022): each worker trains `capacities[worker]` blocks of every chain, drawn anew every round.

    min_depth:  blocks that a worker keeps at the least, the surplus filled by sharing (default: 4, or a shorter chain).
    capacities: blocks of each worker, for unequal workers; default: ceil(num_blocks / workers) or `min_depth`.
    """
    if capacities is not None and len(capacities) != workers:
        raise UserError(f"{len(capacities)} capacities for {workers} workers; give one for each worker")
    if capacities is not None and min_depth is not None:
        raise UserError(f"min_depth={min_depth} says nothing beside explicit capacities; give one of the two")

    def assign(num_blocks: int, chain: str, seed: int, round: int) -> Plan:
        if capacities is None:
            depth = min(MIN_DEPTH, num_blocks) if min_depth is None else min_depth
            own = equal_capacities(num_blocks, workers, depth, chain=chain)
        else:
            own = check_capacities(num_blocks, capacities, chain=chain)
        return partition(num_blocks, own, seed=seed, round=round, chain=chain)

    return Strategy("resist", workers, local_steps, assign, optimizer_state)


def local_sgd(workers: int, local_steps: int = 50, *, optimizer_state: str = "travel") -> Strategy:
    """Local SGD: every worker trains the full network, and all weights are averaged every `local_steps` steps."""

    def assign(num_blocks: int, chain: str, seed: int, round: int) -> Plan:
        return Plan(num_blocks, (tuple(range(num_blocks)),) * workers)

    return Strategy("local_sgd", workers, local_steps, assign, optimizer_state)


def switch(first: Strategy, then: Strategy, *, at_round: int) -> Strategy:
    """`first` until `at_round`, `then` from that round on. The paper's warm-up: `switch(local_sgd(4), resist(4), ...)`.
    """
    if first.workers != then.workers:
        raise UserError(f"a switch from {first.workers} to {then.workers} workers; give both the same number")
    if at_round < 0:
        raise UserError(f"at_round={at_round} is negative; give the first round of the second strategy")
    if first.then is not None:
        if first.at_round > at_round:
            raise UserError(f"at_round={at_round} comes before the switch at round {first.at_round}; order them")
        return replace(first, then=switch(first.then, then, at_round=at_round))
    return replace(first, then=then, at_round=at_round)
