"""Bypass: what stands at the position of a block that a sub-network does not hold.

Only chains with the form in place need it, see `resist.blocks.chain`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain as chained
from typing import Any, cast

import torch
from torch import Tensor, nn

from resist.blocks.chain import IN_PLACE, Chain
from resist.blocks.contents import attributes_of_module, is_leaf
from resist.blocks.modules import children_of
from resist.blocks.residual import OUTSIDE, Call, hidden_in, hidden_out
from resist.blocks.responses import output_of

BARE = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Source = tuple[str, int | str | None]  # of an item of the output: "hidden", "args" or "kwargs" with its key, or "none"


class Bypass(nn.Module):
    """A block without parameters that returns its hidden state, or zero where the network adds what a block returns.

    Args:
        sources: Items of the output if it is a tuple or list; () for a tensor.
        form: Type of the output if it is a tuple or list.
        zero: Return zero in place of the hidden state.
        attributes: Attributes of the block that the network may read.
    """

    def __init__(
        self, sources: tuple[Source, ...], form: type, *, zero: bool, attributes: Mapping[str, object]
    ) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.resist_form, self.resist_sources, self.resist_zero = form, sources, zero

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the first argument, or zeros of its shape.

        Args:
            args: Arguments of the block: the hidden state, and others.
            kwargs: Arguments of the block.

        Returns:
            The hidden state in the form of the block's output. Other items are arguments that the block passes on, or
            None.
        """
        hidden = hidden_in(args, kwargs)
        assert hidden is not None, "the block was tried with a tensor"
        if self.resist_zero:
            hidden = torch.zeros_like(hidden)
        if not self.resist_sources:
            return hidden
        items: list[Any] = []
        for kind, key in self.resist_sources:
            if kind == "args" and isinstance(key, int):
                items.append(args[key] if key < len(args) else None)
            else:
                items.append(hidden if kind == "hidden" else kwargs.get(str(key)) if kind == "kwargs" else None)
        form = self.resist_form
        return form(*items) if hasattr(form, "_fields") else form(items)


def in_place(chain: Chain, model: nn.Module, calls: Mapping[str, Call] | None = None) -> Chain | None:
    """Give a chain the form in place.

    Args:
        chain: A chain of `model`.
        model: The full network.
        calls: A real call of each module by dotted name. Default: calls are guessed.

    Returns:
        The chain; None if the form of its blocks' outputs is not known, or has items that are neither None nor passed
        through.
    """
    skip_types = dict(chained.from_iterable(chain.scaled(block) for block in range(chain.num_blocks)))
    outputs: dict[str, tuple[tuple[Source, ...], type]] = {}  # by name within the block, found once for all blocks
    bypasses: list[tuple[nn.Module, ...]] = []
    for block in range(chain.num_blocks):
        members: list[nn.Module] = []
        for number, name in enumerate(chain.members(block)):
            made = _bypass(model.get_submodule(name), name, chain.piece(number, ""), skip_types, outputs, calls)
            if made is None:
                return None
            members.append(made)
        bypasses.append(tuple(members))
    return replace(chain, form=IN_PLACE, bypasses=tuple(bypasses))


def _bypass(
    module: nn.Module,
    name: str,
    inner: str,
    skip_types: Mapping[str, str],
    outputs: dict[str, tuple[tuple[Source, ...], type]],
    calls: Mapping[str, Call] | None,
) -> nn.Module | None:
    """A module in the place of `module`; a bare container stays one, with bypasses in it."""
    if name not in skip_types and is_bare(module):
        children: dict[str, nn.Module | None] = {}
        for key, child in children_of(module).items():
            children[key] = child and _bypass(child, f"{name}.{key}", f"{inner}.{key}", skip_types, outputs, calls)
            if child is not None and children[key] is None:
                return None
        container = nn.Sequential() if isinstance(module, nn.Sequential) else nn.ModuleList()
        container = nn.ModuleDict() if isinstance(module, nn.ModuleDict) else container
        children_of(container).update(children)
        return container
    if inner not in outputs:
        found = _output(module, None if calls is None else calls.get(name), required=calls is not None)
        if found is None:
            # A module that only takes part in a branch, such as its norm, passes anything on.
            if name in skip_types:
                return None
            found = (), Tensor
        outputs[inner] = found
    attributes = {key: value for key, value in attributes_of_module(module).items() if _is_plain(value)}
    sources, form = outputs[inner]
    return Bypass(sources, form, zero=skip_types.get(name) == OUTSIDE, attributes=attributes)


def _output(module: nn.Module, call: Call | None, *, required: bool) -> tuple[tuple[Source, ...], type] | None:
    """The form of a module's output; None if it is not known."""
    ran = None if required and call is None else output_of(module, call)
    if ran is None:
        return None
    call, output = ran
    x, y = hidden_in(call.args, call.kwargs), hidden_out(output)
    if x is None or y is None or x.shape != y.shape:
        return None
    if isinstance(output, Tensor):
        return (), Tensor
    sources: list[Source] = [("hidden", None)]
    for item in cast(Sequence[object], output)[1:]:
        source = _source(item, call)
        if source is None:
            return None
        sources.append(source)
    return tuple(sources), type(output)


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, cast(Sequence[object], value)))
    return is_leaf(value)


def _source(item: object, call: Call) -> Source | None:
    if item is None:
        return "none", None
    for kind, entries in (("args", enumerate(call.args)), ("kwargs", call.kwargs.items())):
        for key, value in entries:
            if value is item or (isinstance(value, Tensor) and isinstance(item, Tensor) and _equal(value, item)):
                return kind, key
    return None


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def is_bare(module: nn.Module) -> bool:
    """True for a container that has no forward of its own.

    Args:
        module: Any module.

    Returns:
        True for an `nn.Sequential`, `nn.ModuleList` or `nn.ModuleDict`, and subclasses that only hold children.
    """
    own: object = type(module).forward
    return any(own is container.forward for container in BARE)  # pyright: ignore[reportUnknownMemberType]
