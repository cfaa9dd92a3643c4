"""Accuracy and loss against steps, time and bytes, as lines that are ready to be drawn."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resist.report.compare import colours
from resist.report.history import History
from resist.report.plot import Series
from resist.report.scale import bytes_unit, ends, means, seconds_unit, thin

POINTS = 300  # of a line at most


@dataclass(frozen=True)
class Curves:
    """One set of axes, a line for each run."""

    title: str
    x_label: str
    y_label: str
    log_x: bool
    series: list[Series]


def curves_of(histories: Sequence[History], names: Sequence[str]) -> list[Curves]:
    """Accuracy against steps, time and bytes, then loss against the same. names: one for each run; equal names have
    the same colour."""
    of_name = colours(names)
    byte, byte_unit = bytes_unit(max(h.bytes[-1] for h in histories))
    second, second_unit = seconds_unit(max(h.seconds[-1] for h in histories))
    sent = [h.bytes[-1] for h in histories]
    far_apart = min(sent) > 0 and max(sent) > 8 * min(sent)
    axes: tuple[tuple[str, str, Callable[[History], list[float]], bool], ...] = (
        ("steps", "steps of a worker", lambda h: [float(s) for s in h.steps], False),
        ("time", f"time without evaluations, {second_unit}", lambda h: [s / second for s in h.seconds], False),
        ("bytes", f"sent by all workers, {byte_unit}", lambda h: [b / byte for b in h.bytes], far_apart),
    )
    return [
        Curves(
            f"{what} against {against}", x_label, y_label, log,
            [line(h, n, of_name[n], values(h)) for h, n in zip(histories, names, strict=True)],
        )
        for what, y_label, line in (
            ("Test accuracy", "%", _accuracy_line), ("Training loss", "mean over the workers", _loss_line),
        )
        for against, x_label, values, log in axes
    ]  # fmt: skip


def _accuracy_line(history: History, name: str, colour: str, x: Sequence[float]) -> Series:
    kept = [history.tested[i] for i in thin(len(history.tested), POINTS)]
    values = [100 * history.rounds[i]["accuracy"] for i in kept]
    return Series(name, colour, [x[i] for i in kept], values, marks=len(kept) <= 60)


def _loss_line(history: History, name: str, colour: str, x: Sequence[float]) -> Series:
    losses = [record["loss"] if abs(record["loss"]) < 1e30 else math.nan for record in history.rounds]
    return Series(name, colour, ends(x, POINTS), means(losses, POINTS))
