"""Runs: neighboring children of a container with equal structure, also where several classes alternate."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.jit import ScriptModule

from resist.blocks import compatibility
from resist.blocks.bypass import is_bare
from resist.blocks.chain import Chain
from resist.blocks.modules import children_of, named_modules

MOST_PERIOD = 8  # most children of a block


def spans(signatures: Sequence[object]) -> Iterator[tuple[int, int, int]]:
    """Find rows that repeat, the shortest period first.

    Args:
        signatures: A comparable value for each child; None for one that belongs to no row.

    Yields:
        (start, end, period) of each row of two or more repeats, `end` not included. None is within another one of a
        shorter period.
    """
    found: list[tuple[int, int]] = []
    for period in range(1, min(MOST_PERIOD, len(signatures) // 2) + 1):
        start = 0
        while start + period < len(signatures):
            end = start
            while end + period < len(signatures) and _equal(signatures[end], signatures[end + period]):
                end += 1
            if end - start >= period:
                stop = start + (end - start + period) // period * period
                if not any(first <= start and stop <= last for first, last in found):
                    found.append((start, stop))
                    yield start, stop, period
            start = max(end, start + 1)


def _equal(left: object, right: object) -> bool:
    return left is not None and left == right


@dataclass(frozen=True)
class Run:
    """A candidate for a chain: blocks of equal structure, not yet tried.

    Attributes:
        chain: Its place; `skip_type`, `varying` and `branches` are not known yet.
        blocks: The module of each block; a list of its members if it is several children.
        leaves: True if a block is a single layer, which can only have a skip connection outside.
    """

    chain: Chain
    blocks: tuple[nn.Module, ...]
    leaves: bool

    @property
    def usual(self) -> bool:
        """True for blocks of one child under an `nn.Sequential` or `nn.ModuleList`, with a forward of their own."""
        return self.chain.period == 1 and not self.chain.by_name and not self.leaves and not is_bare(self.blocks[0])


def runs(model: nn.Module) -> Iterator[Run]:
    """Find all candidates, those of outer containers first.

    Args:
        model: The full network.

    Yields:
        The candidates.
    """
    uses, known = _uses(model), dict[int, object]()
    for container, module in named_modules(model):
        if isinstance(module, ScriptModule):  # its children cannot be taken out
            continue
        by_name = not isinstance(module, nn.Sequential | nn.ModuleList)
        children = list(children_of(module).values())
        # Of attributes, only those with a namesake of their class are looked at, to save time.
        classes = [compatibility.original_class(child).__qualname__ if by_name and child else "" for child in children]
        number = Counter(classes)
        signatures: list[object] = []
        for child, name in zip(children, classes, strict=True):
            signature: object = None
            if child is not None and (not by_name or number[name] > 1) and _is_block(child, uses):
                if id(child) not in known:
                    known[id(child)] = list(compatibility.fixed(child).items())
                signature = known[id(child)]
            signatures.append(signature)
        keys = tuple(children_of(module))
        for start, end, period in spans(signatures):
            members = [child for child in children[start:end] if child is not None]
            groups = [members[i : i + period] for i in range(0, end - start, period)]
            blocks = tuple(group[0] if period == 1 else nn.ModuleList(group) for group in groups)
            leaves = all(is_layer(member) for member in members)
            if leaves and (by_name or isinstance(module, nn.Sequential)):
                continue  # an nn.Sequential calls its layers one after another
            yield Run(Chain(container, start, end - 1, keys, period=period, by_name=by_name), blocks, leaves)


def is_layer(module: nn.Module) -> bool:
    """True for a layer of torch itself.

    Args:
        module: Any module.

    Returns:
        True for a module of `torch.nn` without children.
    """
    return next(module.children(), None) is None and type(module).__module__.startswith("torch.nn")


def _is_block(module: nn.Module, uses: Counter[int]) -> bool:
    """True for a module with parameters, which no other module uses.

    `uses` counts the names of each parameter in the whole model, by id.
    """
    within = _uses(module)
    return bool(within) and all(uses[parameter] == number for parameter, number in within.items())


def _uses(module: nn.Module) -> Counter[int]:
    """Number of names of each parameter, by its id."""
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
