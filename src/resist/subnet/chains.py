"""Chains: runs of residual blocks that can take one another's place, found in any `nn.Module` or named by the user.

Neighbors under one `nn.Sequential` or `nn.ModuleList` form a run when they have the same class, the same parameter and
buffer shapes all the way down, and no parameter in common with anything else. The strided first block of a section
differs in its shapes, so it is never part of a chain. Numbers, texts and flags may differ along a run (a drop-path rate
that grows with depth, a layer's index, a shifted window): they go with their block, see `Varying`.

A block has to be residual, x + f(x), or a sub-network without it would be nonsense: that is tried, see `residual`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import nn

from resist.errors import UserError
from resist.subnet import compatibility, residual
from resist.subnet.compatibility import Varying

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Chain:
    """Children `first`..`last` of `container`, counted from 0.

    container: dotted name of the `nn.Sequential` or `nn.ModuleList`.
    keys:      the names of all its children, which a `nn.Sequential` may choose freely.
    kind:      of the blocks' skip connections, a word of `residual`.
    varying:   the attributes that differ along the chain, with their value in each block.
    """

    container: str
    first: int
    last: int
    keys: tuple[str, ...]
    kind: str = field(default=residual.UNKNOWN, compare=False)
    varying: tuple[Varying, ...] = field(default=(), compare=False)

    @property
    def num_blocks(self) -> int:
        return self.last - self.first + 1

    @property
    def name(self) -> str:
        return f"{self.container}:{self.first}-{self.last}"

    def block_name(self, block: int) -> str:
        """The global dotted name of a block: block 0 of layer3:1-22 is `layer3.1`."""
        return f"{self.container}.{self.keys[self.first + block]}".lstrip(".")

    def part(self, first: int, last: int) -> "Chain":
        """The children `first`..`last` of the container as a chain of their own."""
        start, end = first - self.first, last - self.first + 1
        cut = (Varying(one.module, one.name, one.values[start:end]) for one in self.varying)
        kept = tuple(one for one in cut if any(value != one.values[0] for value in one.values))
        return Chain(self.container, first, last, self.keys, self.kind, kept)

    @property
    def caveat(self) -> str:
        """What is only nearly true of scaling this chain's branches, "" where it is exact."""
        if self.kind == residual.RELU:
            return (
                f"the blocks of {self.name} end in a ReLU, relu(x + f(x)): the full network uses "
                "x + scale * (block(x) - x); that is relu(x + scale * f(x)) except where x + f(x) < 0, where it leaves "
                "(1 - scale) * x and the other less"
            )
        if self.kind == residual.NORM:
            return (
                f"the blocks of {self.name} end in a norm, norm(x + f(x)): the full network uses "
                "x + scale * (block(x) - x), a mean of two normalized states that is not itself normalized, as "
                "norm(x + scale * f(x)) would be"
            )
        return ""


def find_chains(model: nn.Module) -> tuple[Chain, ...]:
    """All runs of two or more residual blocks, the longest (then the heaviest) first; last those that could not be
    tried, whose kind is "unknown"."""
    return tuple(run for run in _runs(model) if run.kind != residual.NONE)


def choose_chains(model: nn.Module, names: Sequence[str] = ()) -> tuple[Chain, ...]:
    """The chains to partition: those named (`layer3:1-22`, or `layer3` for its longest run), else the longest of all.

    Raises UserError when a name fits no run of residual blocks, when two overlap, or when there is none.
    """
    runs = _runs(model)
    if not names:
        if runs and runs[0].kind in residual.RESIDUAL:
            return runs[:1]
        reason = _miss(model, runs)
        raise UserError(f"the model has no chain of residual blocks, so there is nothing to deal out: {reason}")
    chosen = tuple(_parse(name, model, runs) for name in names)
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            apart = one.container != other.container or one.last < other.first or other.last < one.first
            if not apart or _inside(one, other) or _inside(other, one):
                raise UserError(f"chains {one.name} and {other.name} overlap; name each block once")
            for inner, outer in ((one, other), (other, one)):
                if _behind(inner, outer, model):
                    raise UserError(
                        f"chain {inner.name} lies behind {outer.name} in an nn.ModuleList, whose children are "
                        "renumbered; name one of the two"
                    )
    return chosen


