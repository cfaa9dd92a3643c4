"""The partition as a picture: a strip for each round, a row for each worker, a square for each block that it holds."""

from typing import Any

# Eight hues that stay apart for colour-blind readers and on light and dark grounds; more workers use them again.
COLOURS = ("#3b7dd8", "#e08214", "#2a9d6f", "#c94f7c", "#8467c2", "#b8a11f", "#3ba7b5", "#8a6a4f")
SIZE, GAP, MARGIN, SHARED = 15, 3, 96, 74


def partition_svg(facts: dict[str, Any], chain: int = 0) -> str:
    """SVG of the plans in `facts` (see `resist.show.describe`) for one of its chains."""
    name, blocks = facts["chains"][chain]["name"], facts["chains"][chain]["blocks"]
    workers, pitch = len(facts["held_by_worker"]), SIZE + GAP
    strip = workers * pitch + 22
    left = MARGIN + SHARED + 8
    right = left + blocks * pitch + 5
    width, height = right + SHARED + 8, 46 + strip * len(facts["rounds"])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="system-ui, sans-serif" font-size="11">',
        f"<title>Who holds which block of {name}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        _text(MARGIN + SHARED / 2, 18, "shared", "middle"),
        _text(left + blocks * pitch / 2, 18, f"chain {name}: {blocks} blocks", "middle"),
        _text(right + SHARED / 2, 18, "shared", "middle"),
    ]
    parts += [_text(left + b * pitch + SIZE / 2, 34, str(b), "middle", 8) for b in range(blocks)]
    for number, of_round in enumerate(facts["rounds"]):
        top = 42 + number * strip
        parts.append(_text(8, top + workers * pitch / 2 + 2, f"round {number}"))
        for worker, held in enumerate(of_round[name]):
            y, colour = top + worker * pitch, COLOURS[worker % len(COLOURS)]
            parts.append(_text(MARGIN - 6, y + 12, f"{worker}", "end"))
            parts += [_square(x, y, SHARED, colour, 0.35) for x in (MARGIN, right)]
            parts.append(f'<path d="M{MARGIN + SHARED} {y + SIZE / 2}H{right}" stroke="{colour}" stroke-opacity=".5"/>')
            parts += [_square(left + block * pitch, y, SIZE, colour) for block in held]
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 11) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="#333333">{text}</text>'


def _square(x: float, y: float, width: int, colour: str, opacity: float = 1) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{SIZE}" rx="2" fill="{colour}" fill-opacity="{opacity}"/>'
