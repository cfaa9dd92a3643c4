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

from collections.abc import Iterable, Sequence

from torch import nn

from resist.blocks import compatibility, residual
from resist.blocks.chain import COMPACT, IN_PLACE, Branch, Chain
from resist.blocks.example import Seen
from resist.blocks.modules import children_of
from resist.blocks.reasons import reason_without_chain, reason_without_skip
from resist.blocks.runs import Run, is_layer, runs
from resist.blocks.selection import ALL, FOUND, all_chains, conflict, overlap
from resist.blocks.trial import default_form, tried, tried_outside
from resist.errors import UserError

__all__ = ["COMPACT", "IN_PLACE", "Branch", "Chain", "choose_chains", "find_chains"]


def find_chains(model: nn.Module) -> tuple[Chain, ...]:
    """Find all runs of two or more residual blocks, which are tried with guessed inputs.

    Args:
        model: The full network, on any device or on meta. It is not changed.

    Returns:
        The chains, the one with the most blocks (then the most weights) first. Those whose blocks could not be tested,
        with the `skip_type` "unknown", are last.
    """
    return tuple(run for run in try_runs(model) if run.skip_type != residual.NONE)


def choose_chains(
    model: nn.Module, names: Sequence[str] = (), seen: Seen | None = None, *, needed: bool = True
) -> tuple[Chain, ...]:
    """Choose the chains to partition.

    Args:
        model: The full network.
        names: Names of chains: `layer3:1-22`, or `layer3` for the longest run in it; or "all" alone, for all chains
            that can be partitioned together. Default: the longest of all.
        seen: What an example shows of the network. Default: blocks are tried with guessed inputs, and those whose skip
            connection is in the network's forward are not found.
        needed: Without `names`, raise if the model has no chain, instead of returning none.

    Returns:
        The chains, in the order of `names`.

    Raises:
        UserError: If a name fits no run of residual blocks, two chains overlap or one comes after another in the same
            nn.ModuleList, or the model has no chain.
    """
    return chosen_of(try_runs(model, seen, every=bool(names)), model, names, seen, needed=needed)


def chosen_of(
    found: tuple[Chain, ...], model: nn.Module, names: Sequence[str], seen: Seen | None = None, *, needed: bool = True
) -> tuple[Chain, ...]:
    """Choose among the runs of `try_runs`, as `choose_chains` does."""
    if ALL in names and len(names) > 1:
        raise UserError(f"`chains={ALL}` takes all chains that there are; give it alone, or name the chains without it")
    if not names or ALL in names:
        if found and found[0].skip_type in FOUND:
            return all_chains(found, model)[0] if names else found[:1]
        if not names and not needed:
            return ()
        reason = reason_without_chain(model, found, seen)
        raise UserError(f"the model has no chain of residual blocks, so there is nothing to partition: {reason}")
    chosen = tuple(_parse(name, model, found, seen) for name in names)
    for i, first in enumerate(chosen):
        for second in chosen[i + 1 :]:
            if reason := conflict(first, second, model):
                raise UserError(reason)
    return chosen


def try_runs(model: nn.Module, seen: Seen | None = None, *, every: bool = True) -> tuple[Chain, ...]:
    """Try the blocks of all runs.

    Args:
        model: The full network.
        seen: As in `choose_chains`.
        every: Find all runs. Otherwise shorter ones than the longest are left out where it takes runs of the network
            to find them.

    Returns:
        The runs, in the order of `find_chains`; those without a skip connection are last.
    """
    calls = None if seen is None else seen.calls
    candidates: list[Chain] = []
    inside: set[str] = set()  # blocks of chains, in which only runs of the usual kind are of interest
    others: list[Run] = []

    def add(chains: Iterable[Chain]) -> bool:
        forms = (default_form(tested, model, calls) for tested in chains)
        added = [chain for chain in forms if chain is not None]
        candidates.extend(added)
        found = [chain for chain in added if chain.skip_type in FOUND]
        inside.update(name for chain in found for name in chain.all_members)
        return bool(found)

    def nested(run: Run) -> bool:
        return any(f"{run.chain.container}.".startswith(f"{name}.") for name in inside)

    for run in runs(model) if seen is None else seen.runs:
        if (run.usual or not nested(run)) and not add(tried(run, calls)) and not nested(run):
            others.append(run)
    # Only then the tests that run the whole network, of the longest run first.
    longest = 1 if every else max((c.num_blocks for c in candidates if c.skip_type in FOUND), default=1)
    for run in sorted(others, key=lambda run: -len(run.blocks)):
        if seen is None or len(run.blocks) <= longest or nested(run):
            continue
        if found := tried_outside(run, seen.outside):
            candidates = [chain for chain in candidates if chain.name != run.chain.name]
            add(found)
            longest = longest if every else len(run.blocks)
    return tuple(sorted(candidates, key=lambda chain: _order(chain, candidates, model)))


def _order(chain: Chain, candidates: Sequence[Chain], model: nn.Module) -> tuple[int, int, bool, int]:
    """Sort key: residual blocks first, then the number of blocks, the usual kind, the number of weights."""
    weights = sum(p.numel() for name in chain.all_members for p in model.get_submodule(name).parameters())
    # A run within three or more repeats comes after the chain of all of them.
    around = [
        1 - one.num_blocks
        for one in candidates
        if one.period > 1
        and one.num_blocks >= 3
        and one is not chain
        and overlap(one, chain)
        and one.skip_type in FOUND
    ]
    single = chain.period == 1 and not chain.by_name and not chain.branches
    usual = single and not is_layer(model.get_submodule(chain.members(0)[0]))
    rank = 0 if chain.skip_type in FOUND else 1 if chain.skip_type == residual.UNKNOWN else 2
    return rank, max((-chain.num_blocks, *around)), not usual, -weights


def _parse(
    text: str,
    model: nn.Module,
    found: tuple[Chain, ...],
    seen: Seen | None,
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
                raise UserError(f"chain {text!r}: {reason_without_skip(run, model, seen)}{known}")
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
