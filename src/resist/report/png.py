"""The figures of a report as PNG, drawn by matplotlib, for Markdown, slides and papers."""

from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from resist.planning.methods import METHODS
from resist.report.aggregate import Holdings, holdings, map_rows, traffic
from resist.report.colors import PHASES, color_of
from resist.report.compare import labels
from resist.report.curves import Curves, curves_of
from resist.report.figures import COLUMNS, NUMBERED, block_ticks, round_ticks
from resist.report.tables import phases_of
from resist.report.units import bytes_unit, ends, means
from resist.runs.history import History

DPI = 150


def curves_png(histories: Sequence[History], names: Sequence[str]) -> bytes:
    """Accuracy and loss against steps, time and bytes, a line for each name.

    Args:
        histories: The runs.
        names: A name for each run; runs of one name are drawn as their mean and range.
    """
    figure = Figure(figsize=(11, 6), layout="constrained")
    _draw_curves(figure, figure.subplots(2, 3).flat, curves_of(histories, names))
    return _bytes(figure)


def draw_comparison(histories: Sequence[History], files: Sequence[Path]) -> None:
    """Draw accuracy against steps, time and bytes, a line for each label, with the range of its runs.

    Each strategy has its marker. Steps and time begin at 0; the axis of bytes is logarithmic, because strategies differ
    by orders of magnitude.

    Args:
        histories: The runs, named by `resist.report.compare.labels`.
        files: Where to save the figure; the endings (png, svg, pdf) choose the formats.
    """
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    steps, time, sent = figure.subplots(1, 3, sharey=True)
    names = labels(histories)
    markers = {n: METHODS[h.config.method.strategy].marker for n, h in zip(names, histories, strict=True)}
    _draw_curves(figure, (steps, time, sent), curves_of(histories, names)[:3], markers)
    steps.set_xlim(left=0)
    time.set_xlim(left=0)
    sent.set_xscale("log")
    for file in files:
        figure.savefig(file, dpi=200)


def run_png(history: History) -> bytes:
    """The partition map of each chain of a run, the traffic matrix, and the seconds of a round by phase."""
    chains = holdings(history)
    heights = [1.2 + 0.14 * min(chain.blocks, 40) for chain in chains]
    figure = Figure(figsize=(11, sum(heights) + 3.6), layout="constrained")
    grid = figure.add_gridspec(len(chains) + 1, 2, height_ratios=[*heights, 3.6])
    for row, chain in enumerate(chains):
        _draw_map(figure.add_subplot(grid[row, :]), chain)
    _draw_traffic(figure.add_subplot(grid[len(chains), 0]), history)
    _draw_seconds(figure.add_subplot(grid[len(chains), 1]), history)
    return _bytes(figure)


def _draw_curves(
    figure: Figure, all_axes: Iterable[Any], all_curves: Sequence[Curves], markers: Mapping[str, str] | None = None
) -> None:
    """Draw the plots with a legend; `markers` are those of the lines, by name; without them short lines have dots."""
    for axes, curves in zip(all_axes, all_curves, strict=True):
        for line in curves.series:
            marker = markers[line.name] if markers else "o" if line.marks or len(line.x) == 1 else ""
            if line.low:
                axes.fill_between(line.x, line.low, line.high, color=line.color, alpha=0.18, linewidth=0)
            axes.plot(line.x, line.y, color=line.color, marker=marker, markersize=3.5, linewidth=1.4, label=line.name)
        axes.locator_params(axis="x", nbins=5)
        if curves.log_x:
            axes.set_xscale("log")
        _tidy(axes, curves.title, curves.x_label, curves.y_label)
    handles, texts = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(texts, handles, strict=True))
    if len(unique) > 1:
        figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _draw_map(axes: Any, chain: Holdings) -> None:
    rows, palette, height = map_rows(chain)
    colors = np.array([[255, 255, 255], *(list(bytes.fromhex(color[1:])) for color in palette)], dtype=np.uint8)
    pixels = colors[np.array([list(row) for row in rows])]
    axes.imshow(pixels, aspect="auto", interpolation="nearest", extent=(0, 1, 0, 1))
    _tidy(axes, f"Which worker held which block of {chain.chain}", "round", "block")
    axes.set_xticks(*_places(round_ticks(chain.rounds)))
    axes.set_yticks(*_places(block_ticks(chain.blocks, height)))
    axes.grid(visible=False)
    patches = [Patch(color=color_of(worker), label=f"worker {worker}") for worker in range(min(chain.workers, 16))]
    axes.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def _draw_traffic(axes: Any, history: History) -> None:
    sent, _ = traffic(history)
    divisor, unit = bytes_unit(max(max(row) for row in sent) or 1)
    values = np.array(sent) / divisor
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1.6 * values.max() or 1)
    if len(sent) <= NUMBERED:
        for (source, target), value in np.ndenumerate(values):
            axes.text(target, source, f"{value:,.1f}" if value else "", ha="center", va="center", fontsize=8)
    workers = range(0, len(sent), -(-len(sent) // 16))
    axes.set_xticks(workers)
    axes.set_yticks(workers)
    _tidy(axes, f"Bytes from worker to worker, {unit}", "to worker", "from worker")
    axes.grid(visible=False)


def _draw_seconds(axes: Any, history: History) -> None:
    phases = [phase for phase in phases_of(history) if history.total(phase) > 0]
    rounds = ends([record["round"] for record in history.rounds], COLUMNS)
    below = np.zeros(len(rounds))
    for number, phase in enumerate(phases):
        values = np.array(means([record["seconds"].get(phase, 0.0) for record in history.rounds], COLUMNS))
        color = PHASES.get(phase, color_of(len(PHASES) + number))
        axes.bar(range(len(rounds)), values, bottom=below, width=1.0, color=color, label=phase)
        below += values
    _tidy(axes, "Seconds of a round by phase", "round", "s")
    places, texts = _places(round_ticks([int(last) for last in rounds]))
    axes.set_xticks([place * len(rounds) - 0.5 for place in places], texts)
    if phases:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def _places(ticks: Sequence[tuple[float, str]]) -> tuple[list[float], list[str]]:
    return [place for place, _ in ticks], [text for _, text in ticks]


def _tidy(axes: Any, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, fontsize=10, loc="left", parse_math=False)
    axes.set_xlabel(x_label, fontsize=9, parse_math=False)
    axes.set_ylabel(y_label, fontsize=9, parse_math=False)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _bytes(figure: Figure) -> bytes:
    file = BytesIO()
    figure.savefig(file, dpi=DPI, format="png")
    return file.getvalue()
