"""Chains: runs of interchangeable residual blocks in any `nn.Module`.

They are found by comparing neighbors, or named by the user. Neighbors under one container form a run if they have the
same class and the same shapes of parameters and buffers, in all their parts, and share no parameter with another
module; where several classes alternate, two or more neighbors together are a block. The container is an `nn.Sequential`
or `nn.ModuleList`, or any other module that calls its children. The strided first block of a section has other shapes,
so it is never part of a chain. Numbers, strings and flags may differ along a run (a drop-path rate that grows with
depth, a layer's index, a shifted window): they move with their block, see `Varying`.

A block has to be residual, x + f(x), because a sub-network without the block passes x on unchanged. This is tested by
running the block, see `resist.blocks.trial`. Arguments of real calls make the tests certain; without them, inputs are
guessed.
"""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from resist.blocks import compatibility, residual
from resist.blocks.chain import COMPACT, IN_PLACE, Branch, Chain
from resist.blocks.modules import children_of
from resist.blocks.outside import OutsideSkips
from resist.blocks.rehearsal import Forward
from resist.blocks.residual import Call
from resist.blocks.runs import Run, runs
from resist.blocks.selection import ALL, all_chains
from resist.blocks.trial import default_form, tried, tried_outside
from resist.errors import UserError

__all__ = ["COMPACT", "IN_PLACE", "Branch", "Chain", "choose_chains", "find_chains"]

_FOUND = (*residual.RESIDUAL, residual.OUTSIDE)


def find_chains(
    model: nn.Module, calls: Mapping[str, Call] | None = None, forward: Forward | None = None
) -> tuple[Chain, ...]:
    """Find all runs of two or more residual blocks.

    Args:
        model: The full network, on any device or on meta. It is not changed.
        calls: A real call of each module by dotted name. Default: blocks are tried with guessed inputs.
        forward: Function that calls a network with one batch. Default: blocks whose skip connection is in the network's
            forward are not found.

    Returns:
        The chains, the one with the most blocks (then the most weights) first. Those whose blocks could not be tested,
        with the `skip_type` "unknown", are last.
    """
    return tuple(run for run in _runs(model, calls, forward) if run.skip_type != residual.NONE)


def choose_chains(
    model: nn.Module,
    names: Sequence[str] = (),
    calls: Mapping[str, Call] | None = None,
    forward: Forward | None = None,
) -> tuple[Chain, ...]:
    """Choose the chains to partition.

    Args:
        model: The full network.
        names: Names of chains: `layer3:1-22`, or `layer3` for the longest run in it; or "all", for all chains that can
            be partitioned together. Default: the longest of all.
        calls: As in `find_chains`.
        forward: As in `find_chains`.

    Returns:
        The chains, in the order of `names`.

    Raises:
        UserError: If a name fits no run of residual blocks, two chains overlap or one comes after another in the same
            nn.ModuleList, or the model has no chain.
    """
    found = _runs(model, calls, forward, every=bool(names))
    if not names or tuple(names) == (ALL,):
        if found and found[0].skip_type in _FOUND:
            return _together(found, model)[0] if names else found[:1]
        reason = _miss(model, found, calls, forward)
        raise UserError(f"the model has no chain of residual blocks, so there is nothing to partition: {reason}")
    chosen = tuple(_parse(name, model, found, calls, forward) for name in names)
    for i, first in enumerate(chosen):
        for second in chosen[i + 1 :]:
            if conflict := _conflict(first, second, model):
                raise UserError(conflict)
    return chosen


def every_chain(
    model: nn.Module, calls: Mapping[str, Call] | None = None, forward: Forward | None = None
) -> tuple[tuple[Chain, ...], tuple[str, ...]]:
    """Choose all chains of a network that can be partitioned together; see `resist.blocks.selection.all_chains`."""
    return _together(_runs(model, calls, forward), model)


def _together(found: tuple[Chain, ...], model: nn.Module) -> tuple[tuple[Chain, ...], tuple[str, ...]]:
    return all_chains(found, lambda first, second: _conflict(first, second, model))


