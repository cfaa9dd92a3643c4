"""The map of many rounds as an SVG: which worker held which block."""

from collections.abc import Sequence

from resist.report.aggregate import Holdings, map_rows
from resist.report.bitmap import data_uri, png
from resist.report.figures import block_ticks, round_ticks
from resist.report.plan_view import EDGE, LEGEND, drawing, legend_of, text_at


def map_svg(chains: Sequence[Holdings]) -> str:
    """The holders of each block in each round as an SVG: a map for each chain, with a column for each round.

    Args:
        chains: From `resist.report.aggregate.holdings_of`.
    """
    left, width = EDGE + 46, 2 * EDGE + 46 + max(max(420, min(900, 30 * len(chain.rounds))) for chain in chains)
    wide = width - EDGE - left
    workers = max(chain.workers for chain in chains)
    legend, lines = legend_of(workers, EDGE, width)
    parts, top = list(legend), EDGE + lines * LEGEND + 10
    for chain in chains:
        rows, palette, height = map_rows(chain)
        tall = max(len(rows), 12 * min(chain.blocks, 10))
        parts += [
            text_at(EDGE, top + 12, f"Which worker held which block of {chain.chain}", weight="bold"),
            f'<image x="{left}" y="{top + 24}" width="{wide}" height="{tall}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="{data_uri(png(rows, palette))}"/>',
        ]
        for place, text in block_ticks(chain.blocks, height):
            parts.append(text_at(left - 6, top + 28 + tall * (1 - place), text, "end", 11, "soft"))
        for place, text in round_ticks(chain.rounds):
            parts.append(text_at(left + wide * place, top + 40 + tall, text, "middle", 11, "soft"))
        parts.append(text_at(left + wide / 2, top + 58 + tall, "round", "middle", 11, "soft"))
        top += tall + 78
    return drawing("Which worker held which block", parts, width, top)
