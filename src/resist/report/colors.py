"""Colors of workers, strategies and phases, the same on the terminal, in drawings and in reports."""

import colorsys

from resist.planning.methods import METHODS

# Eight colors, all lighter than black and darker than white. Any two of them differ by at least 18 in CIELAB as readers
# without red, green or blue receptors see them.
COLORS = ("#3b7dd8", "#e08214", "#18752e", "#ce70b5", "#553df9", "#f24152", "#b32563", "#a624a5")
STRATEGIES = dict(zip(METHODS, COLORS, strict=False))
PHASES = {
    "start-up": COLORS[5],
    "compute": COLORS[0],
    "wait": COLORS[1],
    "sync": COLORS[2],
    "checkpoint": COLORS[4],
    "evaluate": "#8d949e",
}


def color_of(index: int) -> str:
    """Color of worker `index` as #rrggbb. After the eight of the table, hues a golden angle apart, all different."""
    if index < len(COLORS):
        return COLORS[index]
    red, green, blue = colorsys.hls_to_rgb((0.06 + 0.381966 * index) % 1, 0.5 if index % 2 else 0.62, 0.5)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
