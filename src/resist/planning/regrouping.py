"""Regrouping: where a job goes on when its members change, and who then holds which blocks.

When a process is lost, the others may stand at different points: before the exchange of a round, in the middle of it
(their weights are of no use then), or after it. Each offers the points that it can go on from: its present weights, or
copies of those that began a round. `choose` finds the newest point from which the network is complete. A process that
does not have it is treated as one that joins: it gets everything from the others.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from resist.errors import IncompleteNetworkError, UserError
from resist.planning.assign import AllBlocks, PartitionBlocks
from resist.planning.members import Members
from resist.planning.plan import Key, Plan, RoundPlan
from resist.planning.strategy import Strategy

Held = tuple[tuple[int, ...], ...]  # blocks of each chain


@dataclass(frozen=True)
class Point:
    """A point of training.

    Attributes:
        generation: The job's generation when its round began.
        round: The round.
        steps: True: with the steps of the round that are done. False: the beginning of the round.
    """

    generation: int
    round: int
    steps: bool


@dataclass(frozen=True)
class Row:
    """One worker at a point.

    Attributes:
        former: Its index there.
        held: The blocks that it holds there.
    """

    former: int
    held: Held


@dataclass(frozen=True)
class Offer:
    """What one process has at a point.

    Attributes:
        point: The point.
        workers: Number of workers there.
        rows: New index of each worker of the process -> that worker.
        kept: Replicas that the process keeps, of the beginning of the round.
    """

    point: Point
    workers: int
    rows: Mapping[int, Row]
    kept: frozenset[Key]


@dataclass(frozen=True)
class Standing:
    """Where one process stands.

    Attributes:
        hosted: New indices of its workers, ascending.
        offers: The points that it can go on from.
        torn: The generation and round in whose exchange it is; None: it is in none.
    """

    hosted: tuple[int, ...]
    offers: tuple[Offer, ...] = ()
    torn: tuple[int, int] | None = None


@dataclass(frozen=True)
class Regrouping:
    """Where the members go on.

    Attributes:
        point: The point.
        plan: The blocks of each worker there: those of the new members, with blocks that were lost at their keepers.
        former: New index -> index at the point, of the workers that were there.
        recovered: Blocks that only lost workers held -> new index of the worker that has a replica.
        lost: Workers of the point that are not there any more.
        missing: Blocks that nobody has; none in what `choose` returns.
    """

    point: Point
    plan: RoundPlan
    former: Mapping[int, int]
    recovered: Mapping[Key, int] = field(default_factory=dict[Key, int])
    lost: tuple[int, ...] = ()
    missing: tuple[Key, ...] = ()

    @property
    def joined(self) -> frozenset[int]:
        """Workers that get everything from the others."""
        return frozenset(range(self.plan.workers)) - self.former.keys()


def choose(standings: Sequence[Standing], num_blocks: Sequence[int]) -> Regrouping:
    """Choose the point from which the members go on.

    That is the newest one with a complete network. Of the same round, the present weights come first if nobody is in
    the middle of its exchange; then its beginning.

    Args:
        standings: Where each process stands, by process.
        num_blocks: Number of blocks of each chain.

    Returns:
        The point, and who has what there.

    Raises:
        IncompleteNetworkError: If no point has a complete network.
        UserError: If no process has a network.
    """
    nearest: Regrouping | None = None  # to a complete network
    for point in _by_preference(standings):
        found = _at(point, standings, num_blocks)
        if not found.missing:
            return found
        if nearest is None or len(found.lost) < len(nearest.lost):
            nearest = found
    if nearest is None:
        raise UserError("all processes join, and none of them has a network to begin with; start them as a new job")
    (chain, block), round = nearest.missing[0], nearest.point.round + 1
    raise IncompleteNetworkError(
        f"block {block} of chain {chain} was lost with {_named(nearest.lost)}: no other process has it as it was in "
        f"round {round}, nor a replica of it; go on from a checkpoint (`replicate=True` keeps replicas, for the loss "
        "of one worker at a time)"
    )


def _by_preference(standings: Sequence[Standing]) -> Iterator[Point]:
    """The points that processes offer, the best first."""
    points = {offer.point for standing in standings for offer in standing.offers}
    torn = {standing.torn for standing in standings}
    for generation, round in sorted({(point.generation, point.round) for point in points}, reverse=True):
        present, start = Point(generation, round, True), Point(generation, round, False)
        order = (start, present) if (generation, round) in torn else (present, start)
        yield from (point for point in order if point in points)


def _at(point: Point, standings: Sequence[Standing], num_blocks: Sequence[int]) -> Regrouping:
    """Who has what at a point."""
    offers = [offer for standing in standings for offer in standing.offers if offer.point == point]
    rows = {new: row for offer in offers for new, row in offer.rows.items()}
    lost = sorted(set(range(offers[0].workers)) - {row.former for row in rows.values()})
    workers = sum(len(standing.hosted) for standing in standings)
    held = {(chain, b) for row in rows.values() for chain, blocks in enumerate(row.held) for b in blocks}
    recovered: dict[Key, int] = {}
    missing: list[Key] = []
    load = dict.fromkeys(rows, 0)
    for key in ((chain, block) for chain, number in enumerate(num_blocks) for block in range(number)):
        if key in held:
            continue
        if not (keepers := [new for offer in offers if key in offer.kept for new in offer.rows]):
            missing.append(key)
            continue
        recovered[key] = min(sorted(keepers), key=load.__getitem__)
        load[recovered[key]] += 1
    plans = [
        Plan(number, tuple(_row(new, rows, chain, recovered) for new in range(workers)))
        for chain, number in enumerate(num_blocks)
    ]
    former = {new: row.former for new, row in sorted(rows.items())}
    return Regrouping(point, RoundPlan(tuple(plans), workers), former, recovered, tuple(lost), tuple(missing))


def _row(new: int, rows: Mapping[int, Row], chain: int, recovered: Mapping[Key, int]) -> tuple[int, ...]:
    """The blocks of one worker in a chain: recovered ones come behind its own, whose slots stay."""
    if new not in rows:
        return ()
    return (*rows[new].held[chain], *(b for (number, b), at in recovered.items() if (number, at) == (chain, new)))


def _named(workers: Sequence[int]) -> str:
    return f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))}" if workers else "its weights"


def origins_of(members: Members, former: Mapping[int, int], workers: int) -> tuple[int | None, ...]:
    """Give each of the new members a place in the strategy as it was given.

    Workers that stay keep theirs. The others take free places, the lowest first.

    Args:
        members: The workers at the point from which they go on.
        former: New index -> index there, of the workers that stay.
        workers: Number of new members.

    Returns:
        `Members.origins`.
    """
    kept = {new: members.origins[old] for new, old in former.items()}
    given = max(members.given, workers)
    free = iter([place for place in range(given) if place not in kept.values()])
    origins = [kept.get(new) if kept.get(new) is not None else next(free) for new in range(workers)]
    return tuple(None if origin is None or origin >= members.given else origin for origin in origins)


def with_members(strategy: Strategy, members: Members) -> Strategy:
    """Return a strategy for other workers, with all its stages.

    Args:
        strategy: The strategy as it was given.
        members: The workers.

    Returns:
        The strategy. Whether the workers may hold all blocks is checked when a plan is drawn.

    Raises:
        UserError: If gradients are averaged in every step, or if its plans are those of a function of the user.
    """
    if strategy.every_step:
        raise UserError(
            f"{strategy.name} joins the workers in every step, and cannot go on with others; start it again"
        )
    if not isinstance(strategy.assign, PartitionBlocks | AllBlocks):
        raise UserError(
            f"{strategy.name} draws its plans by {strategy.assign!r}, for {strategy.workers} workers; only the "
            "strategies of this package go on with other workers"
        )
    own = None if members == Members.first(strategy.workers) else members
    then = None if strategy.then is None else with_members(strategy.then, members)
    assign = replace(strategy.assign, workers=members.workers, members=own)
    return replace(strategy, workers=members.workers, assign=assign, then=then)
