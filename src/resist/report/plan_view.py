"""A plan for people: as text on a terminal, and as an SVG, a square for each block of each worker's sub-network."""

from collections.abc import Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resist.report.colors import color_of


def print_plan(facts: dict[str, Any], console: Console) -> None:
    """The same for people: each round is a row of blocks, each block marked with the workers that hold it."""
    table = Table.grid(padding=(0, 3), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("parameters", f"{facts['parameters']:,}")
    table.add_row("shared by all workers", f"{facts['shared']:,}")
    for chain in facts["chains"]:
        each = f"{chain['blocks']} blocks of {chain['parameters_of_a_block']:,}"
        table.add_row(f"chain {chain['name']}", each)
        table.add_row("  blocks held by each worker", " ".join(map(str, chain["capacities"])))
        if chain["attributes_that_differ"]:
            table.add_row("  goes with each block", " ".join(chain["attributes_that_differ"]))
    share = " ".join(f"{held / facts['parameters']:.0%}" for held in facts["held_by_worker"])
    table.add_row("a worker's share of the network", share)
    if facts["other_chains"]:
        table.add_row("not partitioned, could be", " ".join(facts["other_chains"]) + "  (name chains with --chain)")
    console.print(table)
    for chain in facts["chains"]:
        if chain["caveat"]:
            console.print(f"\nnote: {chain['caveat']}")
    for chain in facts["chains"]:
        console.print(f"\nWho holds which block of {chain['name']}")
        rounds = [of_round[chain["name"]] for of_round in facts["rounds"]]
        for line in partition_lines(chain["blocks"], rounds, console.width, utf8=console.encoding.startswith("utf")):
            console.print(line)


LABEL_COLUMNS, SHARED_COLUMNS = 21, 2


def partition_lines(
    num_blocks: int, rounds: Sequence[Sequence[Sequence[int]]], width: int, *, utf8: bool = True
) -> list[Text]:
    """The sub-network of each worker in each round as a line: shared parts at both ends, its blocks, the way past the
    others'.

    Where blocks do not fit into `width` columns, they go on in a further part below.
    """
    held_mark, way, shared = ("■", "─", "━") if utf8 else ("#", "-", "=")
    room = max(8, width - LABEL_COLUMNS - 2 * SHARED_COLUMNS - 1)
    pitch = 2 if 2 * num_blocks <= room else 1
    lines: list[Text] = []
    for first in range(0, num_blocks, room // pitch):
        part = range(first, min(num_blocks, first + room // pitch))
        lines += [Text()] if first else []
        for digit in range(len(str(num_blocks - 1)), 0, -1):  # numbers stand upright
            digits = (str(block)[-digit] if len(str(block)) >= digit else " " for block in part)
            lines.append(
                Text(" " * (LABEL_COLUMNS + SHARED_COLUMNS + pitch - 1) + (" " * (pitch - 1)).join(digits), style="dim")
            )
        for number, workers in enumerate(rounds):
            for worker, held in enumerate(workers):
                label = f"round {number}" if worker == 0 else ""
                text = Text(f"{label:<10}{f'worker {worker}':<11}")
                marks = "".join(way * (pitch - 1) + (held_mark if block in held else way) for block in part)
                text.append(
                    shared * SHARED_COLUMNS + marks + way * (pitch - 1) + shared * SHARED_COLUMNS,
                    style=color_of(worker),
                )
                lines.append(text)
    return lines


SIZE, GAP = 15, 4  # of a block, and to the next
LABELS, SHARED, EDGE = 138, 62, 14  # widths: of the labels on the left, of a shared part, of the margin
HEAD, LEGEND = 66, 20  # heights: of a chain's title with the network below it, of a line of the legend

# Follows the reader's light or dark mode, also where it is embedded as an image.
STYLE = (
    "text{fill:#24292f}.soft{fill:#57606a}.ground{fill:#ffffff}.whole{fill:#8d949e}.path{stroke-opacity:.55}"
    "@media(prefers-color-scheme:dark){text{fill:#e4e8ee}.soft{fill:#a2abb8}.ground{fill:#14171c}}"
)


def partition_svg(facts: dict[str, Any]) -> str:
    """SVG of the plans in `facts` (see `resist.cli.plan.describe`), a drawing
    for each of its chains and a legend."""
    workers, pitch = len(facts["held_by_worker"]), SIZE + GAP
    most = max(chain["blocks"] for chain in facts["chains"])
    width = LABELS + 2 * SHARED + most * pitch + 2 * EDGE
    parts: list[str] = []
    top = EDGE
    for chain in facts["chains"]:
        rounds = [of_round[chain["name"]] for of_round in facts["rounds"]]
        parts += _chain(chain["name"], chain["blocks"], rounds, top)
        top += HEAD + len(rounds) * (workers * pitch + 14) + 10
    legend, lines = _legend(workers, top, width)
    height = top + lines * LEGEND + EDGE
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12">',
        "<title>Who holds which block</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}"/>',
        *parts, *legend, "</svg>", "",
    ])  # fmt: skip


def _chain(name: str, blocks: int, rounds: Sequence[Sequence[Sequence[int]]], top: int) -> list[str]:
    """The whole network, and the sub-networks of each round."""
    pitch, left, first = SIZE + GAP, EDGE + LABELS, EDGE + LABELS + SHARED + GAP
    step = next(s for s in (1, 5, 10) if s * pitch >= 7 * len(str(blocks - 1)) + 4)
    parts = [_text(EDGE, top + 12, f"{blocks} blocks of {name}", weight="bold")]
    for block in range(0, blocks, step):
        parts.append(_text(first + block * pitch + SIZE / 2, top + 32, str(block), "middle", 10, "soft"))
    parts += [_text(EDGE, top + 50, "the network"), *_network(left, top + 38, blocks, range(blocks), None)]
    y = top + HEAD
    for number, workers in enumerate(rounds):
        parts.append(_text(EDGE, y + 12, f"round {number}"))
        for worker, held in enumerate(workers):
            parts.append(_text(left - 8, y + 12, f"worker {worker}", "end", 12, "soft"))
            parts += _network(left, y, blocks, held, color_of(worker))
            y += pitch
        y += 14
    return parts


def _network(x: float, y: float, blocks: int, held: Sequence[int], color: str | None) -> list[str]:
    """The shared parts at both ends, the blocks that are held, and the way through them; gray without a color."""
    pitch = SIZE + GAP
    end = x + SHARED + GAP + blocks * pitch
    fill = 'class="whole"' if color is None else f'fill="{color}"'
    stroke = "#8d949e" if color is None else color
    line = f'<path class="path" d="M{x + SHARED} {y + SIZE / 2}H{end}" stroke="{stroke}" stroke-width="1.5"/>'
    ends = [
        f'<rect x="{at}" y="{y}" width="{SHARED}" height="{SIZE}" rx="3" {fill} fill-opacity=".4"/>' for at in (x, end)
    ]
    places = [x + SHARED + GAP + block * pitch for block in held]
    return [
        line, *ends, *(f'<rect x="{at}" y="{y}" width="{SIZE}" height="{SIZE}" rx="2" {fill}/>' for at in places)
    ]  # fmt: skip


def _legend(workers: int, top: float, width: float) -> tuple[list[str], int]:
    """(elements, lines)"""
    entries = [(color_of(worker), 1.0, SIZE, f"worker {worker}") for worker in range(workers)]
    entries.append(("#8d949e", 0.4, 26, "shared: every worker trains it, and it is averaged"))
    parts: list[str] = []
    x, line = float(EDGE), 0
    for color, opacity, wide, text in entries:
        room = wide + 6 + 6.4 * len(text) + 18
        if x + room > width and x > EDGE:
            x, line = float(EDGE), line + 1
        y = top + line * LEGEND
        parts.append(
            f'<rect x="{x:g}" y="{y}" width="{wide}" height="{SIZE}" rx="2" fill="{color}" fill-opacity="{opacity}"/>'
        )
        parts.append(_text(x + wide + 6, y + 12, text))
        x += room
    return parts, line + 1


def _text(
    x: float, y: float, text: str, anchor: str = "start", size: int = 12, kind: str = "", weight: str = "normal"
) -> str:
    more = f' class="{kind}"' if kind else ""
    more += f' font-weight="{weight}"' if weight != "normal" else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{more}>{escape(text)}</text>'
