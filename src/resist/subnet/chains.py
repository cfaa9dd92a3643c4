"""Chains: runs of interchangeable residual blocks in any `nn.Module`.

They are found by comparing neighbors, or named by the user. Neighbors under one `nn.Sequential` or `nn.ModuleList` form
a run if they have the same class and the same shapes of parameters and buffers, in all their parts, and share no
parameter with another module. The strided first block of a section has other shapes, so it is never part of a chain.
Numbers, strings and flags may differ along a run (a drop-path rate that grows with depth, a layer's index, a shifted
window): they move with their block, see `Varying`.

A block has to be residual, x + f(x), because a sub-network without the block passes x on unchanged. This is tested by
running the block, see `resist.subnet.residual`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from resist.errors import UserError
from resist.subnet import compatibility, residual
from resist.subnet.compatibility import Varying
from resist.subnet.modules import children_of, named_modules
from resist.subnet.selection import ALL, all_chains

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Chain:
    """A run of interchangeable blocks: children `first` to `last` of a container.

    Attributes:
        container: Dotted name of the `nn.Sequential` or `nn.ModuleList`; "" if it is the model itself.
        first: Position of the first block among the container's children, from 0.
        last: Position of the last block, included.
        keys: Names of all children of the container, which can be any names in an `nn.Sequential`.
        skip_type: Type of the blocks' skip connections, one of the constants of `resist.subnet.residual`. Not compared.
        varying: Attributes that differ along the chain, with their value in each block. Not compared.
        noted: Attributes whose change during training has been said. Not compared.
    """

    container: str
    first: int
    last: int
    keys: tuple[str, ...]
    skip_type: str = field(default=residual.UNKNOWN, compare=False)
    varying: tuple[Varying, ...] = field(default=(), compare=False)
    noted: set[str] = field(default_factory=set[str], compare=False, repr=False)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return self.last - self.first + 1

    @property
    def name(self) -> str:
        """Name of the chain, `layer3:1-22` for example."""
        return f"{self.container}:{self.first}-{self.last}"

    def block_name(self, block: int) -> str:
        """Return the global dotted name of a block.

        Args:
            block: Number of the block.

        Returns:
            Its name: `layer3.1` for block 0 of layer3:1-22.
        """
        return f"{self.container}.{self.keys[self.first + block]}".lstrip(".")

    def part(self, first: int, last: int) -> "Chain":
        """Cut out a shorter chain.

        Args:
            first: Position of its first block among the container's children.
            last: Position of its last block, included.

        Returns:
            The chain, with those attributes that differ among its blocks.
        """
        start, end = first - self.first, last - self.first + 1
        varying = tuple(filter(None, (attribute.part(start, end) for attribute in self.varying)))
        return Chain(self.container, first, last, self.keys, self.skip_type, varying)

    @property
    def caveat(self) -> str:
        """Limitation of scaling this chain's branches; "" if it is exact."""
        if self.skip_type == residual.RELU:
            return (
                f"the blocks of {self.name} end in a ReLU, relu(x + f(x)): the full network uses "
                "x + scale * (block(x) - x); that is relu(x + scale * f(x)) except where x + f(x) < 0, where it is "
                "(1 - scale) * x, which is larger"
            )
        if self.skip_type == residual.NORM:
            return (
                f"the blocks of {self.name} end in a norm, norm(x + f(x)): the full network uses "
                "x + scale * (block(x) - x), a mean of two normalized states that is not itself normalized, as "
                "norm(x + scale * f(x)) would be"
            )
        return ""


def find_chains(model: nn.Module) -> tuple[Chain, ...]:
    """Find all runs of two or more residual blocks.

    Args:
        model: The full network, on any device or on meta. It is not changed.

    Returns:
        The chains, the one with the most blocks (then the most weights) first. Those whose blocks could not be tested,
        with the `skip_type` "unknown", are last.
    """
    return tuple(run for run in _runs(model) if run.skip_type != residual.NONE)


def choose_chains(model: nn.Module, names: Sequence[str] = ()) -> tuple[Chain, ...]:
    """Choose the chains to partition.

    Args:
        model: The full network.
        names: Names of chains: `layer3:1-22`, or `layer3` for the longest run in it; or "all", for all chains that can
            be partitioned together. Default: the longest of all.

    Returns:
        The chains, in the order of `names`.

    Raises:
        UserError: If a name fits no run of residual blocks, two chains overlap or one comes after another in the same
            nn.ModuleList, or the model has no chain.
    """
    runs = _runs(model)
    if not names or tuple(names) == (ALL,):
        if runs and runs[0].skip_type in residual.RESIDUAL:
            return every_chain(model)[0] if names else runs[:1]
        reason = _miss(model, runs)
        raise UserError(f"the model has no chain of residual blocks, so there is nothing to partition: {reason}")
    chosen = tuple(_parse(name, model, runs) for name in names)
    for i, first in enumerate(chosen):
        for second in chosen[i + 1 :]:
            if conflict := _conflict(first, second, model):
                raise UserError(conflict)
    return chosen


def every_chain(model: nn.Module) -> tuple[tuple[Chain, ...], tuple[str, ...]]:
    """Choose all chains of a network that can be partitioned together; see `resist.subnet.selection.all_chains`."""
    return all_chains(_runs(model), lambda first, second: _conflict(first, second, model))


def _conflict(first: Chain, second: Chain, model: nn.Module) -> str:
    """Reason why two chains cannot be partitioned together, or ""."""
    apart = first.container != second.container or first.last < second.first or second.last < first.first
    if not apart or _inside(first, second) or _inside(second, first):
        return f"chains {first.name} and {second.name} overlap; name each block once"
    for inner, outer in ((first, second), (second, first)):
        if _behind(inner, outer, model):
            return (
                f"chain {inner.name} comes after {outer.name} in an nn.ModuleList, whose children are renumbered; name "
                "one of the two"
            )
    return ""


