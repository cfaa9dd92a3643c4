"""Plots as HTML with SVG inside, without a plotting library.

The lines are an SVG that is stretched to the available space, strokes keeping their width. Ticks and labels are text of
the page around it, so they have the same size on a phone and on a wide screen.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from resist.report.units import log_ticks, short, ticks

Ticks = Sequence[tuple[float, str]]  # (place as a share, 0 to 1, of the axis, text)
SIDE = 1000  # width and height of the drawing before it is stretched


@dataclass(frozen=True)
class Series:
    """A line of a plot.

    Attributes:
        name: Its name in the legend.
        color: #rrggbb.
        x: The x values.
        y: The y values, as many.
        marks: Draw a dot at each point.
        low, high: Lowest and highest value at each point, where the line is a mean of several; else empty.
        dashes: Lengths of dashes and gaps in pixels, as in SVG; "" for a solid line.
    """

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dashes: str = ""


@dataclass(frozen=True)
class Axis:
    """The scale of an axis: a value's place is 0 at `low` and 1 at `high`."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low) if self.high > self.low else 0.5
        return (value - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def ticks(self, num: int) -> Ticks:
        values = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, num)
        return [(self.place(value), short(value)) for value in values]


def line_plot(title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = False) -> str:
    """A figure with lines. Points that are not finite are left out, as are those at 0 or less on a log axis.

    The y axis begins at 0 where that costs little room; otherwise it is marked as broken.

    Args:
        title: The title.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        series: The lines.
        log_x: Make the x axis logarithmic.
    """
    lines = [_finite(line, log_x) for line in series]
    lines = [line for line in lines if line.x]
    if not lines:
        return figure(title, '<p class="none">Nothing was recorded.</p>')
    x = Axis(*_range([v for line in lines for v in line.x], from_zero=not log_x, pad=False), log=log_x)
    shown = [v for line in lines for v in (*line.y, *line.low, *line.high)]
    from_zero = 0 <= min(shown) < 0.3 * max(shown) or min(shown) == max(shown) > 0
    y = Axis(*_range(shown, from_zero=from_zero, pad=True))
    parts = [f'<path class="grid" d="M0 {_up(place)}H{SIDE}"/>' for place, _ in y.ticks(5)]
    for line in lines:
        parts += _line(line, x, y)
    data = {
        "type": "lines",
        "x": [x.low, x.high],
        "log": log_x,
        "label": x_label,
        "series": [{"name": line.name, "x": _digits(line.x), "y": _digits(line.y)} for line in lines],
    }
    described = "; ".join(
        f"{line.name}: from {short(line.y[0])} to {short(line.y[-1])} at {short(line.x[-1])}" for line in lines[:12]
    )
    area = svg(parts, label=f"{title} ({x_label}). {described}")
    x_label += ", logarithmic" if log_x else ""
    broken = y.low > 0
    y_label += ", not from 0" if broken else ""
    return figure(title, frame(area, x.ticks(4), y.ticks(5), x_label, y_label, data=data, broken=broken))


def _line(line: Series, x: Axis, y: Axis) -> list[str]:
    """The elements of a line: the band between lowest and highest values, the line, the dots."""
    places = [_right(x.place(value)) for value in line.x]
    points = [f"{a} {_up(y.place(value))}" for a, value in zip(places, line.y, strict=True)]
    color = escape(line.color)
    parts: list[str] = []
    if line.low and len(points) > 1:
        above = [f"{a} {_up(y.place(value))}" for a, value in zip(places, line.high, strict=True)]
        below = [f"{a} {_up(y.place(value))}" for a, value in zip(places, line.low, strict=True)]
        parts.append(f'<path class="band" fill="{color}" d="M{"L".join([*above, *reversed(below)])}Z"/>')
    if len(points) > 1:
        dashes = f' stroke-dasharray="{line.dashes}"' if line.dashes else ""
        parts.append(f'<path class="line" stroke="{color}"{dashes} d="M{"L".join(points)}"/>')
    if line.marks or len(points) == 1:  # a line of length 0 with round ends is a dot, however it is stretched
        dots = "".join(f"M{point}h0" for point in points)
        parts.append(f'<path class="dots" stroke="{color}" d="{dots}"/>')
    return parts


