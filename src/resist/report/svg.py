"""Plots as HTML with SVG inside, and pixel pictures as PNG, without a plotting library.

The lines are an SVG that is stretched to the available space, strokes keeping their width. Ticks and labels are text of
the page around it, so they have the same size on a phone and on a wide screen. A map of many cells is one small PNG
instead of a million rectangles.
"""

import json
import math
import struct
import zlib
from base64 import b64encode
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
        dashed: Draw the line dashed.
    """

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    dashed: bool = False


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


def line_plot(
    title: str, x_label: str, y_label: str, series: Sequence[Series], *, log_x: bool = False, y_zero: bool = False
) -> str:
    """A figure with lines. Points that are not finite are left out, as are those at 0 or less on a log axis.

    Args:
        title: The title.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        series: The lines.
        log_x: Make the x axis logarithmic.
        y_zero: Begin the y axis at 0.
    """
    lines = [_finite(line, log_x) for line in series]
    lines = [line for line in lines if line.x]
    if not lines:
        return figure(title, '<p class="none">Nothing was recorded.</p>')
    x = Axis(*_range([v for line in lines for v in line.x], from_zero=not log_x, pad=False), log=log_x)
    y = Axis(*_range([v for line in lines for v in line.y], from_zero=y_zero, pad=True))
    parts = [f'<path class="grid" d="M0 {_up(place)}H{SIDE}"/>' for place, _ in y.ticks(5)]
    for line in lines:
        points = [(_right(x.place(a)), _up(y.place(b))) for a, b in zip(line.x, line.y, strict=True)]
        stroke = f'stroke="{escape(line.color)}"'
        dashed = ' stroke-dasharray="6 4"' if line.dashed else ""
        if len(points) > 1:
            path = "L".join(f"{a} {b}" for a, b in points)
            parts.append(f'<path class="line" {stroke}{dashed} d="M{path}"/>')
        if line.marks or len(points) == 1:  # a line of length 0 with round ends is a dot, however it is stretched
            dots = "".join(f"M{a} {b}h0" for a, b in points)
            parts.append(f'<path class="dots" {stroke} d="{dots}"/>')
    data = {
        "type": "lines",
        "x": [x.low, x.high],
        "log": log_x,
        "label": x_label,
        "series": [{"name": line.name, "x": _digits(line.x), "y": _digits(line.y)} for line in lines],
    }
    return figure(title, frame(svg(parts), x.ticks(4), y.ticks(5), x_label, y_label, data=data))


def stacked_plot(
    title: str, x_label: str, y_label: str, x: Sequence[float], x_ticks: Ticks, series: Sequence[Series]
) -> str:
    """A figure with areas on top of one another, a step for each value of `x`.

    Args:
        title: The title.
        x_label: The label of the x axis.
        y_label: The label of the y axis.
        x: The x values.
        x_ticks: The ticks of the x axis.
        series: The areas from the bottom, each with as many y values as `x`.
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
    return figure(title, frame(svg(parts), x_ticks, axis.ticks(4), x_label, y_label, data=data))


def figure(title: str, content: str, *, note: str = "", css_class: str = "plot") -> str:
    """A figure element: the title, the content, and a note below it."""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="{css_class}"><figcaption>{escape(title)}</figcaption>{content}{below}</figure>'


def frame(
    area: str, x_ticks: Ticks, y_ticks: Ticks, x_label: str, y_label: str, *, height: int = 200, data: Any = None
) -> str:
    """A drawing with an axis on the left and one below.

    Args:
        area: The drawing, an SVG or image element.
        x_ticks: The ticks of the axis below.
        y_ticks: The ticks of the axis on the left.
        x_label: The label of the axis below.
        y_label: The label of the axis on the left.
        height: In pixels.
        data: The values that the script of the page shows at the pointer, ready for JSON.
    """
    left = "".join(f'<span style="bottom:{100 * at:.2f}%">{escape(text)}</span>' for at, text in y_ticks)
    below = "".join(f'<span style="left:{100 * at:.2f}%">{escape(text)}</span>' for at, text in x_ticks)
    return (
        f'<div class="frame"><div class="ylabel">{escape(y_label)}</div><div class="yticks">{left}</div>'
        f'<div class="area" style="height:{height}px">{area}<div class="tip" hidden></div></div>'
        f'<div class="xticks">{below}</div><div class="xlabel">{escape(x_label)}</div>'
        + ("" if data is None else f'<script type="application/json">{script_json(data)}</script>')
        + "</div>"
    )


def svg(parts: Sequence[str], width: float = SIDE, height: float = SIDE) -> str:
    """An SVG element that fills the space around it."""
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """A list of (name, color) entries."""
    items = "".join(f'<li><i style="background:{escape(color)}"></i>{escape(name)}</li>' for name, color in entries)
    return f'<ul class="legend">{items}</ul>'


def script_json(data: Any) -> str:
    """JSON that cannot end the script element around it."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _finite(line: Series, log_x: bool) -> Series:
    points = zip(line.x, line.y, strict=True)
    kept = [(a, b) for a, b in points if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x)]
    return replace(line, x=[a for a, _ in kept], y=[b for _, b in kept])


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


CLEAR = 0  # the color number of transparent pixels


def png(rows: Sequence[bytes], palette: Sequence[str]) -> bytes:
    """A PNG with a palette.

    Args:
        rows: Rows of equal length, a byte for each pixel: 0 for a transparent one, i for `palette[i - 1]`.
        palette: At most 255 colors as #rrggbb.
    """
    assert len(palette) < 256
    assert len({len(row) for row in rows}) == 1
    colors = bytes(3) + b"".join(bytes.fromhex(color[1:]) for color in palette)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = ((b"IHDR", header), (b"PLTE", colors), (b"tRNS", b"\0"), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + b64encode(picture).decode()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
