"""Placement: the attributes that differ along a chain, in the slots of one sub-network."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import logging
import weakref
from collections.abc import Sequence

from torch import nn
from torch.jit import ScriptModule

from resist.blocks.attributes import AttributeKey, Varying
from resist.blocks.compiling import allow_graphs, num_combinations
from resist.blocks.contents import attributes_of_module, clear_caches, is_leaf
from resist.blocks.modules import named_modules
from resist.blocks.own_changes import is_changed_by_itself

log = logging.getLogger(__name__)


class Placement:
    """The attributes that differ, in the slots of one sub-network.

    An attribute is put into the slots until the user changes it in one of them: a drop-path schedule must not be undone
    by the next round. From then on it is left as it is, in all slots of the chain, which a note says once; only a block
    that is new in the sub-network gets the value of build time. What the blocks' own code changes goes with its block,
    see `resist.subnet.python_state`.
    """

    def __init__(self) -> None:
        # Number of the chain's block whose values were put last, and plain attributes as they were then.
        self._last: dict[int, tuple[weakref.ref[nn.Module], int, dict[AttributeKey, object]]] = {}
        self._left_alone: set[tuple[str, AttributeKey]] = set()

    def put(
        self, slots: Sequence[tuple[nn.Module, int]], varying: Sequence[Varying], *, chain: str, noted: set[str]
    ) -> None:
        """Put the values of the blocks held into the slots of a chain.

        Args:
            slots: Each block of the sub-network, with the number of the chain's block that is in it now.
            varying: Attributes that differ along the chain.
            chain: Name of the chain, for notes.
            noted: What has been said about the chain; more is added.
        """
        # A block of several children is given in a new list each time.
        named = [(block, number, _identity(block)) for block, number in slots]
        last = {id(block): self._number(identity) for block, _, identity in named}
        new: dict[int, nn.Module] = {}
        for attribute in varying:
            key = chain, (attribute.module, attribute.name)
            changed = [block for block, _ in slots if not attribute.is_put(block, last[id(block)])]
            own = {id(block) for block in changed if attribute.is_changed_by_itself(block, last[id(block)])}
            if key not in self._left_alone and len(own) < len(changed):
                self._left_alone.add(key)
                _note(key[1], chain, noted)
            for block, number in slots:
                moves = key not in self._left_alone and last[id(block)] != number and id(block) not in own
                if last[id(block)] is None or moves:
                    attribute.put(block, number)
                    new[id(block)] = block
        for block in new.values():
            clear_caches(block)
        self._expect_graphs(varying, len(slots), chain, noted)
        known = {(attribute.module, attribute.name) for attribute in varying}
        for block, number, identity in named:
            plain = _plain(block)
            _, _, before = self._last.get(id(identity), (None, None, plain))
            for key, value in plain.items():
                if key in known or key not in before or (type(before[key]), before[key]) == (type(value), value):
                    continue
                if not is_changed_by_itself(block.get_submodule(key[0]), key[1], before[key], value):
                    _note(key, chain, noted)
            self._last[id(identity)] = weakref.ref(identity), number, plain

    def _expect_graphs(self, varying: Sequence[Varying], capacity: int, chain: str, noted: set[str]) -> None:
        """Prepare torch.compile for all combinations; it guards on everything but floats."""
        texts = [[_text(value) for value in attribute.values] for attribute in varying]
        texts = [text for text, attribute in zip(texts, varying, strict=True) if type(attribute.values[0]) is not float]
        if texts:
            number = num_combinations(list(zip(*texts, strict=True)), capacity)
            allow_graphs(number, chain, noted)

    def _number(self, module: nn.Module) -> int | None:
        reference, number, _ = self._last.get(id(module), (None, None, None))
        return number if reference is not None and reference() is module else None


def _note(key: AttributeKey, chain: str, noted: set[str]) -> None:
    """Say once that the user has changed an attribute."""
    name = ".".join(filter(None, key))
    if name not in noted:
        noted.add(name)
        log.warning(
            "%s of the blocks of %s was changed during training: it is left as it is, and does not go with the blocks",
            name,
            chain,
        )


def _identity(block: nn.Module) -> nn.Module:
    """The block, or the first member of one that is a list of several children, which is a new list each time."""
    return next(block.children()) if type(block) is nn.ModuleList else block


def _plain(block: nn.Module) -> dict[AttributeKey, object]:
    """Numbers, strings and flags of a block."""
    return {
        (prefix, name): value
        for prefix, module in named_modules(block)
        if not isinstance(module, ScriptModule)
        for name, value in attributes_of_module(module).items()
        if is_leaf(value) and value == value
    }


def _text(value: object) -> str:
    """Text that is equal for equal numbers, and for the same object."""
    return repr(value) if is_leaf(value) else repr(id(value))
