"""Accuracy against the number of workers and of local steps: a table, and docs/sizes.svg. Used by tables.py."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from accuracy_figure import HEIGHT, LEFT, TOP, WIDTH, bar, begin, color_of, grid, mark
from cifar10_rows import LOCAL, LOCAL_STEPS, RESIST, ROWS, WORKERS, Row
from page_parts import Record, table
from paired import by_row, difference, mean_and_error, score, share
from resist.report.svg import Axis

FIGURE_OF = "screen"  # the setting of the table and of docs/sizes.svg
METHODS = (RESIST, LOCAL)
QUANTITIES = {"S": ("workers", WORKERS, "workers, S"), "l": ("local_steps", LOCAL_STEPS, "local steps, l")}
GAP, BOTTOM = 60, 74  # around the panels, in pixels


def row_at(method: Row, quantity: str, value: int) -> Row | None:
    """Return the row of a method with another number of workers or local steps; None if there is none."""
    _, default, _ = QUANTITIES[quantity]
    return ROWS.get(method.name if value == default else f"{method.name}, {quantity} = {value}")


def values_of(quantity: str, runs: Mapping[str, Sequence[Record]]) -> list[int]:
    """Return the numbers of workers, or of local steps, for which both methods have runs."""
    attribute, _, _ = QUANTITIES[quantity]
    found = []
    for value in sorted({getattr(row, attribute) for row in ROWS.values()}):
        rows = [row_at(method, quantity, value) for method in METHODS]
        if all(row and row.name in runs for row in rows):
            found.append(value)
    return found


def size_table(runs: Sequence[Record], reading: str = "averaged") -> str:
    """Return the table of ResIST and local SGD with the same S and l, paired by seed; empty with one pair of rows.

    Args:
        runs: Recorded runs of one setting.
        reading: Source of BatchNorm statistics.
    """
    rows, cells = by_row(runs), []
    for quantity, (_, default, _) in QUANTITIES.items():
        for value in values_of(quantity, rows):
            if quantity == "l" and value == default:
                continue  # it is in the part of S
            ours, local = pairs(rows, quantity, value)
            results = [{run["seed"]: score(run, reading) for run in some} for some in (ours, local)]
            found = difference(*results)
            sizes = (value, LOCAL_STEPS) if quantity == "S" else (WORKERS, value)
            costs = [f"{share(ours, local, key):.2f}" for key in ("train_cpu_s", "bytes", "peak_bytes")]
            means = [f"{mean_and_error(list(some.values()))[0]:.2f}" for some in reversed(results)]
            cells.append([*sizes, ours[0]["rounds"], *means, *found.cells(), found.seeds, *costs])
    head = ["S", "l", "rounds", LOCAL.name, "ResIST", "difference", "95 % from", "pairs", "processor time", "bytes",
            "peak memory"]  # fmt: skip
    return table(head, cells) if len(cells) > 1 else ""


def at(quantity: str, value: int) -> list[Row]:
    """Return the rows of both methods."""
    return [row for method in METHODS if (row := row_at(method, quantity, value))]


def pairs(rows: Mapping[str, Sequence[Record]], quantity: str, value: int) -> list[list[Record]]:
    """Return the runs of both methods with the seeds that both have, so that means and differences agree."""
    both = [rows[row.name] for row in at(quantity, value)]
    seeds = set.intersection(*({run["seed"] for run in some} for some in both))
    return [[run for run in some if run["seed"] in seeds] for some in both]


def size_figure(runs: Sequence[Mapping[str, Any]], reading: str = "averaged") -> str:
    """Draw the accuracy of both methods against S and against l, with standard errors over the seeds of both.

    Args:
        runs: Recorded runs of one setting.
        reading: Source of BatchNorm statistics.

    Returns:
        An SVG document; empty if no quantity has two values.
    """
    rows = by_row(list(runs))
    panels = {
        quantity: {
            value: [mean_and_error([score(run, reading) for run in some]) for some in pairs(rows, quantity, value)]
            for value in values_of(quantity, rows)
        }
        for quantity in QUANTITIES
    }
    panels = {quantity: points for quantity, points in panels.items() if len(points) > 1}
    if not panels:
        return ""
    ends = [mean + sign * error for points in panels.values() for pair in points.values()
            for mean, error in pair for sign in (-1, 1)]  # fmt: skip
    margin = 0.08 * (max(ends) - min(ends)) or 1.0
    y = Axis(min(ends) - margin, max(ends) + margin)
    width, height = LEFT + len(panels) * (WIDTH + GAP), TOP + HEIGHT + BOTTOM
    parts = begin(
        width,
        height,
        "Test accuracy of ResIST and local SGD against S and l; bars: standard error over seeds",
        "Test accuracy, %, for equally many images of each worker",
    )
    for number, (quantity, points) in enumerate(panels.items()):
        parts += _panel(QUANTITIES[quantity][2], points, y, LEFT + number * (WIDTH + GAP))
    for number, method in enumerate(METHODS):
        x = 24 + number * width / 2
        parts += [mark(number, x, height - 16), f'<text x="{x + 10:g}" y="{height - 12}">{escape(method.name)}</text>']
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(title: str, points: Mapping[int, Sequence[tuple[float, float]]], y: Axis, left: float) -> list[str]:
    x = Axis(min(points) / 1.3, 1.3 * max(points), log=True)
    parts = [f'<text x="{left + WIDTH / 2:g}" y="{TOP + HEIGHT + 36}" text-anchor="middle">{escape(title)}</text>']
    parts += grid(y, left)
    for value in points:
        across = left + WIDTH * x.place(value)
        parts.append(f'<text class="soft" x="{across:.1f}" y="{TOP + HEIGHT + 18}" text-anchor="middle">{value}</text>')
    for number in range(len(METHODS)):
        places = []
        for value, pair in points.items():
            across = left + WIDTH * x.place(value) + 3 * (2 * number - 1)  # beside each other, so that bars are seen
            mean, error = pair[number]
            middle, above, below = (TOP + HEIGHT * (1 - y.place(mean + sign * error)) for sign in (0, 1, -1))
            parts += [bar(number, across, above, below), mark(number, across, middle)]
            places.append(f"{across:.1f} {middle:.1f}")
        parts.append(f'<path fill="none" stroke="{color_of(number)}" d="M{"L".join(places)}"/>')
    return parts
