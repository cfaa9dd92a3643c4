"""Colors of workers, strategies and phases, the same on the terminal, in drawings and in reports."""

import colorsys

from resist.planning.methods import METHODS

# Eight hues that color-blind readers can distinguish, on light and dark backgrounds.
COLORS = ("#3b7dd8", "#e08214", "#2a9d6f", "#c94f7c", "#8467c2", "#b8a11f", "#3ba7b5", "#8a6a4f")
STRATEGIES = dict(zip(METHODS, COLORS, strict=False))
PHASES = {"compute": "#3b7dd8", "wait": "#b8a11f", "sync": "#c94f7c", "checkpoint": "#8467c2", "evaluate": "#8d949e"}


def color_of(index: int) -> str:
    """Color of worker `index` as #rrggbb. After the eight of the table, hues a golden angle apart, all different."""
    if index < len(COLORS):
        return COLORS[index]
    red, green, blue = colorsys.hls_to_rgb((0.06 + 0.381966 * index) % 1, 0.5 if index % 2 else 0.62, 0.5)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"
