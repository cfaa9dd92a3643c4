"""Options of a job: the values that they may have, and combinations that are refused."""

import logging

import torch

from resist.errors import UserError
from resist.planning.strategy import Strategy
from resist.planning.wire import Wire
from resist.subnet.batchnorm import BATCHNORMS
from resist.subnet.network import Subnet
from resist.sync.optimizer_state import OPTIMIZER_STATES

NONFINITE = ("stop", "drop")

log = logging.getLogger(__name__)


def check_options(
    strategy: Strategy, *, batchnorm: str, on_nonfinite: str, replicate: bool, wire: Wire | None = None
) -> None:
    """Check options of `Job`.

    Args:
        strategy: As in `Job`, with all strategies that it switches to.
        batchnorm: As in `Job`.
        on_nonfinite: As in `Job`.
        replicate: As in `Job`.
        wire: As in `Job`. Default: nothing is compressed.

    Raises:
        UserError: If an option has no such value, or two options contradict each other.
    """
    if not isinstance(strategy, Strategy):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"strategy={strategy!r} is not a Strategy; give one, as in resist.resist(workers=4)")
    _check_choice("batchnorm", batchnorm, BATCHNORMS)
    for stage in strategy.stages:
        _check_choice("optimizer_state", stage.optimizer_state, OPTIMIZER_STATES)
    _check_choice("on_nonfinite", on_nonfinite, NONFINITE)
    strategy.check_round_options(replicate=replicate, on_nonfinite=on_nonfinite, wire=wire or Wire())


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"`{name}={value!r}` is not one of {', '.join(choices)}")


def note_wire(wire: Wire, subnet: Subnet) -> None:
    """Log where a wire format, or fragments, change nothing.

    Args:
        wire: As in `Job`.
        subnet: The sub-network of any worker.
    """
    layout = subnet.layouts.get(torch.float32)
    if wire != Wire() and (layout is None or not layout.ranges(blocks=True)):
        log.warning(
            "`wire` has no effect on the weights: only those in float32 that train are encoded or cut into "
            "fragments, and this network has none"
        )
