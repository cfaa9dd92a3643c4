"""Training methods by name: the table of the strategies' constructors."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from resist.errors import UserError
from resist.planning.strategy import Strategy, ddp, diloco, local_sgd, resist


@dataclass(frozen=True)
class Method:
    """Entry of `METHODS`: constructor and appearance in reports.

    Attributes:
        build: The constructor, called with the numbers of workers and of local steps, and options.
        label: Name in sentences.
        marker: Marker of its points in figures, as in matplotlib.
    """

    build: Callable[..., Strategy]
    label: str
    marker: str

    @property
    def name(self) -> str:
        """Name on the command line and in files: that of the constructor."""
        return self.build.__name__

    @cached_property
    def options(self) -> frozenset[str]:
        """Names of the constructor's arguments; other options have no effect."""
        return frozenset(inspect.signature(self.build).parameters)


# All methods by name; `switch` combines their strategies. Their order is that of the colors in reports.
METHODS = {
    method.name: method
    for method in (
        Method(resist, "ResIST", "o"),
        Method(local_sgd, "local SGD", "s"),
        Method(diloco, "DiLoCo", "^"),
        Method(ddp, "DDP", "D"),
    )
}
# The default method, and the one that speed-ups are relative to.
DEFAULT, BASELINE = resist.__name__, local_sgd.__name__


def build_strategy(name: str, workers: int, local_steps: int, **options: object) -> Strategy:
    """Build the strategy of a method by its name.

    Args:
        name: A key of `METHODS`.
        workers: Number of workers.
        local_steps: Optimizer steps between two synchronizations.
        **options: Arguments of the constructors. Those that this constructor does not take are left out.

    Returns:
        The strategy.

    Raises:
        UserError: If the name is unknown or an argument is out of range.
    """
    if name not in METHODS:
        raise UserError(f"strategy {name!r} is not one of {', '.join(METHODS)}")
    method = METHODS[name]
    return method.build(workers, local_steps, **{key: options[key] for key in options.keys() & method.options})