def _runs(model: nn.Module) -> tuple[Chain, ...]:
    """All runs, those without a skip connection last; see `find_chains`."""
    candidates: list[tuple[tuple[int, int, int], Chain]] = []
    uses = _uses(model)
    for container, module in named_modules(model):
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        blocks = list(module)
        shapes = [list(compatibility.fixed(block).items()) if _is_block(block, uses) else None for block in blocks]
        start = 0
        for end in range(1, len(blocks) + 1):
            if end < len(blocks) and shapes[end] is not None and shapes[end] == shapes[start]:
                continue
            if end - start >= 2:
                for run in _split_by_skip_type(
                    Chain(container, start, end - 1, tuple(children_of(module))), blocks[start:end]
                ):
                    weights = sum(p.numel() for block in blocks[run.first : run.last + 1] for p in block.parameters())
                    preference = residual.PREFERENCE[run.skip_type]
                    candidates.append(((preference, -run.num_blocks, -weights), run))
            start = end
    candidates.sort(key=lambda item: item[0])
    return tuple(run for _, run in candidates)


def _split_by_skip_type(run: Chain, blocks: Sequence[nn.Module]) -> list[Chain]:
    """Split a run into parts with one type of skip connection."""
    scalars = [compatibility.scalars(block) for block in blocks]
    # Blocks with the same attributes behave in the same way: test one of each group.
    texts = [repr(values) for values in scalars]
    tested: dict[str, str] = {}
    for block, text in zip(blocks, texts, strict=True):
        if residual.UNKNOWN in tested.values():  # all blocks take the same inputs, so the others would fail too
            break
        if text not in tested:
            tested[text] = residual.skip_of(block)
    types = [residual.UNKNOWN if residual.UNKNOWN in tested.values() else tested[text] for text in texts]
    parts: list[Chain] = []
    start = 0
    for end in range(1, len(blocks) + 1):
        if end < len(blocks) and types[end] == types[start]:
            continue
        if end - start >= 2:
            skip_type = residual.NONE if types[start] == residual.SHAPE else types[start]
            varying = compatibility.varying(scalars[start:end])
            parts.append(Chain(run.container, run.first + start, run.first + end - 1, run.keys, skip_type, varying))
        start = end
    return parts


def _parse(text: str, model: nn.Module, runs: tuple[Chain, ...]) -> Chain:
    """The chain with the name `text`, NAME or NAME:FIRST-LAST."""
    valid = [run for run in runs if run.skip_type != residual.NONE]
    known = "; found: " + (", ".join(run.name for run in valid) or "none")
    container, _, span = text.partition(":")
    if not span:
        for run in valid:
            if run.container == container:
                return run
        raise UserError(f"chain {text!r}: {container!r} has no run of residual blocks{known}")
    first, _, last = span.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"chain {text!r} does not have the form NAME:FIRST-LAST, as in layer3:1-22{known}")
    for run in runs:
        if run.container == container and run.first <= int(first) and int(last) <= run.last:
            if run.skip_type == residual.NONE:
                raise UserError(f"chain {text!r}: {_NO_SKIP}{known}")
            return run.part(int(first), int(last))
    reason = compatibility.difference(model, container, int(first), int(last))
    raise UserError(f"chain {text!r}: {reason or 'its blocks are not interchangeable, or do not exist'}{known}")


_NO_SKIP = "its blocks have no skip connection: with all their weights zero they do not return their input"


def _miss(model: nn.Module, runs: Sequence[Chain]) -> str:
    """Reason why the best candidate is not a chain."""
    if runs and runs[0].skip_type == residual.UNKNOWN:
        return (
            f"the blocks of {runs[0].name} may be residual, but could not be tested outside the network; name the "
            f"chain ({runs[0].name}) if they are"
        )
    if runs:
        return f"{runs[0].name} is a run of equal blocks, but {_NO_SKIP}"
    return compatibility.nearest_miss(model) or (
        "no nn.Sequential or nn.ModuleList has two neighboring blocks of the same class and shapes"
    )


def _inside(inner: Chain, outer: Chain) -> bool:
    """True if `inner` is within a block of `outer`."""
    return any(f"{inner.container}.".startswith(f"{outer.block_name(block)}.") for block in range(outer.num_blocks))


def _behind(inner: Chain, outer: Chain, model: nn.Module) -> bool:
    """True if `inner` is in a child that shortening `outer` renumbers."""
    if not isinstance(model.get_submodule(outer.container), nn.ModuleList):
        return False
    prefix = f"{outer.container}." if outer.container else ""
    return any(f"{inner.container}.".startswith(f"{prefix}{key}.") for key in outer.keys[outer.last + 1 :])


def _is_block(module: nn.Module, uses: Counter[int]) -> bool:
    """True for a module with children, whose parameters no other module uses.

    A container that only calls its children one after another has no skip connection, so it is not a block; a subclass
    with its own `forward` may be one. `uses` counts the names of each parameter in the whole model, by id.
    """
    own_forward: object = type(module).forward
    bare = any(own_forward is container.forward for container in _CONTAINERS)  # pyright: ignore[reportUnknownMemberType]
    composite = next(module.children(), None) is not None and not bare
    within = _uses(module)
    return composite and bool(within) and all(uses[parameter] == number for parameter, number in within.items())


def _uses(module: nn.Module) -> Counter[int]:
    """Number of names of each parameter, by its id."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