def _runs(model: nn.Module) -> tuple[Chain, ...]:
    """As `find_chains`, with the runs of blocks without a skip connection at the very end."""
    found: list[tuple[tuple[int, int, int], Chain]] = []
    uses = _uses(model)
    for container, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        blocks = list(module)
        shapes = [list(compatibility.fixed(block).items()) if _is_block(block, uses) else None for block in blocks]
        start = 0
        for end in range(1, len(blocks) + 1):
            if end < len(blocks) and shapes[end] is not None and shapes[end] == shapes[start]:
                continue
            if end - start >= 2:
                for run in _tried(Chain(container, start, end - 1, tuple(module._modules)), blocks[start:end]):
                    weights = sum(p.numel() for block in blocks[run.first : run.last + 1] for p in block.parameters())
                    rank = residual.RANK[run.kind]
                    found.append(((rank, -run.num_blocks, -weights), run))
            start = end
    found.sort(key=lambda item: item[0])
    return tuple(run for _, run in found)


def _tried(run: Chain, blocks: Sequence[nn.Module]) -> list[Chain]:
    """The parts of a run that are of one kind. Blocks that differ in an attribute are each tried."""
    scalars = [compatibility.scalars(block) for block in blocks]
    texts = [repr(own) for own in scalars]
    kinds: dict[str, str] = {}
    for block, text in zip(blocks, texts, strict=True):
        if residual.UNKNOWN in kinds.values():  # what one does not take, the others do not take either
            break
        if text not in kinds:
            kinds[text] = residual.skip_of(block)
    marks = [residual.UNKNOWN if residual.UNKNOWN in kinds.values() else kinds[text] for text in texts]
    parts: list[Chain] = []
    start = 0
    for end in range(1, len(blocks) + 1):
        if end < len(blocks) and marks[end] == marks[start]:
            continue
        if end - start >= 2:
            kind = residual.NONE if marks[start] == residual.SHAPE else marks[start]
            varying = compatibility.varying(scalars[start:end])
            parts.append(Chain(run.container, run.first + start, run.first + end - 1, run.keys, kind, varying))
        start = end
    return parts


def _parse(text: str, model: nn.Module, runs: tuple[Chain, ...]) -> Chain:
    good = [run for run in runs if run.kind != residual.NONE]
    known = "; found: " + (", ".join(run.name for run in good) or "none")
    container, _, span = text.partition(":")
    if not span:
        for run in good:
            if run.container == container:
                return run
        raise UserError(f"chain {text!r}: {container!r} has no run of residual blocks{known}")
    first, _, last = span.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"chain {text!r} does not read NAME:FIRST-LAST, as in layer3:1-22{known}")
    for run in runs:
        if run.container == container and run.first <= int(first) and int(last) <= run.last:
            if run.kind == residual.NONE:
                raise UserError(f"chain {text!r}: {_NO_SKIP}{known}")
            return run.part(int(first), int(last))
    reason = compatibility.difference(model, container, int(first), int(last))
    raise UserError(f"chain {text!r}: {reason or 'its blocks are not interchangeable, or not there'}{known}")


_NO_SKIP = "its blocks have no skip connection: with all their weights zero they do not give their input back"


def _miss(model: nn.Module, runs: Sequence[Chain]) -> str:
    """Why the run that came nearest is none."""
    if runs and runs[0].kind == residual.UNKNOWN:
        return (
            f"the blocks of {runs[0].name} may be residual, but could not be tried by themselves; name the chain "
            f"({runs[0].name}) if they are"
        )
    if runs:
        return f"{runs[0].name} is a run of equal blocks, but {_NO_SKIP}"
    return compatibility.nearest_miss(model) or (
        "no nn.Sequential or nn.ModuleList has two neighboring blocks of the same class and shapes"
    )


def _inside(one: Chain, other: Chain) -> bool:
    """Whether `one` lies within a block of `other`."""
    return any(f"{one.container}.".startswith(f"{other.block_name(block)}.") for block in range(other.num_blocks))


def _behind(one: Chain, other: Chain, model: nn.Module) -> bool:
    """Whether `one` lies below a child behind `other` that a shallower network renumbers."""
    if not isinstance(model.get_submodule(other.container), nn.ModuleList):
        return False
    prefix = f"{other.container}." if other.container else ""
    return any(f"{one.container}.".startswith(f"{prefix}{key}.") for key in other.keys[other.last + 1 :])


def _is_block(module: nn.Module, uses: Counter[int]) -> bool:
    """A block has parameters and parts of its own, which nothing else uses (`uses`: id of a parameter -> number of its
    names in the whole model). A container that only calls its children one after another has no skip connection, so it
    is none, a subclass with a `forward` of its own may be one."""
    bare = any(type(module).forward is container.forward for container in _CONTAINERS)
    composite = next(module.children(), None) is not None and not bare
    own = _uses(module)
    return composite and bool(own) and all(uses[parameter] == number for parameter, number in own.items())


def _uses(module: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
