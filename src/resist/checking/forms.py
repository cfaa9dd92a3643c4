"""Choice of the form of each chain in sub-networks: compact where that is right, else in place."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from resist.blocks.bypass import in_place
from resist.blocks.chain import COMPACT, Chain
from resist.blocks.rehearsal import Forward
from resist.blocks.residual import Call
from resist.errors import UserError

log = logging.getLogger(__name__)

Check = Callable[[nn.Module, Sequence[Chain], Forward], object]


def choose_forms(
    model: nn.Module,
    chains: Sequence[Chain],
    forward: Forward,
    check: Check,
    calls: Mapping[str, Call] | None = None,
) -> tuple[Chain, ...]:
    """Choose the form of each chain by trials, and check the network with all of them.

    Args:
        model: The full network on the CPU. It is not changed.
        chains: Chains to partition.
        forward: Function that calls a network with one batch.
        check: Raises UserError if sub-networks with these chains are not right, `check_network` for example.
        calls: A real call of each module by dotted name.

    Returns:
        The chains. The log has a line for each that is in place.

    Raises:
        UserError: If a chain is right in neither form.
    """
    chosen = tuple(_choose(model, chain, forward, check, calls) for chain in chains)
    if len(chosen) > 1:
        check(model, chosen, forward)
    return chosen


def _choose(model: nn.Module, chain: Chain, forward: Forward, check: Check, calls: Mapping[str, Call] | None) -> Chain:
    compact = replace(chain, form=COMPACT)
    try:
        check(model, (compact,), forward)
        return compact
    except UserError as error:
        placed = in_place(chain, model, calls)
        if placed is None:
            raise
        reason = error
    try:
        check(model, (placed,), forward)
    except UserError as error:
        # What is wrong in both forms is told as of the usual one.
        raise (error if chain.by_name else reason) from None
    log.info(
        "chain %s: the network takes its blocks by name or position, so sub-networks keep each block at its place, and "
        "pass over the others; torch.compile compiles again in each round",
        chain.name,
    )
    return placed
