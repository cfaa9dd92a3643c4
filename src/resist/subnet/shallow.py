"""Notes on sub-networks: what to add to an exception of their forward, and what nobody has checked."""

import logging
import sys
from functools import cache
from typing import Any

from torch import nn

from resist.subnet.modules import hook_tables
from resist.subnet.network import Subnet

log = logging.getLogger(__name__)


class NoteShallow:
    """Forward hook that adds a note to an exception of a sub-network: it is shallower than the network.

    Torch calls it after an exception too, while that is being handled. It is a class, so that the model can be pickled.

    Args:
        note: The text.
    """

    def __init__(self, note: str) -> None:
        self.note = note

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        if output is not None:
            return
        error = sys.exc_info()[1]
        if error is not None and self.note not in getattr(error, "__notes__", ()):
            error.add_note(self.note)


def note_shallow(subnet: Subnet, worker: int) -> None:
    """Let exceptions of a sub-network say that it is one, if it is shallower than the network.

    Args:
        subnet: The sub-network. It gets a hook.
        worker: Number of its worker.
    """
    held = zip(subnet.chains, subnet.capacities, strict=True)
    parts = [f"{capacity} of {chain.num_blocks} blocks of {chain.name}" for chain, capacity in held]
    if any(capacity < chain.num_blocks for chain, capacity in zip(subnet.chains, subnet.capacities, strict=True)):
        note = (
            f"note: this is the sub-network of worker {worker}, with {' and '.join(parts)} at the start; a network "
            "that depends on the number or the position of its blocks cannot be trained like this. "
            "resist.Job(..., example=batch) finds out before training, and names the reason"
        )
        subnet.model.register_forward_hook(NoteShallow(note), always_call=True)


def forget_shallow(model: nn.Module) -> None:
    """Remove the hook of `note_shallow` from a copy of a sub-network.

    Args:
        model: The copy, changed in place.
    """
    tables = hook_tables(model)
    for key in [key for key, hook in tables[0].items() if isinstance(hook, NoteShallow)]:
        for table in tables:
            table.pop(key, None)


@cache
def note_unchecked() -> None:
    """Log once what a job without an example has not checked."""
    log.warning(
        "resist: without an example, blocks were tried with guessed inputs, and whether sub-networks compute what the "
        "network computes without the other blocks was not checked; give Job one batch, example=batch, to check it in "
        "seconds"
    )
