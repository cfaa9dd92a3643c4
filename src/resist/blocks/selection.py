"""Selection: chains of a network that can be partitioned together."""

from collections.abc import Callable, Sequence

from torch import nn

from resist.blocks import residual
from resist.blocks.chain import IN_PLACE, Chain

# In place of the names of chains: all that can be partitioned together.
ALL = "all"
# Types of skip connections of chains that need not be named.
FOUND = (*residual.RESIDUAL, residual.OUTSIDE)


def all_chains(
    runs: Sequence[Chain],
    model: nn.Module,
    accept: Callable[[tuple[Chain, ...], Chain], Chain | str] = lambda _chosen, run: run,
) -> tuple[tuple[Chain, ...], tuple[str, ...]]:
    """Choose all chains that can be partitioned together.

    Chains are taken in the order of `runs`. One that is in conflict with a chain that has been taken is left out: a
    chain within a block of another one, for example. Left out are also runs whose blocks could not be tested.

    Args:
        runs: All runs of equal blocks, in the order of `resist.blocks.chains.find_chains`.
        model: The full network.
        accept: Returns the chain to add to the chosen ones in place of a run, or why there is none.

    Returns:
        The chains, and a sentence on each one that is left out.
    """
    chosen: tuple[Chain, ...] = ()
    left_out: list[str] = []
    for run in runs:
        if run.skip_type not in FOUND:
            continue
        reason = next(filter(None, (conflict(chain, run, model) for chain in chosen)), "")
        accepted = reason or accept(chosen, run)
        if isinstance(accepted, str):
            left_out.append(f"chain {run.name} is left undivided: {accepted}")
        else:
            chosen += (accepted,)
    return chosen, tuple(left_out)


def conflict(first: Chain, second: Chain, model: nn.Module) -> str:
    """Explain why two chains cannot be partitioned together.

    Args:
        first: A chain of the network.
        second: Another one.
        model: The full network.

    Returns:
        A sentence; "" if they can.
    """
    if overlap(first, second) or _inside(first, second) or _inside(second, first):
        return f"chains {first.name} and {second.name} overlap; name each block once"
    for inner, outer in ((first, second), (second, first)):
        if _behind(inner, outer, model):
            return (
                f"chain {inner.name} comes after {outer.name} in an nn.ModuleList, whose children are renumbered; name "
                "one of the two"
            )
    return ""


def overlap(first: Chain, second: Chain) -> bool:
    """Check for a child that two chains have in common.

    Args:
        first: A chain of the network.
        second: Another one.

    Returns:
        True if they have one.
    """
    return first.container == second.container and first.first <= second.last and second.first <= first.last


def _inside(inner: Chain, outer: Chain) -> bool:
    """True if `inner` is within a block of `outer`."""
    return any(f"{inner.container}.".startswith(f"{name}.") for name in outer.all_members)


def _behind(inner: Chain, outer: Chain, model: nn.Module) -> bool:
    """True if `inner` is in a child that shortening `outer` renumbers."""
    if outer.form == IN_PLACE or not isinstance(model.get_submodule(outer.container), nn.ModuleList):
        return False
    prefix = f"{outer.container}." if outer.container else ""
    return any(f"{inner.container}.".startswith(f"{prefix}{key}.") for key in outer.keys[outer.last + 1 :])
