"""Placement: the attributes that differ along a chain, in the slots of one sub-network."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import dis
import inspect
import logging
import weakref
from collections.abc import Sequence
from types import CodeType, FunctionType

from torch import nn
from torch.jit import ScriptModule

from resist.blocks.attributes import AttributeKey, Varying
from resist.blocks.compiling import allow_graphs, num_combinations
from resist.blocks.contents import attributes_of_module, is_leaf
from resist.blocks.modules import named_modules

log = logging.getLogger(__name__)


class Placement:
    """The attributes that differ, in the slots of one sub-network.

    An attribute is put into the slots until somebody else changes it in one of them: the user, whose drop-path schedule
    must not be undone by the next round, or the module's own `forward`. From then on it is left as it is, in all slots
    of the chain; only a block that is new in the sub-network gets the value of build time.
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
        for attribute in varying:
            key = chain, (attribute.module, attribute.name)
            changed = next((block for block, _ in slots if not attribute.is_put(block, last[id(block)])), None)
            if changed is not None and key not in self._left_alone:
                self._left_alone.add(key)
                self._say(changed, key[1], chain, noted)
            for block, number in slots:
                if last[id(block)] is None or (key not in self._left_alone and last[id(block)] != number):
                    attribute.put(block, number)
        self._expect_graphs(varying, len(slots), chain, noted)
        known = {(attribute.module, attribute.name) for attribute in varying}
        for block, number, identity in named:
            plain = _plain(block)
            _, _, before = self._last.get(id(identity), (None, None, plain))
            for key, value in plain.items():
                if key not in known and key in before and (type(before[key]), before[key]) != (type(value), value):
                    self._say(block, key, chain, noted)
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

    def _say(self, block: nn.Module, key: AttributeKey, chain: str, noted: set[str]) -> None:
        """Say once that an attribute has been changed; quietly if the module does that itself."""
        name = ".".join(filter(None, key))
        if name in noted:
            return
        noted.add(name)
        level = logging.INFO if _sets_itself(block.get_submodule(key[0]), key[1]) else logging.WARNING
        log.log(
            level,
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


def _sets_itself(module: nn.Module, name: str) -> bool:
    """True if the code that a forward pass of the module runs assigns this attribute."""
    seen: set[str] = set()
    names = ["forward"]
    while names:
        method = names.pop()
        if method in seen:
            continue
        seen.add(method)
        function = inspect.getattr_static(type(module), method, None)
        codes = [function.__code__] if isinstance(function, FunctionType) else []
        while codes:
            code = codes.pop()
            if any(i.opname in ("STORE_ATTR", "DELETE_ATTR") and i.argval == name for i in dis.get_instructions(code)):
                return True
            names += code.co_names
            codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return False
