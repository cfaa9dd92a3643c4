"""Plots as HTML with SVG inside, and pixel pictures as PNG, from our own code.

The lines are an SVG that is stretched to the space there is, strokes keeping their width; ticks and labels are text of
the page around it, so that they have the same size on a telephone and on a wide screen. A map of many cells is one
small PNG instead of a million rectangles."""

import json
import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from resist.report.units import log_ticks, short, ticks

Ticks = Sequence[tuple[float, str]]  # (place as a share, 0 to 1, of the axis, text)
SIDE = 1000  # of the stretched drawing


@dataclass(frozen=True)
class Series:
    """A line. x and y are equally long; marks: a dot at each point."""

    name: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """From a value to its place, 0 to 1."""

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
    """A figure with lines. Points that are no numbers interrupt a line, and so do those at 0 or less on a log axis."""
    lines = [_finite(one, log_x) for one in series]
    lines = [one for one in lines if one.x]
    if not lines:
        return figure(title, '<p class="none">Nothing was recorded.</p>')
    x = Axis(*_range([v for one in lines for v in one.x], from_zero=not log_x, pad=False), log=log_x)
    y = Axis(*_range([v for one in lines for v in one.y], from_zero=y_zero, pad=True))
    parts = [f'<path class="grid" d="M0 {_up(place)}H{SIDE}"/>' for place, _ in y.ticks(5)]
    for one in lines:
        points = [(_right(x.place(a)), _up(y.place(b))) for a, b in zip(one.x, one.y, strict=True)]
        stroke = f'stroke="{escape(one.color)}"'
        dashed = ' stroke-dasharray="6 4"' if one.dashed else ""
        if len(points) > 1:
            path = "L".join(f"{a} {b}" for a, b in points)
            parts.append(f'<path class="line" {stroke}{dashed} d="M{path}"/>')
        if one.marks or len(points) == 1:  # a line of no length with round ends is a dot, however it is stretched
            dots = "".join(f"M{a} {b}h0" for a, b in points)
            parts.append(f'<path class="dots" {stroke} d="{dots}"/>')
    data = {
        "kind": "lines", "x": [x.low, x.high], "log": log_x, "label": x_label,
        "series": [{"name": one.name, "x": _digits(one.x), "y": _digits(one.y)} for one in lines],
    }  # fmt: skip
    return figure(title, frame(svg(parts), x.ticks(4), y.ticks(5), x_label, y_label, data=data))


def stacked_plot(
    title: str, x_label: str, y_label: str, x: Sequence[float], x_ticks: Ticks, series: Sequence[Series]
) -> str:
    """Areas on top of one another, a step for each value of `x`; every series has as many values as `x`."""
    num = len(x)
    totals = [sum(one.y[i] for one in series) for i in range(num)]
    if not num or max(totals) <= 0:
        return figure(title, '<p class="none">Nothing was recorded.</p>')
    axis = Axis(0.0, max(totals) * 1.04)
    parts = [f'<path class="grid" d="M0 {_up(place)}H{SIDE}"/>' for place, _ in axis.ticks(4)]
    below = [0.0] * num
    for one in series:
        above = [low + value for low, value in zip(below, one.y, strict=True)]
        top = "".join(f"V{_up(axis.place(v))}H{_right((i + 1) / num)}" for i, v in enumerate(above))
        bottom = "".join(f"V{_up(axis.place(below[i]))}H{_right(i / num)}" for i in reversed(range(num)))
        parts.append(f'<path fill="{escape(one.color)}" d="M0 {_up(axis.place(below[0]))}{top}{bottom}Z"/>')
        below = above
    data = {
        "kind": "steps", "label": x_label, "x": _digits(x),
        "series": [{"name": one.name, "y": _digits(one.y)} for one in series],
    }  # fmt: skip
    return figure(title, frame(svg(parts), x_ticks, axis.ticks(4), x_label, y_label, data=data))


def figure(title: str, content: str, *, note: str = "", kind: str = "plot") -> str:
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure class="{kind}"><figcaption>{escape(title)}</figcaption>{content}{below}</figure>'


def frame(
    area: str, x_ticks: Ticks, y_ticks: Ticks, x_label: str, y_label: str, *, height: int = 200, data: Any = None
) -> str:
    """`area` with an axis on the left and one below. data: what the page's script shows under the pointer."""
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
    return f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{"".join(parts)}</svg>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """entries: (name, color)"""
    items = "".join(f'<li><i style="background:{escape(color)}"></i>{escape(name)}</li>' for name, color in entries)
    return f'<ul class="legend">{items}</ul>'


def script_json(data: Any) -> str:
    """JSON that cannot end the script element in which it stands."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _finite(one: Series, log_x: bool) -> Series:
    kept = [
        (a, b) for a, b in zip(one.x, one.y, strict=True)
        if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x)
    ]  # fmt: skip
    return Series(one.name, one.color, [a for a, _ in kept], [b for _, b in kept], one.marks, one.dashed)


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


CLEAR = 0  # the color number that lets the page shine through


def png(rows: Sequence[bytes], palette: Sequence[str]) -> bytes:
    """A PNG with a palette of #rrggbb, at most 255 of them.

    rows: equally long, a byte for each pixel: 0 for a clear one, i for `palette[i - 1]`.
    """
    assert len(palette) < 256
    assert len({len(row) for row in rows}) == 1
    colors = bytes(3) + b"".join(bytes.fromhex(color[1:]) for color in palette)
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 3, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows), 9)
    parts = ((b"IHDR", header), (b"PLTE", colors), (b"tRNS", b"\0"), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in parts)


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + b64encode(picture).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
