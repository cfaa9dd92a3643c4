"""Strategies: records of the plans, length and averaging of rounds.

A new training method is one more function that returns a `Strategy`, and a line in the table of
`resist.planning.methods`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from resist.errors import UserError
from resist.planning.assign import AllBlocks, Assign, PartitionBlocks
from resist.planning.capacities import Capacities, Given, as_capacities
from resist.planning.plan import ChainLike, RoundPlan
from resist.planning.whole import check_whole
from resist.planning.wire import Wire

# Options of the synchronization at the end of a round, which strategies with `every_step` do not have.
ROUND_OPTIONS = ("replicate", "on_nonfinite", "wire", "fragments", "delay")


@dataclass(frozen=True)
class OuterSGD:
    """Outer optimizer: Nesterov's method on the mean change of a round.

    The defaults are those of DiLoCo (Douillard et al., 2023). `lr=1` with `momentum=0` is the plain mean.

    Attributes:
        lr: Outer learning rate, more than 0 and finite.
        momentum: Outer momentum, from 0 to less than 1.

    Raises:
        UserError: If a value is out of range.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UserError(
                f"`outer={self.lr} {self.momentum}`: learning rate {self.lr}; must be more than 0 and finite"
            )
        if not 0 <= self.momentum < 1:
            raise UserError(
                f"`outer={self.lr} {self.momentum}`: momentum {self.momentum}; must be at least 0 and less than 1"
            )