def _conflict(first: Chain, second: Chain, model: nn.Module) -> str:
    """Reason why two chains cannot be partitioned together, or ""."""
    if _overlap(first, second) or _inside(first, second) or _inside(second, first):
        return f"chains {first.name} and {second.name} overlap; name each block once"
    for inner, outer in ((first, second), (second, first)):
        if _behind(inner, outer, model):
            return (
                f"chain {inner.name} comes after {outer.name} in an nn.ModuleList, whose children are renumbered; name "
                "one of the two"
            )
    return ""


def _runs(
    model: nn.Module, calls: Mapping[str, Call] | None, forward: Forward | None, *, every: bool = True
) -> tuple[Chain, ...]:
    """All runs, those without a skip connection last; see `find_chains`.

    Without `every`, shorter ones than the longest are left out where it takes runs of the network to find them.
    """
    candidates: list[tuple[tuple[int, int, bool, int], Chain]] = []
    inside: set[str] = set()  # blocks of chains, in which only runs of the usual kind are of interest
    others: list[Run] = []

    def add(run: Run, chains: Iterable[Chain]) -> bool:
        added = False
        for tested in chains:
            chain = default_form(tested, model, calls)
            if chain is None:
                continue
            names = [name for block in range(chain.num_blocks) for name in chain.members(block)]
            added = added or chain.skip_type in _FOUND
            if chain.skip_type in _FOUND:
                inside.update(names)
            weights = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
            preference = residual.PREFERENCE[chain.skip_type]
            candidates.append(((preference, -chain.num_blocks, not run.usual, -weights), chain))
        return added

    for run in runs(model):
        nested = any(f"{run.chain.container}.".startswith(f"{name}.") for name in inside)
        if (run.usual or not nested) and not add(run, tried(run, calls)) and not nested:
            others.append(run)
    # Only then the tests that run the whole network.
    outside = None if forward is None else OutsideSkips(model, forward)
    least = 2 if every else 1 + max((c.num_blocks for _, c in candidates if c.skip_type in _FOUND), default=1)
    for run in others if outside is not None else ():
        nested = any(f"{run.chain.container}.".startswith(f"{name}.") for name in inside)
        if outside is not None and len(run.blocks) >= least and not nested and (found := tried_outside(run, outside)):
            candidates = [item for item in candidates if item[1].name != run.chain.name]
            add(run, found)
    whole = [chain for _, chain in candidates if chain.period > 1 and chain.num_blocks >= 3]

    def order(item: tuple[tuple[int, int, bool, int], Chain]) -> tuple[int, int, bool, int]:
        """A run within three or more repeats comes after the chain of all of them."""
        (preference, blocks, unusual, weights), chain = item
        around = [
            one.num_blocks for one in whole if one is not chain and _overlap(one, chain) and one.skip_type in _FOUND
        ]
        return preference, max(blocks, *(1 - number for number in around)) if around else blocks, unusual, weights

    return tuple(chain for _, chain in sorted(candidates, key=order))