def stacked_plot(
    title: str, x_label: str, y_label: str, x: Sequence[float], x_ticks: Ticks, series: Sequence[Series], *, note: str
) -> str:
    """A figure with a legend, and areas on top of one another, a step for each value of `x`.

    Args:
        title: The title.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        x: The x values.
        x_ticks: The ticks of the x axis.
        series: The areas from the bottom, each with as many y values as `x`.
        note: A note below.
    """
    num = len(x)
    totals = [sum(area.y[i] for area in series) for i in range(num)]
    if not num or max(totals) <= 0:
        return figure(title, '<p class="none">Nothing was recorded.</p>')
    axis = Axis(0.0, max(totals) * 1.04)
    parts = [f'<path class="grid" d="M0 {_up(place)}H{SIDE}"/>' for place, _ in axis.ticks(4)]
    below = [0.0] * num
    for area in series:
        above = [low + value for low, value in zip(below, area.y, strict=True)]
        top = "".join(f"V{_up(axis.place(v))}H{_right((i + 1) / num)}" for i, v in enumerate(above))
        bottom = "".join(f"V{_up(axis.place(below[i]))}H{_right(i / num)}" for i in reversed(range(num)))
        parts.append(f'<path fill="{escape(area.color)}" d="M0 {_up(axis.place(below[0]))}{top}{bottom}Z"/>')
        below = above
    data = {
        "type": "steps",
        "label": x_label,
        "x": _digits(x),
        "series": [{"name": area.name, "y": _digits(area.y)} for area in series],
    }
    means = ", ".join(f"{area.name} {short(sum(area.y) / num)} {y_label}" for area in series)
    area = svg(parts, label=f"{title}. Means: {means}")
    key = legend([(area.name, area.color) for area in series])
    return figure(title, key + frame(area, x_ticks, axis.ticks(4), x_label, y_label, data=data), note=note)


