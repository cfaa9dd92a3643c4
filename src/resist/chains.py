"""Chains: runs of interchangeable blocks, found in any `nn.Module` or named by the user.

Two neighbours under one `nn.Sequential` or `nn.ModuleList` are interchangeable when they have the same class, the same
parameter and buffer shapes, the same scalar attributes all the way down, and no parameter in common with anything else.
The strided first block of a section differs in its shapes, so it is never part of a chain.
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from resist.errors import UserError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SCALARS = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Chain:
    """Children `first`..`last` of `container`, counted from 0.

    container: dotted name of the `nn.Sequential` or `nn.ModuleList`.
    keys:      the names of all its children, which a `nn.Sequential` may choose freely.
    """

    container: str
    first: int
    last: int
    keys: tuple[str, ...]

    @property
    def num_blocks(self) -> int:
        return self.last - self.first + 1

    @property
    def name(self) -> str:
        return f"{self.container}:{self.first}-{self.last}"

    def block_name(self, block: int) -> str:
        """The global dotted name of a block: block 0 of layer3:1-22 is `layer3.1`."""
        return f"{self.container}.{self.keys[self.first + block]}".lstrip(".")


def find_chains(model: nn.Module) -> tuple[Chain, ...]:
    """All runs of two or more interchangeable blocks, the longest (then the heaviest) first."""
    found: list[tuple[int, int, Chain]] = []
    uses = _uses(model)
    for container, module in model.named_modules():
        if not isinstance(module, nn.Sequential | nn.ModuleList):
            continue
        keys, blocks = tuple(module._modules), list(module)
        signatures = [_signature(block) if _is_block(block, uses) else None for block in blocks]
        start = 0
        for end in range(1, len(blocks) + 1):
            if end < len(blocks) and signatures[end] is not None and signatures[end] == signatures[start]:
                continue
            if end - start >= 2:
                weights = sum(p.numel() for block in blocks[start:end] for p in block.parameters())
                found.append((end - start, weights, Chain(container, start, end - 1, keys)))
            start = end
    found.sort(key=lambda item: (-item[0], -item[1]))
    return tuple(chain for _, _, chain in found)


def choose_chains(model: nn.Module, names: tuple[str, ...] = ()) -> tuple[Chain, ...]:
    """The chains to partition: those named (`layer3:1-22`, or `layer3` for its longest run), else the longest of all.

    Raises UserError when a name fits no run of interchangeable blocks, when two overlap, or when there is none.
    """
    runs = find_chains(model)
    if not names:
        if not runs:
            raise UserError(
                "the model has no chain: no nn.Sequential or nn.ModuleList with two neighbouring blocks of the same "
                "class, shapes and scalar attributes; there is nothing to deal out"
            )
        return runs[:1]
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


def _parse(text: str, model: nn.Module, runs: tuple[Chain, ...]) -> Chain:
    known = "; found: " + (", ".join(run.name for run in runs) or "none")
    container, _, span = text.partition(":")
    if not span:
        for run in runs:
            if run.container == container:
                return run
        raise UserError(f"chain {text!r}: {container!r} has no run of interchangeable blocks{known}")
    first, _, last = span.partition("-")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise UserError(f"chain {text!r} does not read NAME:FIRST-LAST, as in layer3:1-22{known}")
    for run in runs:
        if run.container == container and run.first <= int(first) and int(last) <= run.last:
            return Chain(container, int(first), int(last), run.keys)
    raise UserError(f"chain {text!r}: its blocks are not interchangeable, or not there{known}")


def _inside(one: Chain, other: Chain) -> bool:
    """Whether `one` lies within a block of `other`."""
    return any(
        f"{one.container}.".startswith(f"{other.block_name(block)}.") for block in range(other.num_blocks)
    )


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


def _signature(module: nn.Module) -> object:
    """Everything that must agree for two blocks to be interchangeable, as a comparable value."""
    tensors = [
        (name, tuple(t.shape), t.dtype, t.requires_grad)
        for named in (module._parameters, module._buffers)
        for name, t in named.items()
        if t is not None
    ]
    scalars = sorted(
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and _is_scalar(value)
    )
    children = [(name, _signature(child)) for name, child in module.named_children()]
    return (type(module), tensors, [(n, repr(v)) for n, v in scalars], children)


def _is_scalar(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_scalar(item) for item in value)
    return isinstance(value, _SCALARS)
