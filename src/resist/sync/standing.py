"""Standings: what each process says about itself before members regroup, as texts that all of them read."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resist.planning.members import Members
from resist.planning.plan import Key
from resist.planning.regrouping import Held, Offer, Point, Row, Standing


@dataclass(frozen=True)
class Progress:
    """How far training is at a point.

    Attributes:
        members: The workers there.
        step: Optimizer steps before the round.
        steps: Steps that this process has made in the round.
    """

    members: Members
    step: int
    steps: int


@dataclass(frozen=True)
class Report:
    """What one process says about itself.

    Attributes:
        standing: Where it stands.
        progress: How far training is at each point that it offers.
        generation: The newest generation that it knows; -1: it joins.
        most: Blocks of a chain that each of its workers may hold at most; None: no bound.
        changing: `resist.subnet.changes.to_text` of what changes besides what trains.
        averaged: Number of steps that averages of the weights have seen; -1: there are none.
        optimizers: Classes of the optimizers of its workers.
    """

    standing: Standing
    progress: Mapping[Point, Progress]
    generation: int
    most: int | None
    changing: str
    averaged: int
    optimizers: list[list[str]]


def to_text(report: Report) -> str:
    """Write a report as JSON."""
    offers: list[dict[str, Any]] = []
    for offer in report.standing.offers:
        progress = report.progress[offer.point]
        offers.append(
            {
                "point": [offer.point.generation, offer.point.round, offer.point.steps],
                "rows": [[new, row.former, row.held] for new, row in offer.rows.items()],
                "kept": sorted(offer.kept),
                "members": [progress.members.origins, progress.members.most, progress.members.given],
                "progress": [progress.step, progress.steps],
            }
        )
    values = {
        "hosted": report.standing.hosted,
        "offers": offers,
        "torn": report.standing.torn,
        "about": [report.generation, report.most, report.changing, report.averaged, report.optimizers],
    }
    return json.dumps(values, separators=(",", ":"))


def from_text(text: str) -> Report:
    """Read the text of `to_text`."""
    values = json.loads(text)
    offers: list[Offer] = []
    progress: dict[Point, Progress] = {}
    for one in values["offers"]:
        point, (origins, most, given) = Point(*one["point"]), one["members"]
        members = Members(tuple(origins), tuple(most), given)
        rows = {new: Row(former, _held(held)) for new, former, held in one["rows"]}
        offers.append(Offer(point, members.workers, rows, frozenset((chain, block) for chain, block in one["kept"])))
        progress[point] = Progress(members, *one["progress"])
    torn = None if values["torn"] is None else (values["torn"][0], values["torn"][1])
    return Report(Standing(tuple(values["hosted"]), tuple(offers), torn), progress, *values["about"])


def offer(point: Point, workers: int, rows: Iterable[tuple[int, int, Held]], kept: Iterable[Key]) -> Offer:
    """Make an offer from (new index, former index, blocks) of each worker."""
    return Offer(point, workers, {new: Row(former, held) for new, former, held in rows}, frozenset(kept))


def _held(lists: Sequence[Sequence[int]]) -> Held:
    return tuple(tuple(blocks) for blocks in lists)