def _parse(
    text: str,
    model: nn.Module,
    found: tuple[Chain, ...],
    calls: Mapping[str, Call] | None,
    forward: Forward | None,
) -> Chain:
    """The chain with the name `text`: NAME, NAME:FIRST-LAST or NAME:FIRST-LAST/PERIOD."""
    valid = [run for run in found if run.skip_type != residual.NONE]
    known = "; found: " + (", ".join(run.name for run in valid) or "none")
    for run in valid:
        if run.name == text:
            return run
    container, _, rest = text.partition(":")
    if not rest:
        for run in valid:
            if run.container == container:
                return run
        raise UserError(f"chain {text!r}: {container!r} has no run of residual blocks{known}")
    span, _, period = rest.partition("/")
    ends = [_position(key, model, container) for key in (span.partition("-")[0], span.partition("-")[2])]
    if ends[0] is None or ends[1] is None or ends[0] >= ends[1] or (period and not period.isdecimal()):
        raise UserError(f"chain {text!r} does not have the form NAME:FIRST-LAST, as in layer3:1-22{known}")
    first, last = ends[0], ends[1]
    for run in sorted(found, key=lambda run: run.period):
        same = run.container == container and (not period or run.period == int(period))
        whole = (first - run.first) % run.period == 0 and (last - first + 1) % run.period == 0
        several = last - first + 1 >= 2 * run.period
        if same and whole and several and run.first <= first and last <= run.last:
            if run.skip_type == residual.NONE:
                raise UserError(f"chain {text!r}: {_no_skip(run, model, calls, forward)}{known}")
            return run.part(first, last)
    reason = compatibility.difference(model, container, first, last)
    raise UserError(f"chain {text!r}: {reason or 'its blocks are not interchangeable, or do not exist'}{known}")


def _position(key: str, model: nn.Module, container: str) -> int | None:
    """Position of a child, given by its name or its number."""
    try:
        module = model.get_submodule(container)
    except AttributeError:
        return int(key) if key.isdecimal() else None
    keys = list(children_of(module))
    numbered = isinstance(module, nn.Sequential | nn.ModuleList)
    if key.isdecimal() and (numbered or key not in keys):
        return int(key)
    return keys.index(key) if key in keys else None


def _no_skip(run: Chain, model: nn.Module, calls: Mapping[str, Call] | None, forward: Forward | None) -> str:
    """Reason why the blocks of a run are not residual."""
    reasons: list[str] = []
    for name, _ in run.scaled(0):
        call = None if calls is None else calls.get(name)
        module = model.get_submodule(name)
        if call is None and calls is not None:
            reasons.append(f"the network does not call {name}")
        elif residual.skip_of(module, call) not in residual.RESIDUAL:
            reasons.append(residual.reason_without_skip(module, call))
    reason = reasons[0] if reasons else "with all its weights zero a block does not return its input"
    if "times its input" in reason:
        return f"its blocks are not x + f(x): {reason}, which a sub-network without it would leave out"
    if reason.endswith("returns zero"):
        reason += (
            "; if the network adds what it returns to its input, give `example=`"
            if forward is None
            else ", and with zero in its place the network does not go on with the state from before it, or it does "
            "more with it than adding it"
        )
    return f"its blocks have no skip connection: {reason}"


def _miss(model: nn.Module, found: Sequence[Chain], calls: Mapping[str, Call] | None, forward: Forward | None) -> str:
    """Reason why the best candidate is not a chain."""
    if found and found[0].skip_type == residual.UNKNOWN:
        return (
            f"the blocks of {found[0].name} may be residual, but could not be tested outside the network; name the "
            f"chain ({found[0].name}) if they are" + ("" if calls is not None else ", or give `example=`")
        )
    if found:
        return f"{found[0].name} is a run of equal blocks, but {_no_skip(found[0], model, calls, forward)}"
    return compatibility.nearest_miss(model) or (
        "no nn.Sequential or nn.ModuleList has two neighboring blocks of the same class and shapes"
    )


def _overlap(first: Chain, second: Chain) -> bool:
    return first.container == second.container and first.first <= second.last and second.first <= first.last


def _inside(inner: Chain, outer: Chain) -> bool:
    """True if `inner` is within a block of `outer`."""
    members = (name for block in range(outer.num_blocks) for name in outer.members(block))
    return any(f"{inner.container}.".startswith(f"{name}.") for name in members)


def _behind(inner: Chain, outer: Chain, model: nn.Module) -> bool:
    """True if `inner` is in a child that shortening `outer` renumbers."""
    if outer.form == IN_PLACE or not isinstance(model.get_submodule(outer.container), nn.ModuleList):
        return False
    prefix = f"{outer.container}." if outer.container else ""
    return any(f"{inner.container}.".startswith(f"{prefix}{key}.") for key in outer.keys[outer.last + 1 :])
