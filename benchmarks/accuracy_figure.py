"""docs/accuracy.svg: accuracy of methods against what they cost, with error bars. Used by tables.py."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cifar10_rows import BASE
from paired import by_row, is_of, mean_and_error, score, share
from resist.report.colors import COLORS
from resist.report.svg import Axis

PANELS = {
    "gmac": "compute",
    "bytes": "bytes sent",
    "peak_bytes": "memory of a worker",
}
WIDTH, HEIGHT, LEFT, TOP, GAP = 240, 220, 52, 40, 26  # of a panel, in pixels, and around it
LEGEND_ROW = 17
FAR_APART = 8.0  # costs whose ratio is larger have a logarithmic axis
STYLE = (
    "text{fill:#24292f}.soft{fill:#57606a}.ground{fill:#ffffff}.grid{stroke:#8d949e;stroke-opacity:.3}"
    "@media(prefers-color-scheme:dark){text{fill:#e4e8ee}.soft{fill:#a2abb8}.ground{fill:#14171c}}"
)


@dataclass(frozen=True)
class Point:
    """The runs of one row.

    Attributes:
        name: The row.
        mean: Accuracy, percent.
        error: Standard error over seeds; 0 with one seed.
        costs: Cost as a share of the base's, by key of `PANELS`.
    """

    name: str
    mean: float
    error: float
    costs: Mapping[str, float]


def figure(runs: Sequence[Mapping[str, Any]], reading: str = "averaged") -> str:
    """Draw accuracy against compute, bytes and memory: a panel for each, a point for each row with three seeds.

    Rows with fewer seeds are left out, as are wire formats, which have a table of their own. Rows of the base with
    fewer rounds are joined by a line: it is what the base reaches for less.

    Args:
        runs: Recorded runs of one setting.
        reading: Source of BatchNorm statistics.

    Returns:
        An SVG document.
    """
    points = points_of(runs, reading)
    width = LEFT + len(PANELS) * (WIDTH + GAP)
    height = TOP + HEIGHT + 60 + LEGEND_ROW * ((len(points) + 1) // 2)
    low = min(point.mean - point.error for point in points)
    high = max(point.mean + point.error for point in points)
    margin = 0.08 * (high - low) or 1.0
    y = Axis(low - margin, high + margin)
    parts = begin(
        width,
        height,
        f"Test accuracy against cost; cost of {BASE} = 1, bars: standard error over seeds",
        f"Test accuracy, %, against cost ({BASE} = 1)",
    )
    for number, (key, title) in enumerate(PANELS.items()):
        parts += _panel(points, key, title, y, left=LEFT + number * (WIDTH + GAP), labels=number == 0)
    parts += _legend(points, TOP + HEIGHT + 56, width)
    return "\n".join([*parts, "</svg>"]) + "\n"


def points_of(runs: Sequence[Mapping[str, Any]], reading: str = "averaged") -> list[Point]:
    """Return the rows with at least three seeds, the best first."""
    rows = by_row([run for run in runs if not run.get("plain")])
    base = rows.get(BASE, [])
    points = []
    for name, some in rows.items():
        if len(some) >= 3 and base:
            mean, error = mean_and_error([score(run, reading) for run in some])
            points.append(Point(name, mean, error, {key: share(some, base, key) for key in PANELS}))
    return sorted(points, key=lambda point: -point.mean)


def _panel(points: Sequence[Point], key: str, title: str, y: Axis, *, left: float, labels: bool) -> list[str]:
    costs = [point.costs[key] for point in points]
    far = max(costs) > FAR_APART * min(costs)
    x = Axis(min(costs) / 1.3, 1.3 * max(costs), log=True) if far else Axis(0.0, 1.08 * max(costs))
    title += ", logarithmic" if far else ""
    parts = [f'<text x="{left + WIDTH / 2:g}" y="{TOP + HEIGHT + 36}" text-anchor="middle">{escape(title)}</text>']
    parts += grid(y, left, labels=labels)
    for place, text in x.ticks(4):
        at = left + WIDTH * place
        parts.append(
            f'<text class="soft" x="{at:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{escape(text)}</text>'
        )
    curve = sorted(
        (left + WIDTH * x.place(point.costs[key]), TOP + HEIGHT * (1 - y.place(point.mean)))
        for point in points
        if is_of(point.name, BASE)
    )
    if len(curve) > 1:
        line = "L".join(f"{a:.1f} {b:.1f}" for a, b in curve)
        parts.append(f'<path fill="none" stroke="#8d949e" stroke-dasharray="4 3" d="M{line}"/>')
    for number, point in enumerate(points):
        across = left + WIDTH * x.place(point.costs[key])
        middle, above, below = (
            TOP + HEIGHT * (1 - y.place(point.mean + sign * point.error)) for sign in (0.0, 1.0, -1.0)
        )
        parts += [bar(number, across, above, below), mark(number, across, middle)]
    return parts


def begin(width: float, height: float, title: str, heading: str) -> list[str]:
    """The beginning of a drawing, with a ground of its own and a heading."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}"/>',
        f'<text x="14" y="20" font-weight="bold">{escape(heading)}</text>',
    ]


def grid(y: Axis, left: float, *, labels: bool = True) -> list[str]:
    """The horizontal lines of a panel, with their values."""
    parts = []
    for place, text in y.ticks(5):
        at = TOP + HEIGHT * (1 - place)
        parts.append(f'<path class="grid" d="M{left} {at:.1f}h{WIDTH}"/>')
        if labels:
            parts.append(f'<text class="soft" x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{escape(text)}</text>')
    return parts


def _legend(points: Sequence[Point], top: float, width: float) -> list[str]:
    parts = []
    for number, point in enumerate(points):
        x, y = 24 + (number % 2) * (width / 2), top + LEGEND_ROW * (number // 2)
        parts.append(mark(number, x, y))
        text = f"{point.name}: {point.mean:.1f} ± {point.error:.1f}"
        parts.append(f'<text x="{x + 10:g}" y="{y + 4:g}">{escape(text)}</text>')
    return parts


def mark(number: int, x: float, y: float) -> str:
    """A mark of a row: a color, and beyond the eighth row another shape."""
    color = color_of(number)
    if number < len(COLORS):
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{color}"/>'
    return f'<path fill="{color}" d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"/>'


def bar(number: int, across: float, above: float, below: float) -> str:
    """The standard error of a row."""
    return f'<path stroke="{color_of(number)}" stroke-width="2" d="M{across:.1f} {above:.1f}V{below:.1f}"/>'


def color_of(number: int) -> str:
    return COLORS[number % len(COLORS)]
