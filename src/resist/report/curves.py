"""The curves of runs: accuracy and loss against steps, time and bytes; several seeds as a mean with its range."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from resist.report.compare import colors, score_name
from resist.report.svg import Series
from resist.report.units import bytes_unit, ends, means, seconds_unit, thin
from resist.runs.history import History

POINTS = 300  # the largest number of points of a line
DASHES = ("", "7 4", "2 4", "10 3 2 3", "12 6", "4 2")  # of the lines, so that they differ by more than their colors


@dataclass(frozen=True)
class Curves:
    """One plot, a line for each name.

    Attributes:
        title: The title.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        log_x: The x axis is logarithmic.
        series: The lines.
    """

    title: str
    x_label: str
    y_label: str
    log_x: bool
    series: list[Series]


Points = dict[int, tuple[float, float]]  # (x, y) by round


def curves_of(histories: Sequence[History], names: Sequence[str]) -> list[Curves]:
    """Six plots: accuracy against steps, time and bytes, then loss against the same.

    Args:
        histories: The runs.
        names: A name for each run. Runs of one name are drawn as the mean of the rounds that all of them have, with
            the lowest and the highest value.
    """
    byte, byte_unit = bytes_unit(max(h.bytes[-1] for h in histories))
    second, second_unit = seconds_unit(max(h.seconds[-1] for h in histories))
    sent = [h.bytes[-1] for h in histories]
    far_apart = min(sent) > 0 and max(sent) > 8 * min(sent)
    axes: tuple[tuple[str, str, Callable[[History], list[float]], bool], ...] = (
        ("steps", "steps of a worker", lambda h: [float(s) for s in h.steps], False),
        ("time", f"time without evaluations, {second_unit}", lambda h: [s / second for s in h.seconds], False),
        ("bytes", f"sent by all workers, {byte_unit}", lambda h: [b / byte for b in h.bytes], far_apart),
    )
    scores = dict.fromkeys(score_name(history) for history in histories)
    plots: list[Curves] = []
    for quantity, y_label, points, few in (
        (f"Test {' / '.join(scores)}", "%", _accuracies, True),
        ("Training loss", "mean over the workers", _losses, False),
    ):
        for against, x_label, values, log in axes:
            lines = _lines(histories, names, lambda h, values=values, points=points: points(h, values(h)), few=few)
            plots.append(Curves(f"{quantity} against {against}", x_label, y_label, log, lines))
    return plots


def _lines(
    histories: Sequence[History], names: Sequence[str], points: Callable[[History], Points], *, few: bool
) -> list[Series]:
    """A line for each name. Few points keep their places and have dots; many become means of neighbors."""
    of_name = colors(names)
    lines: list[Series] = []
    for number, (name, color) in enumerate(of_name.items()):
        runs = [points(h) for h, own in zip(histories, names, strict=True) if own == name]
        line = replace(_mean(name, color, runs), dashes=DASHES[number % len(DASHES)])
        lines.append(_thinned(line) if few else _smoothed(line))
    return lines


def _mean(name: str, color: str, runs: Sequence[Points]) -> Series:
    """The mean of the rounds that all runs have."""
    rounds = [number for number in runs[0] if all(number in run for run in runs)]
    x = [sum(run[number][0] for run in runs) / len(runs) for number in rounds]
    values = [[run[number][1] for run in runs] for number in rounds]
    y = [sum(of_round) / len(runs) for of_round in values]
    if len(runs) == 1:
        return Series(name, color, x, y)
    return Series(name, color, x, y, low=list(map(min, values)), high=list(map(max, values)))


def _thinned(line: Series) -> Series:
    kept = thin(len(line.x), POINTS)
    x, y, low, high = ([values[i] for i in kept] if values else [] for values in (line.x, line.y, line.low, line.high))
    return replace(line, x=x, y=y, low=low, high=high, marks=len(kept) <= 60)


def _smoothed(line: Series) -> Series:
    y, low, high = (means(values, POINTS) if values else [] for values in (line.y, line.low, line.high))
    return replace(line, x=ends(line.x, POINTS), y=y, low=low, high=high)


def _accuracies(history: History, x: Sequence[float]) -> Points:
    rounds = history.rounds
    return {rounds[i]["round"]: (x[i], 100 * rounds[i]["accuracy"]) for i in history.tested}


def _losses(history: History, x: Sequence[float]) -> Points:
    losses = [record["loss"] if abs(record["loss"]) < 1e30 else math.nan for record in history.rounds]
    numbers = [record["round"] for record in history.rounds]
    return dict(zip(numbers, zip(x, losses, strict=True), strict=True))