def figure(title: str, content: str, *, note: str = "", css_class: str = "plot") -> str:
    """A figure element: the title, the content, and a note below it."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="{css_class}"><figcaption>{escape(title)}</figcaption>{content}{below}</figure>'


BREAK = (  # a zigzag across the axis on the left
    '<svg class="break" viewBox="0 0 12 10" aria-hidden="true"><path d="M0 9L4 5L8 9L12 5"/>'
    '<path d="M0 5L4 1L8 5L12 1"/></svg>'
)


def frame(
    area: str, x_ticks: Ticks, y_ticks: Ticks, x_label: str, y_label: str, *,
    height: int = 200, data: Any = None, broken: bool = False,
) -> str:  # fmt: skip
    """A drawing with an axis on the left and one below.

    Args:
        area: The drawing, an SVG or image element.
        x_ticks: The ticks of the axis below.
        y_ticks: The ticks of the axis on the left.
        x_label: The label of the axis below.
        y_label: The label of the axis on the left.
        height: In pixels.
        data: The values that the script of the page shows at the pointer, ready for JSON.
        broken: Mark the axis on the left as one that does not begin at 0.
    """
    left = "".join(f'<span style="bottom:{100 * at:.2f}%">{escape(text)}</span>' for at, text in y_ticks)
    below = "".join(f'<span style="left:{100 * at:.2f}%">{escape(text)}</span>' for at, text in x_ticks)
    return (
        f'<div class="frame"><div class="ylabel">{escape(y_label)}</div>'
        f'<div class="yticks" aria-hidden="true">{left}</div>'
        f'<div class="area" style="height:{height}px">{area}{BREAK if broken else ""}'
        '<div class="tip" role="status" hidden></div></div>'
        f'<div class="xticks" aria-hidden="true">{below}</div><div class="xlabel">{escape(x_label)}</div>'
        + ("" if data is None else f'<script type="application/json">{script_json(data)}</script>')
        + "</div>"
    )


def svg(parts: Sequence[str], width: float = SIDE, height: float = SIDE, *, label: str) -> str:
    """An SVG element that fills the space around it; `label` describes it to those who do not see it."""
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """A list of (name, color) entries."""
    items = "".join(f'<li><i style="background:{escape(color)}"></i>{escape(name)}</li>' for name, color in entries)
    return f'<ul class="legend">{items}</ul>'


def line_legend(lines: Sequence[Series]) -> str:
    """A list of names with a piece of each line."""
    items = "".join(
        '<li><svg viewBox="0 0 34 10" aria-hidden="true"><path class="line" d="M0 5H34" '
        f'stroke="{escape(line.color)}" stroke-dasharray="{line.dashes or "none"}"/></svg>{escape(line.name)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'


def bars(title: str, rows: Sequence[tuple[str, Sequence[tuple[str, float, str]], str]], *, note: str = "") -> str:
    """A figure with a horizontal bar of parts for each row, all on one scale from 0.

    Args:
        title: The title.
        rows: Name, parts as (name, value, color), and the text after the bar.
        note: A note below.
    """
    most = max((sum(value for _, value, _ in parts) for _, parts, _ in rows), default=0.0)
    if most <= 0:
        return figure(title, '<p class="none">Nothing was recorded.</p>')
    items: list[str] = []
    for name, parts, text in rows:
        total = sum(value for _, value, _ in parts) or 1.0
        pieces = "".join(
            f'<i style="width:{100 * value / most:.2f}%;background:{escape(color)}" '
            f'title="{escape(part)}: {value / total:.0%}"></i>'
            for part, value, color in parts
            if value > 0
        )
        shares = ", ".join(f"{part} {value / total:.0%}" for part, value, _ in parts if value > 0)
        described = f'<div class="bar" role="img" aria-label="{escape(shares)}">{pieces}</div>'
        items.append(f"<dt>{escape(name)}</dt><dd>{described}<span>{escape(text)}</span></dd>")
    key = dict.fromkeys((part, color) for _, parts, _ in rows for part, value, color in parts if value > 0)
    shown = legend(list(key)) if any(len(parts) > 1 for _, parts, _ in rows) else ""
    return figure(title, f'{shown}<dl class="bars">{"".join(items)}</dl>', note=note, css_class="barred")


def scroll(table: str, name: str) -> str:
    """A table that scrolls sideways where the page is narrow, with the keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">{table}</div>'


def script_json(data: Any) -> str:
    """JSON that cannot end the script element around it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _finite(line: Series, log_x: bool) -> Series:
    points = zip(line.x, line.y, line.low or line.y, line.high or line.y, strict=True)
    kept = [point for point in points if all(map(math.isfinite, point)) and (point[0] > 0 or not log_x)]
    x, y, low, high = map(list, zip(*kept, strict=True)) if kept else ([], [], [], [])
    return replace(line, x=x, y=y, low=low if line.low else (), high=high if line.high else ())


def _range(values: Sequence[float], *, from_zero: bool, pad: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = min(0.0, low) if from_zero else low
    if high == low:
        high, low = high + (abs(high) or 1.0) * 0.1, low - (0.0 if from_zero else (abs(low) or 1.0) * 0.1)
    margin = 0.06 * (high - low) if pad else 0.0
    return low if from_zero and low == 0 else low - margin, high + margin


def _right(place: float) -> str:
    return f"{SIDE * place:.1f}".removesuffix(".0")


def _up(place: float) -> str:
    return f"{SIDE * (1 - place):.1f}".removesuffix(".0")


def _digits(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
