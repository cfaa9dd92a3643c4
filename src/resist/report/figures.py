"""The figures of a report as HTML: partition map, traffic matrix, seconds by phase, time and bytes of a step."""

from bisect import bisect_left
from collections.abc import Sequence
from html import escape
from typing import Any

from resist.report import tables
from resist.report.aggregate import Holdings, all_reduced, holdings, map_rows, traffic
from resist.report.bitmap import data_uri, png
from resist.report.colors import PHASES, color_of
from resist.report.compare import colors
from resist.report.svg import Series, Ticks, bars, figure, frame, legend, scroll, stacked_plot, svg
from resist.report.units import amount, bytes_unit, duration, ends, means, whole_ticks
from resist.runs.history import History

COLUMNS = 150  # the largest number of columns for all rounds
NUMBERED = 12  # workers up to which a matrix shows its numbers


def holdings_figures(history: History) -> list[str]:
    """The partition map of each chain, and the share of rounds in which each worker held each block."""
    return [figure for chain in holdings(history) for figure in (partition_map(chain), shares(chain))]


def partition_map(chain: Holdings) -> str:
    """The holders of each block in each round, as a picture with a column for each round."""
    rows, palette, height = map_rows(chain)
    picture = png(rows, palette)
    combinations: dict[tuple[int, ...], int] = {}
    cells = [[combinations.setdefault(workers, len(combinations)) for workers in column] for column in chain.holders]
    data = {
        "type": "map",
        "x": chain.rounds,
        "blocks": chain.blocks,
        "cells": cells,
        "combinations": list(combinations),
    }
    num = len(chain.rounds)
    x_ticks = round_ticks(chain.rounds)
    area = f'<img alt="{escape(_alt_text(chain))}" src="{data_uri(picture)}">'
    y_ticks = block_ticks(chain.blocks, height)
    inside = frame(area, x_ticks, y_ticks, "round", f"block of {chain.chain}", height=len(rows), data=data)
    note = "A block in several colors was held by several workers at once."
    if chain.every > 1:
        note += f" Every {chain.every}th round is shown."
    key = legend([(f"worker {worker}", color_of(worker)) for worker in range(chain.workers)])
    content = f'{key}<div style="max-width:{60 + max(160, 64 * num)}px">{inside}</div>'
    return figure(f"Which worker held which block of {chain.chain}", content, note=note, css_class="plot map")


def round_ticks(rounds: Sequence[int]) -> Ticks:
    """Round numbers at the middles of the columns that show them, or of the nearest columns."""
    num = 12 if len(rounds) <= 12 else 6
    nearest = {bisect_left(rounds, tick): tick for tick in [rounds[0], *whole_ticks(rounds[0], rounds[-1], num)]}
    close = [i for i in nearest if i and i < 0.07 * len(rounds)]  # too near to the first
    return [((i + 0.5) / len(rounds), str(tick)) for i, tick in nearest.items() if i not in close]


def _alt_text(chain: Holdings) -> str:
    return f"{chain.blocks} blocks in {len(chain.rounds)} rounds, colored by the workers that held them"


