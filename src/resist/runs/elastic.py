"""Elastic runs: the bounds of the number of processes, and what cannot be combined with them."""

from dataclasses import replace
from typing import TYPE_CHECKING

from resist.errors import UserError
from resist.planning.generations import Bounds
from resist.runs.bounds import LARGEST

if TYPE_CHECKING:
    from resist.runs.config import TrainConfig


def bounds_of(text: str) -> Bounds:
    """Read the bounds of the number of processes.

    Args:
        text: As in "2:8".

    Raises:
        UserError: It has another form.
    """
    least, colon, most = text.partition(":")
    if not (colon and all(number.isascii() and number.isdecimal() and len(number) < 9 for number in (least, most))):
        raise UserError(f"`elastic={text}` is not LEAST:MOST, as in 2:8; give the fewest and the most processes")
    if not 1 <= int(least) <= int(most) <= LARGEST["workers"]:
        raise UserError(
            f"`elastic={text}`: the fewest processes must be 1 or more, and the most not fewer, up to "
            f"{LARGEST['workers']}; give them as in 2:8"
        )
    return Bounds(int(least), int(most))


def check_elastic(config: "TrainConfig") -> None:
    """Raise UserError where the processes of a run cannot come and go as its options say."""
    text, method, machine = config.machine.elastic, config.method, config.machine
    if text is None:
        return
    bounds = bounds_of(text)
    if not bounds.least <= method.workers <= (bounds.most or 0):
        raise UserError(
            f"`workers={method.workers}` is outside of `elastic={text}`: the run begins with so many processes, one "
            f"worker each; give {bounds.least} to {bounds.most}"
        )
    if machine.processes is not None:
        raise UserError(
            f"`processes={machine.processes}` cannot be given with `elastic`, where each process trains one worker; "
            "remove it"
        )
    if any(stage.every_step for stage in config.strategy().stages):
        raise UserError(
            f"`strategy={method.strategy}` joins the workers in every step and cannot go on with others; remove "
            "`elastic`"
        )
    if machine.backend == "nccl":
        raise UserError("`backend=nccl` cannot be used with `elastic`: weights go by gloo; remove it")
    for name in ("fragments", "capacities"):
        if getattr(method, name) == "auto":
            raise UserError(
                f"`{name}=auto` is chosen from the times of earlier rounds, which a worker that joins does not know; "
                "give numbers, or remove `elastic`"
            )


def at_size(config: "TrainConfig", workers: int) -> "TrainConfig":
    """Return the options of a run that goes on with another number of workers, and the same number of images in all.

    Args:
        config: The options.
        workers: Number of workers.
    """
    epochs = config.optimization.epochs * config.method.workers / workers
    return replace(
        config,
        method=replace(config.method, workers=workers),
        optimization=replace(config.optimization, epochs=epochs),
    )
