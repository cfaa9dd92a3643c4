"""Networks by name. `build(name, ...)` gives what the command line trains."""

from collections.abc import Sequence

from resist.errors import UserError
from resist.models.preact import DEPTHS, PreActResNet

__all__ = ["MODELS", "PreActResNet", "build"]

MODELS = tuple(DEPTHS)


def build(
    name: str, *, num_classes: int, in_channels: int = 3, sections: Sequence[int] = (), width: int = 64,
    final_norm: bool = False,
) -> PreActResNet:
    """The network `name`; `sections` replaces its numbers of blocks. Raises UserError for what cannot be built."""
    if name not in DEPTHS:
        raise UserError(f"model={name!r} is not known; choose one of {', '.join(MODELS)}")
    if sections and (len(sections) != 4 or min(sections) < 1):
        raise UserError(f"sections={','.join(map(str, sections))} is not four numbers of blocks, each at least 1")
    if width < 1 or num_classes < 1:
        raise UserError(f"width={width} and num_classes={num_classes} have to be at least 1")
    return PreActResNet(
        tuple(sections) or DEPTHS[name], num_classes, width=width, in_channels=in_channels, final_norm=final_norm
    )
