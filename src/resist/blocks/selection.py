"""Selection: all chains of a network that can be partitioned together."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from resist.blocks import residual

if TYPE_CHECKING:
    from resist.blocks.chains import Chain

# In place of the names of chains: all that can be partitioned together.
ALL = "all"


def all_chains(
    runs: "Sequence[Chain]", conflict: "Callable[[Chain, Chain], str]"
) -> "tuple[tuple[Chain, ...], tuple[str, ...]]":
    """Choose all chains that can be partitioned together.

    Chains are taken in the order of `find_chains`, the longest first. One that is in conflict with a chain that has
    been taken is left out: a chain within a block of another one, for example. Left out are also runs whose blocks
    could not be tested.

    Args:
        runs: All runs of equal blocks, in the order of `find_chains`.
        conflict: Returns why two chains cannot be partitioned together, or "".

    Returns:
        The chains, the longest first, and a sentence on each chain that is in conflict with one of them.
    """
    chosen: list[Chain] = []
    left_out: list[str] = []
    for run in runs:
        if run.skip_type in (*residual.RESIDUAL, residual.OUTSIDE):
            reason = next(filter(None, (conflict(chain, run) for chain in chosen)), "")
            if reason:
                left_out.append(f"chain {run.name} is left undivided: {reason}")
            else:
                chosen.append(run)
    return tuple(chosen), tuple(left_out)
