"""Strategies: records that say who holds what, for how long, and how it is folded. A new method is a constructor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from resist.errors import UserError
from resist.planning.plan import Plan, check_capacities, equal_capacities, partition

# Blocks that a worker keeps at the least, unless told otherwise: the depth that the paper's Table 1 implies at S = 8.
MIN_DEPTH = 4


@dataclass(frozen=True)
class OuterSGD:
    """An outer optimizer: Nesterov's method on the change that a round made, instead of the plain mean.

    lr, momentum: those of DiLoCo (Douillard et al., 2023) by default; lr=1 without momentum is the plain mean.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"outer lr={self.lr} has to be more than 0")
        if not 0 <= self.momentum < 1:
            raise UserError(f"outer momentum={self.momentum} is outside 0 to 1; give less than 1")


@dataclass(frozen=True)
class Strategy:
    """What a round is.

    assign:          (num_blocks, chain name, seed, round) -> the plan of that round for one chain
    local_steps:     optimizer steps between two synchronizations (the paper's l)
    optimizer_state: what becomes of it at a synchronization: see `resist.sync.averaging`
    outer:           what is done with the mean change of a round; None: it is applied as it is
    every_step:      gradients are averaged over the workers in every step, so weights never differ and a round ends
                     without an exchange
    then, at_round:  the strategy that takes over at that round, if any
    """

    name: str
    workers: int
    local_steps: int
    assign: Callable[[int, str, int, int], Plan]
    optimizer_state: str = "travel"
    outer: OuterSGD | None = None
    every_step: bool = False
    then: "Strategy | None" = None
    at_round: int = 0

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("local_steps", self.local_steps)):
            if not isinstance(value, int):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise UserError(f"{name}={value!r} is not a whole number; give one")
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
    outer: OuterSGD | None = None,
) -> Strategy:
    """ResIST (Dun et al., 2022): each worker trains `capacities[worker]` blocks of every chain, drawn anew every round.

    min_depth:  blocks that a worker keeps at the least, the surplus filled by sharing (default: 4, or a shorter chain).
    capacities: blocks of each worker, for unequal workers; default: ceil(num_blocks / workers) or `min_depth`.
    outer:      an outer optimizer, whose momentum moves with its block; see `diloco`.
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

    return Strategy("resist", workers, local_steps, assign, optimizer_state, outer)


def local_sgd(
    workers: int, local_steps: int = 50, *, optimizer_state: str = "travel", outer: OuterSGD | None = None
) -> Strategy:
    """Local SGD: every worker trains the full network, and all weights are averaged every `local_steps` steps."""

    return Strategy("local_sgd", workers, local_steps, _everything(workers), optimizer_state, outer)


def diloco(
    workers: int, local_steps: int = 50, *, optimizer_state: str = "keep", outer: OuterSGD | None = None
) -> Strategy:
    """DiLoCo (Douillard et al., 2023): local SGD whose mean change of a round goes through an outer Nesterov step.

    Each worker keeps its own optimizer state, as there. Give any optimizer as the inner one.
    """
    return Strategy("diloco", workers, local_steps, _everything(workers), optimizer_state, outer or OuterSGD())


def ddp(workers: int, local_steps: int = 50) -> Strategy:
    """torch's DistributedDataParallel: gradients are averaged in every step. Rounds only serve to compare."""
    return Strategy("ddp", workers, local_steps, _everything(workers), "keep", every_step=True)


def _everything(workers: int) -> Callable[[int, str, int, int], Plan]:
    def assign(num_blocks: int, chain: str, seed: int, round: int) -> Plan:
        return Plan(num_blocks, (tuple(range(num_blocks)),) * workers)

    return assign


def switch(first: Strategy, then: Strategy, *, at_round: int) -> Strategy:
    """`first` until `at_round`, then `then`. The paper's warm-up: `switch(local_sgd(4), resist(4), ...)`."""
    if first.workers != then.workers:
        raise UserError(f"a switch from {first.workers} to {then.workers} workers; give both the same number")
    if first.every_step or then.every_step:
        raise UserError("ddp cannot be part of a switch: its gradients go through a wrapper; use local_sgd")
    if at_round < 0:
        raise UserError(f"at_round={at_round} is negative; give the first round of the second strategy")
    if first.then is not None:
        if first.at_round > at_round:
            raise UserError(f"at_round={at_round} comes before the switch at round {first.at_round}; order them")
        return replace(first, then=switch(first.then, then, at_round=at_round))
    return replace(first, then=then, at_round=at_round)