@dataclass(frozen=True)
class Strategy:
    """Definition of a round: its plans, its length, and its synchronization.

    Attributes:
        name: Name of the method, as in the command line and in reports.
        workers: Number of workers (the paper's S).
        local_steps: Optimizer steps between two synchronizations (the paper's l).
        assign: Function that draws the plan of one chain; see `resist.planning.assign.Assign`.
        optimizer_state: Policy for the optimizer's state at a synchronization; see `resist.sync.optimizer_state`.
        outer: Outer optimizer for the mean change of a round; None applies the mean as it is.
        every_step: Average the gradients over the workers in every step. Weights then never differ, and a round ends
            without an exchange.
        partitions: The workers hold some of the blocks, so that the network needs a chain. True or false of the rounds
            before `at_round` only: `then` has a value of its own; see `stages`.
        then: Strategy that takes over at round `at_round`, or None.
        at_round: First round of `then`, counted from 0: the number of rounds before it.

    Raises:
        UserError: If `workers` or `local_steps` is not a whole number of at least 1, or `outer` is not an `OuterSGD`.
    """

    name: str
    workers: int
    local_steps: int
    assign: Assign
    optimizer_state: str = "travel"
    outer: OuterSGD | None = None
    every_step: bool = False
    partitions: bool = False
    then: "Strategy | None" = None
    at_round: int = 0

    def __post_init__(self) -> None:
        check_whole("workers", self.workers, least=1)
        check_whole("local_steps", self.local_steps, least=1)
        if not isinstance(self.outer, OuterSGD | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise UserError(f"`outer={self.outer!r}` is not an outer optimizer; give one, as in OuterSGD(0.7, 0.9)")

    def check_round_options(self, *, replicate: bool, on_nonfinite: str, wire: Wire) -> None:
        """Check the options of a synchronization, `ROUND_OPTIONS`.

        Args:
            replicate: As in `resist.Job`.
            on_nonfinite: As in `resist.Job`.
            wire: As in `resist.Job`.

        Raises:
            UserError: If one has no effect, because gradients are averaged in every step, or needs another worker, or
                more steps in a round.
        """
        if self.every_step and (replicate or on_nonfinite == "drop" or wire != Wire()):
            raise UserError(
                f"{self.name} averages gradients in every step, and every worker holds all weights; leave out "
                "`replicate`, `on_nonfinite='drop'` and `wire`"
            )
        for stage in self.stages:
            wire.times(stage.local_steps)
        if replicate and self.workers < 2:
            raise UserError("`replicate` needs a second worker to hold the replicas; give `workers=2` or more")

    def at(self, round: int) -> "Strategy":
        """Return the strategy of a round, through all switches.

        Args:
            round: Number of the round, from 0.

        Returns:
            The strategy, without those before it.
        """
        return self.then.at(round) if self.then is not None and round >= self.at_round else self

    @property
    def stages(self) -> "tuple[Strategy, ...]":
        """This strategy and those that it switches to, in their order."""
        return (self, *(self.then.stages if self.then is not None else ()))

    @property
    def ever_partitions(self) -> bool:
        """True if a stage partitions, so that the network needs a chain."""
        return any(stage.partitions for stage in self.stages)

    def plan(self, chains: Sequence[ChainLike], *, seed: int, round: int) -> RoundPlan:
        """Draw the plan of a round, through all switches.

        Args:
            chains: The chains that are partitioned.
            seed: Seed of the run.
            round: Number of the round, from 0.

        Returns:
            The plan, with the chains in the order given.

        Raises:
            UserError: If the capacities do not fit a chain.
        """
        for stage in self.stages:  # later ones, too: the run must not end when their round comes
            if isinstance(stage.assign, PartitionBlocks):
                stage.assign.check(chains)
        stage = self.at(round)
        plans = tuple(stage.assign(c.num_blocks, chain=c.name, seed=seed, round=round) for c in chains)
        return RoundPlan(plans, stage.workers)

    @property
    def capacities(self) -> Capacities | None:
        """Capacities of this stage; None if workers hold every block."""
        return self.assign.capacities if isinstance(self.assign, PartitionBlocks) else None

    def with_capacities(self, given: Given, *, from_round: int) -> "Strategy":
        """Return the strategy with other capacities from a round on, in every stage that partitions.

        Args:
            given: As `capacities` of `resist`.
            from_round: First round that has them, counted from 0.

        Raises:
            UserError: If no stage partitions, or a number is out of range.
        """
        if not self.ever_partitions:
            raise UserError(f"{self.name} has no capacities, since every worker holds every block; remove them")
        assign = self.assign
        if isinstance(assign, PartitionBlocks):
            assign = replace(assign, capacities=assign.capacities.from_round(from_round, given))
        then = self.then
        if then is not None and then.ever_partitions:
            then = then.with_capacities(given, from_round=from_round)
        return replace(self, assign=assign, then=then)

    @property
    def change_rounds(self) -> tuple[int, ...]:
        """First rounds of different strategies or capacities, ascending, from 0.

        The number of blocks that a worker holds is the same from each of them to the next one.
        """
        rounds = {0, *(stage.at_round for stage in self.stages if stage.then is not None)}
        for stage in self.stages:
            rounds.update(stage.capacities.rounds if stage.capacities is not None else ())
        return tuple(sorted(rounds))


def resist(
    workers: int,
    local_steps: int = 50,
    *,
    min_depth: int | None = None,
    capacities: Given | None = None,
    optimizer_state: str = "travel",
    outer: OuterSGD | None = None,
    redraw_every: int = 1,
    warmup_rounds: int = 0,
) -> Strategy:
    """ResIST (Dun et al., 2022): each worker trains some of the blocks.

    The blocks of each worker are drawn again every round, or every few rounds. Those that several workers hold are
    averaged at the end of each round.

    Args:
        workers: Number of workers (the paper's S).
        local_steps: Optimizer steps between two synchronizations (the paper's l).
        min_depth: Lower bound of every worker's capacity in each chain, or all blocks of a shorter chain. Blocks are
            then held by several workers. Default: 4.
        capacities: Number of blocks of each worker in every chain: one for all workers, one for each, a mapping from
            names of chains to either, or a `Capacities` record, which may also have rounds. A capacity above the length
            of a chain is that length. Default: the larger of ceil(num_blocks / workers) and `min_depth`.
        optimizer_state: Policy for the optimizer's state at a synchronization; see `resist.sync.optimizer_state`.
        outer: Outer optimizer, whose momentum moves with its block; see `diloco`.
        redraw_every: Rounds from one draw of the sub-networks to the next. In between every worker keeps its blocks,
            so that those of a single holder are not sent.
        warmup_rounds: Rounds of local SGD before the first round of ResIST (the paper's warm-up); see `switch`.

    Returns:
        The strategy.

    Raises:
        UserError: If a number is out of range, or the arguments contradict each other. `min_depth` and capacities that
            do not fit the chains are reported when the first plan is drawn.
    """
    record = as_capacities(capacities, min_depth=min_depth)
    check_whole("redraw_every", redraw_every, least=1)
    assign = PartitionBlocks(workers, record, redraw_every=redraw_every)
    strategy = Strategy(resist.__name__, workers, local_steps, assign, optimizer_state, outer, partitions=True)
    record.check(workers)
    check_whole("warmup_rounds", warmup_rounds, least=0)
    if warmup_rounds == 0:
        return strategy
    warmup = local_sgd(workers, local_steps, optimizer_state=optimizer_state, outer=outer)
    return switch(warmup, strategy, at_round=warmup_rounds)


def local_sgd(
    workers: int, local_steps: int = 50, *, optimizer_state: str = "travel", outer: OuterSGD | None = None
) -> Strategy:
    """Local SGD: all workers train the full network and average it.

    Args:
        workers: Number of workers.
        local_steps: Optimizer steps between two synchronizations.
        optimizer_state: Policy for the optimizer's state at a synchronization; see `resist.sync.optimizer_state`.
        outer: Outer optimizer for the mean change of a round; None applies the mean as it is.

    Returns:
        The strategy.

    Raises:
        UserError: If an argument is out of range.
    """
    return Strategy(local_sgd.__name__, workers, local_steps, AllBlocks(workers), optimizer_state, outer)


def diloco(
    workers: int, local_steps: int = 50, *, optimizer_state: str = "keep", outer: OuterSGD | None = None
) -> Strategy:
    """DiLoCo (Douillard et al., 2023): local SGD with an outer Nesterov step.

    Any optimizer can be the inner one.

    Args:
        workers: Number of workers.
        local_steps: Optimizer steps between two synchronizations.
        optimizer_state: Policy for the inner optimizer's state; by default each worker keeps its own, as in the paper.
        outer: Outer optimizer; default `OuterSGD()`, the paper's values.

    Returns:
        The strategy.

    Raises:
        UserError: If an argument is out of range.
    """
    outer = OuterSGD() if outer is None else outer
    return Strategy(diloco.__name__, workers, local_steps, AllBlocks(workers), optimizer_state, outer)


def ddp(workers: int, local_steps: int = 50) -> Strategy:
    """Baseline: torch's DistributedDataParallel, which averages gradients in every step.

    Args:
        workers: Number of workers.
        local_steps: Optimizer steps of a round. Rounds only structure the records, to compare with other strategies.

    Returns:
        The strategy.

    Raises:
        UserError: If an argument is out of range.
    """
    return Strategy(ddp.__name__, workers, local_steps, AllBlocks(workers), "keep", every_step=True)


def switch(first: Strategy, then: Strategy, *, at_round: int) -> Strategy:
    """Combine two strategies: `first` before round `at_round`, `then` from there.

    The paper's warm-up, `resist(4, warmup_rounds=9)`, is `switch(local_sgd(4), resist(4), at_round=9)`. `first` may
    itself be a switch at an earlier round.

    Args:
        first: Strategy of the rounds before `at_round`.
        then: Strategy of the later rounds, with the same number of workers.
        at_round: First round of `then`, counted from 0: the number of rounds before it.

    Returns:
        The combined strategy.

    Raises:
        UserError: If the numbers of workers differ, one of the two is `ddp`, or the rounds are out of order.
    """
    if first.workers != then.workers:
        raise UserError(f"a switch from {first.workers} to {then.workers} workers; give both the same number")
    if first.every_step or then.every_step:
        raise UserError(
            f"{ddp.__name__} cannot be part of a switch: its gradients go through a wrapper; use {local_sgd.__name__}"
        )
    check_whole("at_round", at_round, least=0)
    if first.then is not None:
        if first.at_round > at_round:
            raise UserError(f"at_round={at_round} comes before the switch at round {first.at_round}; order them")
        return replace(first, then=switch(first.then, then, at_round=at_round))
    return replace(first, then=then, at_round=at_round)
