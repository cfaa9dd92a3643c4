"""The target of a job whose members change: where they go on, agreed on by all before anything changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from resist.blocks.chain import Chain
from resist.errors import UserError
from resist.planning.members import Members
from resist.planning.plan import Key, RoundPlan
from resist.planning.regrouping import Offer, Point, Regrouping, Standing, choose, origins_of, with_members
from resist.planning.strategy import Strategy
from resist.planning.wire import Wire
from resist.subnet.changes import from_text, to_text
from resist.subnet.flats import PlaceKey
from resist.sync import standing as standings
from resist.sync.agreement import check_agreement, run_everywhere
from resist.sync.round_agreement import check_progress, distinct_optimizers
from resist.sync.round_end import RoundEnd
from resist.sync.round_start import RoundStart
from resist.sync.standing import Progress, Report
from resist.sync.transport import Transport
from resist.sync.worker import Worker


@dataclass(frozen=True)
class Regrouped:
    """What has become of a job's members, equal in all processes.

    Attributes:
        generation: The new generation, from 1.
        round: The round that begins.
        step: Optimizer steps done, at which the workers have seen as many images.
        workers: Number of workers.
        former: New index -> former index, of the workers that were there at the point from which they go on.
        joined: Workers that have got everything from others.
        lost: Former workers that are not there any more.
        repeated: The round was begun before, and what was trained in it is lost.
        recovered: Blocks that have returned to the beginning of the round, by (chain number, block).
    """

    generation: int
    round: int
    step: int
    workers: int
    former: Mapping[int, int]
    joined: tuple[int, ...]
    lost: tuple[int, ...]
    repeated: bool
    recovered: tuple[Key, ...]


@dataclass(frozen=True)
class Target:
    """Where a regrouped job goes on, and how it gets there.

    Attributes:
        regrouping: The point to go on from.
        members: The new members.
        strategy: The strategy for them.
        end: The end of a round that leads there.
        result: What the caller learns.
        changing: `Subnet.changing` of all processes.
        averaged: Number of steps that averages of the weights have seen.
    """

    regrouping: Regrouping
    members: Members
    strategy: Strategy
    end: RoundEnd
    result: Regrouped
    changing: set[PlaceKey]
    averaged: int


class GroupedJob(Protocol):
    """The parts of a `resist.Job` that decide where it stands; see there for the attributes.

    Attributes:
        started_with: Values that all processes must have been started with.
        first_buffers: See `resist.sync.round_start.first_buffers`.
    """

    workers: list[Worker]
    chains: tuple[Chain, ...]
    plan: RoundPlan
    seed: int
    wire: Wire
    round: int
    step_index: int
    generation: int
    given: Strategy
    members: Members
    starts: list[RoundStart]
    torn: bool
    dropped: dict[int, str]
    on_nonfinite: str
    replicate: bool
    started_with: dict[str, object]
    first_buffers: Mapping[Key, Mapping[str, Tensor]]

    @property
    def steps_in_round(self) -> int:
        """Steps done in the round."""
        ...


def agree_on_target(
    job: GroupedJob,
    transport: Transport,
    kept: Sequence[int] | None,
    most: int | None,
) -> tuple[Target, list[Worker]]:
    """Agree on where members go on. Changes nothing.

    Waits for all processes.

    Args:
        job: The job.
        transport: Connects the new members.
        kept: The workers of this process that stay, in the order of `transport.hosted`; None: all.
        most: Blocks of a chain that each worker of this process may hold at most; None: no bound.

    Returns:
        The target, equal in all processes, and the workers of this process that stay.

    Raises:
        IncompleteNetworkError: In all processes, if a part of the network is in none of them any more.
        AgreedError: In all processes, if they were started with other arguments, or if the workers may not hold all
            blocks.
        WorkerLostError: If another process is lost.
    """
    workers = run_everywhere(transport, lambda: _staying(job, transport, kept, most))
    check_agreement(transport, job.started_with)
    own = _report(job, transport.hosted, workers, most)
    reports = [standings.from_text(text) for text in transport.all_gather_text(standings.to_text(own))]
    # The rounds may differ: `choose` finds one that fits.
    check_progress([{"round": 0, "optimizers": r.optimizers, "averages": r.averaged >= 0} for r in reports])
    regrouping = choose([report.standing for report in reports], [chain.num_blocks for chain in job.chains])
    return run_everywhere(transport, lambda: _target(job, regrouping, reports)), workers


def _staying(job: GroupedJob, transport: Transport, kept: Sequence[int] | None, most: int | None) -> list[Worker]:
    """The workers that stay; UserError if an argument is of no use."""
    hosted = {worker.index: worker for worker in job.workers}
    if unknown := [index for index in kept or () if index not in hosted]:
        raise UserError(f"kept has worker {unknown[0]}, and this process hosts {list(hosted)}; name only those")
    workers = list(hosted.values()) if kept is None else [hosted[index] for index in dict.fromkeys(kept)]
    if len(workers) != len(transport.hosted):
        raise UserError(
            f"the new transport has {len(transport.hosted)} workers in this process, which hosts {len(workers)}; "
            "give a transport for these, or name those that stay in `kept`"
        )
    if most is not None and most < 1:
        raise UserError(f"`most={most}`; every worker holds a block of each chain: give 1 or more")
    for worker in workers:
        worker.subnet.check_attached()
    return workers


def _report(job: GroupedJob, hosted: Sequence[int], workers: Sequence[Worker], most: int | None) -> Report:
    """What this process says about itself."""
    offers: list[Offer] = []
    progress: dict[Point, Progress] = {}
    kept = {start.key: start.blocks.keys() for start in job.starts}
    for start in job.starts:
        point = Point(*start.key, steps=False)
        there = [(new, start.of(worker)) for new, worker in zip(hosted, workers, strict=True)]
        if rows := [(new, own.index, own.held) for new, own in there if own is not None]:
            offers.append(standings.offer(point, start.members.workers, rows, start.blocks))
            progress[point] = Progress(start.members, start.step, 0)
    changed: set[PlaceKey] = set()
    for worker in workers:
        changed |= worker.subnet.changing
    if job.generation >= 0 and not job.torn:
        point = Point(job.generation, job.round, steps=True)
        rows = [(new, w.index, job.plan.held(w.index)) for new, w in zip(hosted, workers, strict=True)]
        offers.append(standings.offer(point, job.members.workers, rows, kept.get((job.generation, job.round), ())))
        progress[point] = Progress(job.members, job.step_index - job.steps_in_round, job.steps_in_round)
        changed |= {key for worker in workers for watch in worker.watches for key in watch.changed()}
    torn = (job.generation, job.round) if job.torn and job.generation >= 0 else None
    counts = [int(worker.averaged.n_averaged) for worker in workers if worker.averaged is not None]
    return Report(
        Standing(tuple(hosted), tuple(offers), torn),
        progress,
        job.generation,
        most,
        to_text(changed, workers[0].subnet),
        max(counts, default=-1),
        distinct_optimizers(workers),
    )


def _target(job: GroupedJob, regrouping: Regrouping, reports: Sequence[Report]) -> Target:
    """Work out where the members go on; UserError if they cannot."""
    point, workers = regrouping.point, regrouping.plan.workers
    there = [report for report in reports if point in report.progress]
    first = there[0].progress[point]
    most = {new: report.most for report in reports for new in report.standing.hosted}
    origins = origins_of(first.members, regrouping.former, workers)
    members = Members(origins, tuple(most[new] for new in range(workers)), first.members.given)
    strategy = with_members(job.given, members)
    # As going on at another S does: the step at which the workers have seen as many images.
    steps = sum(report.progress[point].steps * len(report.standing.hosted) for report in there)
    step = (first.step * first.members.workers + steps) // workers
    round = point.round + (steps > 0)
    end = RoundEnd(
        point.round,
        step,
        strategy.at(point.round),
        regrouping.plan,
        strategy.plan(job.chains, seed=job.seed, round=round),
        seed=job.seed,
        regroups=True,
        # With fragments, those that were averaged in this round have taken their outer step already.
        steps=steps > 0 and job.wire.fragments == 0,
    )
    known = max(report.generation for report in reports)
    result = Regrouped(
        generation=known + 1,
        round=round,
        step=step,
        workers=workers,
        former=regrouping.former,
        joined=tuple(sorted(regrouping.joined)),
        lost=regrouping.lost,
        repeated=not point.steps,
        recovered=tuple(regrouping.recovered),
    )
    changing = {key for report in reports for key in from_text(report.changing, job.workers[0].subnet)}
    return Target(regrouping, members, strategy, end, result, changing, max(report.averaged for report in there))
