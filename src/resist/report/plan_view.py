"""The plans of a few rounds, as text for the terminal and as an SVG.

A plan's description is a dict, ready for JSON (see `resist.cli.plan.describe`). Rounds are numbered from 1.
"""

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resist.report.colors import color_of
from resist.report.units import amount


def print_plan(description: dict[str, Any], console: Console) -> None:
    """Print a description: counts, then the blocks of each worker in each round."""
    table = Table.grid(padding=(0, 3), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("parameters", f"{description['parameters']:,}")
    table.add_row("shared by all workers", f"{description['shared']:,}")
    for chain in description["chains"]:
        each = f"{chain['blocks']} blocks of {chain['parameters_of_a_block']:,}"
        table.add_row(f"chain {chain['name']}", each)
        table.add_row("  blocks held by each worker", " ".join(map(str, chain["capacities"])))
        before = chain["capacities"]
        for change in description["changes"]:
            if (capacities := change["capacities"][chain["name"]]) != before:
                table.add_row(f"    after {change['after_rounds']} rounds", " ".join(map(str, capacities)))
            before = capacities
        if chain["attributes_that_differ"]:
            table.add_row("  moves with each block", " ".join(chain["attributes_that_differ"]))
    for change in ({"after_rounds": 0, **description}, *description["changes"]):
        share = " ".join(f"{held / description['parameters']:.0%}" for held in change["held_by_worker"])
        rounds = change["after_rounds"]
        table.add_row(f"  after {rounds} rounds" if rounds else "a worker's share of the network", share)
    if description["other_chains"]:
        others = " ".join(description["other_chains"])
        table.add_row("not partitioned, could be", others)
    for label, text in _sent(description):
        table.add_row(label, text)
    console.print(table)
    for note in (*description["notes"], *(chain["caveat"] for chain in description["chains"])):
        if note:
            console.print(f"\nnote: {note}")
    for chain in description["chains"]:
        console.print(f"\nWhich worker holds which block of {chain['name']}")
        rounds = plans_of(description, chain["name"])
        for line in partition_lines(chain["blocks"], rounds, console.width, utf8=console.encoding.startswith("utf")):
            console.print(line)


def _sent(description: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines on what is sent of the weights; none for a strategy that averages gradients in every step."""
    wire = description.get("wire")
    if wire is None:
        return []
    total: Counter[str] = Counter()
    for entry in wire["sent"]:
        total.update(entry["bytes"])
    rounds = len(wire["sent"])
    sent = [f"{amount(total[part] / rounds)} {part}" for part in ("shared", "blocks", "replica") if total[part]]
    return [
        (f"weights sent by all, mean of {rounds} round{'s' * (rounds != 1)}", " + ".join(sent) or "none"),
        ("  wire format", ", ".join(f"{part} {wire['formats'][part]}" for part in ("shared", "blocks"))),
        *(
            (f"  a block of {chain}", f"{amount(num_bytes)} on the wire")
            for chain, num_bytes in wire["bytes_of_a_block"].items()
        ),
    ]


def plans_of(description: dict[str, Any], chain: str) -> list[Sequence[Sequence[int]]]:
    """plans[round][worker]: the blocks of `chain` that the worker holds."""
    return [entry["plan"][chain] for entry in description["rounds"]]


def block_row(held: Container[int], blocks: Iterable[int], *, pitch: int = 1, utf8: bool = True) -> str:
    """The blocks of one worker as text: a mark for each block that it holds, a line past the others.

    Args:
        held: The blocks that the worker holds.
        blocks: The blocks to show.
        pitch: Columns for each block.
        utf8: Use box drawing characters instead of ASCII.
    """
    mark, line = ("■", "─") if utf8 else ("#", "-")
    return "".join(line * (pitch - 1) + (mark if block in held else line) for block in blocks)


LABEL_COLUMNS, SHARED_COLUMNS = 21, 2


def partition_lines(
    num_blocks: int, rounds: Sequence[Sequence[Sequence[int]]], width: int, *, utf8: bool = True, first_round: int = 1
) -> list[Text]:
    """The sub-network of each worker in each round as a line, the shared parts at both ends.

    Args:
        num_blocks: Blocks of the chain. Those that do not fit continue in another part below.
        rounds: rounds[round][worker]: the blocks that the worker holds.
        width: Columns of the terminal.
        utf8: Use box drawing characters instead of ASCII.
        first_round: Number of the first round.
    """
    line, shared = ("─", "━") if utf8 else ("-", "=")
    room = max(8, width - LABEL_COLUMNS - 2 * SHARED_COLUMNS - 1)
    pitch = 2 if 2 * num_blocks <= room else 1
    lines: list[Text] = []
    for first in range(0, num_blocks, room // pitch):
        part = range(first, min(num_blocks, first + room // pitch))
        lines += [Text()] if first else []
        for digit in range(len(str(num_blocks - 1)), 0, -1):  # block numbers stand upright
            digits = (str(block)[-digit] if len(str(block)) >= digit else " " for block in part)
            indent = " " * (LABEL_COLUMNS + SHARED_COLUMNS + pitch - 1)
            lines.append(Text(indent + (" " * (pitch - 1)).join(digits), style="dim"))
        for number, workers in enumerate(rounds, start=first_round):
            for worker, held in enumerate(workers):
                label = f"round {number}" if worker == 0 else ""
                text = Text(f"{label:<10}{f'worker {worker}':<11}")
                marks = block_row(held, part, pitch=pitch, utf8=utf8) + line * (pitch - 1)
                text.append(shared * SHARED_COLUMNS + marks + shared * SHARED_COLUMNS, style=color_of(worker))
                lines.append(text)
    return lines


SIZE, GAP = 15, 4  # of a block, and to the next
LABELS, SHARED, EDGE = 138, 62, 14  # widths: of the labels on the left, of a shared part, of the margin
HEAD, LEGEND = 66, 20  # heights: of a chain's title with the network below it, of a line of the legend

# Follows the light or dark mode of the browser, also where it is embedded as an image. The names keep to the drawing
# where it is part of a page, as in a notebook.
STYLE = (
    ".resist-plan text{fill:#24292f}.resist-plan .soft{fill:#57606a}.resist-plan .ground{fill:#ffffff}"
    ".resist-plan .whole{fill:#8d949e}.resist-plan .path{stroke-opacity:.55}"
    "@media(prefers-color-scheme:dark){.resist-plan text{fill:#e4e8ee}.resist-plan .soft{fill:#a2abb8}"
    ".resist-plan .ground{fill:#14171c}}"
)


def partition_svg(description: dict[str, Any]) -> str:
    """The plans of a description as an SVG: a drawing for each of its chains, and a legend."""
    workers, pitch = len(description["held_by_worker"]), SIZE + GAP
    most = max(chain["blocks"] for chain in description["chains"])
    width = LABELS + 2 * SHARED + most * pitch + 2 * EDGE
    parts: list[str] = []
    top = EDGE
    for chain in description["chains"]:
        rounds = plans_of(description, chain["name"])
        parts += _chain(chain["name"], chain["blocks"], rounds, description["rounds"][0]["round"], top)
        top += HEAD + len(rounds) * (workers * pitch + 14) + 10
    shared = ("#8d949e", 0.4, 26, "shared: every worker trains it, and it is averaged")
    legend, lines = legend_of(workers, top, width, shared)
    return drawing("Which worker holds which block", [*parts, *legend], width, top + lines * LEGEND + EDGE)


def drawing(title: str, parts: Sequence[str], width: float, height: float) -> str:
    """An SVG file of these elements."""
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="resist-plan" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{escape(title)}</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="ground" width="{width}" height="{height}"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _chain(name: str, blocks: int, rounds: Sequence[Sequence[Sequence[int]]], first_round: int, top: int) -> list[str]:
    """The whole network, and the sub-networks of each round."""
    pitch, left, first = SIZE + GAP, EDGE + LABELS, EDGE + LABELS + SHARED + GAP
    step = next(s for s in (1, 5, 10) if s * pitch >= 7 * len(str(blocks - 1)) + 4)
    parts = [text_at(EDGE, top + 12, f"{blocks} blocks of {name}", weight="bold")]
    for block in range(0, blocks, step):
        parts.append(text_at(first + block * pitch + SIZE / 2, top + 32, str(block), "middle", 10, "soft"))
    parts += [text_at(EDGE, top + 50, "the network"), *_network(left, top + 38, blocks, range(blocks), None)]
    y = top + HEAD
    for number, workers in enumerate(rounds, start=first_round):
        parts.append(text_at(EDGE, y + 12, f"round {number}"))
        for worker, held in enumerate(workers):
            parts.append(text_at(left - 8, y + 12, f"worker {worker}", "end", 12, "soft"))
            parts += _network(left, y, blocks, held, color_of(worker))
            y += pitch
        y += 14
    return parts


def _network(x: float, y: float, blocks: int, held: Sequence[int], color: str | None) -> list[str]:
    """The shared parts at both ends, the blocks that are held, and the path through them; gray without a color."""
    pitch = SIZE + GAP
    end = x + SHARED + GAP + blocks * pitch
    fill = 'class="whole"' if color is None else f'fill="{color}"'
    stroke = "#8d949e" if color is None else color
    line = f'<path class="path" d="M{x + SHARED} {y + SIZE / 2}H{end}" stroke="{stroke}" stroke-width="1.5"/>'
    ends = [
        f'<rect x="{at}" y="{y}" width="{SHARED}" height="{SIZE}" rx="3" {fill} fill-opacity=".4"/>' for at in (x, end)
    ]
    places = [x + SHARED + GAP + block * pitch for block in held]
    squares = [f'<rect x="{at}" y="{y}" width="{SIZE}" height="{SIZE}" rx="2" {fill}/>' for at in places]
    return [line, *ends, *squares]


def legend_of(workers: int, top: float, width: float, *more: tuple[str, float, int, str]) -> tuple[list[str], int]:
    """The elements, and the number of lines that they take. `more`: color, opacity, width and text of each."""
    entries = [*((color_of(worker), 1.0, SIZE, f"worker {worker}") for worker in range(workers)), *more]
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
        parts.append(text_at(x + wide + 6, y + 12, text))
        x += room
    return parts, line + 1


def text_at(
    x: float, y: float, text: str, anchor: str = "start", size: int = 12, css_class: str = "", weight: str = "normal"
) -> str:
    """A line of text."""
    extra = f' class="{css_class}"' if css_class else ""
    extra += f' font-weight="{weight}"' if weight != "normal" else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{extra}>{escape(text)}</text>'
