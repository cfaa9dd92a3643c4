"""Trials: which blocks of a run have a skip connection, and where.

Each module of a block is tried by itself, see `resist.blocks.residual`; if that finds no skip connection, the network
is tried with it, see `resist.blocks.outside`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from resist.blocks import compatibility, residual, responses
from resist.blocks.bypass import in_place, is_bare
from resist.blocks.chain import Branch, Chain
from resist.blocks.modules import children_of
from resist.blocks.outside import OutsideSkips
from resist.blocks.residual import Call
from resist.blocks.runs import Run, is_layer

_ORDER = (residual.PLAIN, residual.RELU, residual.NORM, residual.OUTSIDE, residual.UNKNOWN, residual.SHAPE)


@dataclass(frozen=True)
class Part:
    """A module of a block that the network calls.

    Attributes:
        member: Number of the block's member that it is in.
        path: Dotted name within the member; "" is the member itself.
    """

    member: int
    path: str

    def of(self, run: Run, block: int) -> nn.Module:
        """Return the module in one block."""
        member = run.blocks[block] if run.chain.period == 1 else list(run.blocks[block].children())[self.member]
        return member.get_submodule(self.path)

    def name(self, run: Run, block: int) -> str:
        """Return its global dotted name in one block."""
        return f"{run.chain.members(block)[self.member]}.{self.path}".rstrip(".")


def tried(run: Run, calls: Mapping[str, Call] | None) -> list[Chain]:
    """Try the blocks of a run by themselves.

    Args:
        run: The candidate.
        calls: A real call of each module by dotted name. Default: calls are guessed.

    Returns:
        The chains: parts of the run with one type of skip connection. Their `skip_type` is one of `RESIDUAL`, `UNKNOWN`
        or `NONE`.
    """
    parts = _parts(run)
    branching = [part for part in parts if next(part.of(run, 0).parameters(), None) is not None]
    types = {part: _types(run, part, calls) for part in branching}
    residual_blocks = [all(types[part][block] in residual.RESIDUAL for part in branching) for block in _numbers(run)]
    if not any(residual_blocks):
        # A container that the network calls as one may be residual as one.
        whole = [Part(number, "") for number in range(run.chain.period)]
        if whole != parts and calls is not None and all(part.name(run, 0) in calls for part in whole):
            types_of_whole = {part: _types(run, part, calls) for part in whole}
            if all(one[0] in residual.RESIDUAL for one in types_of_whole.values()):
                return _split(run, types_of_whole)
    if run.leaves or (run.chain.by_name and not any(residual_blocks)):
        return []
    return _split(run, types)


def tried_outside(run: Run, outside: OutsideSkips) -> list[Chain]:
    """Try whether the network adds what the blocks of a run return.

    Args:
        run: The candidate.
        outside: Tests in the network.

    Returns:
        The chain with the `skip_type` `OUTSIDE`, if it does.
    """
    parts = _parts(run)
    added = outside.branches([[part.name(run, block) for part in parts] for block in _numbers(run)])
    return _split(run, {parts[i]: [residual.OUTSIDE] * len(run.blocks) for i in added}) if added else []


def called_names(run: Run, block: int) -> list[str]:
    """List the modules of a block that the network may call.

    Args:
        run: The candidate.
        block: Number of the block.

    Returns:
        Dotted names: its members, and where these only hold modules, those too.
    """
    return [*run.chain.members(block), *(part.name(run, block) for part in _parts(run) if part.path)]


def _parts(run: Run) -> list[Part]:
    members = [run.blocks[0]] if run.chain.period == 1 else list(run.blocks[0].children())
    return [Part(number, path) for number, member in enumerate(members) for path in _called(member)]


def default_form(chain: Chain, model: nn.Module, calls: Mapping[str, Call] | None) -> Chain | None:
    """Choose the form of a chain before any trial of a sub-network.

    Args:
        chain: The chain.
        model: The full network.
        calls: A real call of each module by dotted name. Default: calls are guessed.

    Returns:
        The chain; in place if its container may be called by name; None if that is not possible.
    """
    return in_place(chain, model, calls) if chain.by_name else chain


def _numbers(run: Run) -> range:
    return range(len(run.blocks))


def _called(module: nn.Module, path: str = "") -> list[str]:
    """Modules in a block that have a forward of their own, as dotted names; a bare container has none."""
    if not is_bare(module):
        return [path]
    children = ((f"{path}.{key}".lstrip("."), child) for key, child in children_of(module).items() if child is not None)
    return [name for key, child in children for name in _called(child, key)]


def _types(run: Run, part: Part, calls: Mapping[str, Call] | None) -> list[str]:
    """Skip type of a part in each block."""
    modules = [part.of(run, block) for block in _numbers(run)]
    # Blocks with the same attributes behave in the same way: test one of each group.
    texts = [repr(compatibility.scalars(module)) for module in modules]
    tested: dict[str, str] = {}
    for block, (module, text) in enumerate(zip(modules, texts, strict=True)):
        if residual.UNKNOWN in tested.values():  # all blocks take the same inputs, so the others would fail too
            break
        if text not in tested:
            call = None if calls is None else calls.get(part.name(run, block))
            tested[text] = residual.UNKNOWN if calls is not None and call is None else _skip_of(module, call)
    return [residual.UNKNOWN if residual.UNKNOWN in tested.values() else tested[text] for text in texts]


def _skip_of(module: nn.Module, call: Call | None) -> str:
    if is_layer(module):
        return residual.NONE
    if next(module.children(), None) is None and not responses.returns_input(module, call):
        return residual.NONE  # a norm or a gain, which a test with gains of one takes for residual
    return residual.skip_of(module, call)


def _split(run: Run, types: Mapping[Part, Sequence[str]]) -> list[Chain]:
    """Split a run into chains with one type of skip connection for each part."""
    scalars = [compatibility.scalars(block) for block in run.blocks]
    rows = list(zip(*types.values(), strict=True))
    chains: list[Chain] = []
    start = 0
    for end in range(1, len(rows) + 1):
        if end < len(rows) and rows[end] == rows[start]:
            continue
        if end - start >= 2:
            branches = tuple(Branch(p.member, p.path, t) for p, t in zip(types, rows[start], strict=True))
            plain = branches == (Branch(0, "", rows[start][0]),)
            first, period = run.chain.first, run.chain.period
            chains.append(
                replace(
                    run.chain,
                    first=first + start * period,
                    last=first + end * period - 1,
                    skip_type=_summary(rows[start]),
                    varying=compatibility.varying(scalars[start:end]),
                    branches=() if plain else branches,
                )
            )
        start = end
    return chains


def _summary(types: Sequence[str]) -> str:
    """The type of a block, from those of its parts."""
    if residual.NONE in types or residual.SHAPE in types:
        return residual.NONE
    return max(types, key=_ORDER.index)
