"""Networks without an example: a note of what was not checked, and a hint where a sub-network then fails."""

import logging
import sys
from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import nn

from resist.blocks.chain import Chain

log = logging.getLogger(__name__)


@cache
def note_unchecked() -> None:
    """Log once what a job without an example has not checked."""
    log.warning(
        "resist: without an example, blocks were tried with guessed inputs, and whether sub-networks compute what the "
        "network computes without the other blocks was not checked; give Job one batch, example=batch, to check it in "
        "seconds"
    )


class DepthHint:
    """Forward hook that adds a hint to an exception: the network of a worker is shallower than the whole one.

    It does nothing in compiled code. This is a class and not a closure, so that the network can be pickled.

    Args:
        chains: The chains that are partitioned.
    """

    def __init__(self, chains: Sequence[Chain]) -> None:
        of = " and of ".join(f"the {chain.num_blocks} blocks of chain {chain.name}" for chain in chains)
        self.text = (
            f"This is the network of a worker, which holds only some of {of}. If the whole network takes this batch, "
            "it depends on its number of blocks: give Job one batch, example=batch, which keeps blocks at their "
            "places where that is right, or partition another chain."
        )

    def __call__(self, _module: nn.Module, _args: object, output: object) -> None:
        if not torch.compiler.is_compiling() and output is None and isinstance(error := sys.exc_info()[1], Exception):
            error.add_note(self.text)


def add_depth_hints(models: Iterable[nn.Module], chains: Sequence[Chain]) -> None:
    """Let the exceptions of sub-networks say that they are shallower.

    Args:
        models: Sub-networks. Each gets a hook, which is called where its forward raises.
        chains: The chains that are partitioned.
    """
    hint = DepthHint(chains)
    for model in models:
        model.register_forward_hook(hint, always_call=True)