def block_ticks(blocks: int, height: int) -> Ticks:
    """Block numbers as far as there is room, block 0 at the top."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 500, 10**9) if s * height >= 14)
    return [(1 - (block + 0.5) / blocks, str(block)) for block in range(0, blocks, step)]


def shares(chain: Holdings) -> str:
    """Shares of rounds in which each worker held each block, as shades."""
    parts: list[str] = []
    shown = [share for row in chain.shares for share in row]
    for worker, row in enumerate(chain.shares):
        for block, share in enumerate(row):
            opacity = f"{share / max(shown):.2f}".rstrip("0").rstrip(".")
            parts.append(
                f'<rect x="{block}.04" y="{worker}.04" width=".92" height=".92" fill="{color_of(worker)}" '
                f'fill-opacity="{opacity}"><title>worker {worker}, block {block}: {share:.0%}</title></rect>'
            )
    pitch = max(8, min(18, 240 // chain.workers))
    y_step = -(-12 // pitch)
    y_ticks = [(1 - (w + 0.5) / chain.workers, str(w)) for w in range(0, chain.workers, y_step)]
    x_ticks = [((b + 0.5) / chain.blocks, str(b)) for b in whole_ticks(0, chain.blocks - 1, 10)]
    label = f"Shares of the rounds in which each of {chain.workers} workers held each of {chain.blocks} blocks"
    area = svg(parts, chain.blocks, chain.workers, label=label)
    inside = frame(area, x_ticks, y_ticks, f"block of {chain.chain}", "worker", height=pitch * chain.workers)
    note = f"The stronger the color, the more of the rounds; from {min(shown):.0%} to {max(shown):.0%}."
    content = f'<div style="max-width:{60 + 110 * chain.blocks}px">{inside}</div>'
    return figure("How often each worker held each block", content, note=note)


def matrix(history: History) -> str:
    """Traffic from worker to worker, as a table."""
    sent, mixed = traffic(history)
    most = max(max(row) for row in sent)
    note = f"By all-reduce, in addition: {amount(all_reduced(history))} sent by each worker."
    if mixed:
        note += " Includes the blocks that were sent to worker 0 to test the full network."
    if most == 0:
        content = '<p class="none">No block went from worker to worker; all traffic was all-reduce.</p>'
    else:
        divisor, unit = bytes_unit(most)
        content = heat_table(sent, divisor)
        note = f"{unit}; rows send, columns receive. {note}"
    return figure("Bytes from worker to worker", content, note=note, css_class="matrix")


def heat_table(sent: Sequence[Sequence[float]], divisor: float) -> str:
    """A table with shades; with many workers only the tooltips have the numbers."""
    most = max(max(row) for row in sent)
    numbered = len(sent) <= NUMBERED
    every = 1 if numbered else 5
    head = "".join(f'<th scope="col">{target if target % every == 0 else ""}</th>' for target in range(len(sent)))
    rows: list[str] = []
    for source, row in enumerate(sent):
        cells: list[str] = []
        for target, value in enumerate(row):
            share, text = value / most, f"{value / divisor:,.1f}" if value else ""
            title = f' title="{source} to {target}: {text or 0}"'
            style = f"background:rgba(var(--heat),{0.6 * share:.2f})"
            cells.append(f'<td class="cell"{title} style="{style}">{text if numbered else ""}</td>')
        rows.append(f'<tr><th scope="row">{source}</th>{"".join(cells)}</tr>')
    kind = "heat" if numbered else "heat dense"
    return scroll(
        f'<table class="{kind}"><thead><tr><th scope="col">from \\ to</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>",
        "Bytes from worker to worker",
    )


def wall_bar(history: History) -> str:
    """Parts of the wall clock of a run as one bar."""
    parts = tables.wall_parts(history)
    colored = [(part, seconds, PHASES.get(part, color_of(len(PHASES) + i))) for i, (part, seconds) in enumerate(parts)]
    total = duration(sum(seconds for _, seconds in parts))
    return bars(
        "Where the time went",
        [(tables.wall_name(history), colored, total)],
        note=" ".join(tables.tester_sentence(history)),
    )


def seconds_figure(history: History) -> str:
    """Seconds by phase in each round, stacked."""
    phases = tables.phases_of(history)
    values_of = [[record["seconds"].get(phase, 0.0) for record in history.rounds] for phase in phases]
    series = [
        Series(phase, PHASES.get(phase, color_of(len(PHASES) + i)), (), means(values, COLUMNS))
        for i, (phase, values) in enumerate(zip(phases, values_of, strict=True))
        if sum(values) > 0
    ]
    rounds = [int(last) for last in ends([record["round"] for record in history.rounds], COLUMNS)]
    every = -(-len(history.rounds) // COLUMNS)
    note = f"Means of {every} rounds each." if every > 1 else ""
    return stacked_plot("Seconds of a round by phase", "round", "s", rounds, round_ticks(rounds), series, note=note)


def step_bars(comparison: dict[str, Any]) -> list[str]:
    """Seconds and bytes of a step for each row of a comparison, as bars."""
    parts = (("compute", "compute"), ("wait", "wait"), ("exchange", "sync"))
    rows = comparison["rows"]
    seconds = [
        (row["label"], [(name, row[f"{name}_s_per_step"], PHASES[phase]) for name, phase in parts],
         duration(row["time_s_per_step"])) for row in rows
    ]  # fmt: skip
    of_name = colors([row["label"] for row in rows])
    sent = [
        (row["label"], [(row["label"], row["bytes_per_step"], of_name[row["label"]])], amount(row["bytes_per_step"]))
        for row in rows
    ]
    return [bars("Time of a step", seconds), bars("Sent by all workers in a step", sent)]
