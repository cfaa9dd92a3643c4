"""Batches from which statistics are estimated: inputs of the network, numbered, without a remainder of one example."""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import cast

import torch
from torch import Tensor

from resist.errors import UserError

Inputs = Tensor | Mapping[str, object]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NumberedBatches:
    """Batches that can be iterated from any number on, so that each process reads its share only.

    None of them has a single example, unless there is only one in all.

    Attributes:
        num: Number of batches.
        read: Iterates over the batches of some consecutive numbers.
    """

    num: int
    read: Callable[[range], Iterator[object]]

    def __iter__(self) -> Iterator[object]:
        return self.read(range(self.num))

    def __len__(self) -> int:
        return self.num


def numbered_inputs(batches: Iterable[object], index: int = 0, count: int = 1) -> Iterator[tuple[int, Inputs]]:
    """Iterate over the inputs of the network in a share of the batches.

    A last batch of one example is part of the batch before it: its own statistics would count as much as those of a
    whole batch, and where a feature map is a single pixel there are none. If the two cannot be joined, because they
    differ in more than their number of examples, it is left out, with a message.

    Args:
        batches: Tensors, dictionaries of keyword arguments, or tuples that begin with one of these.
        index: Number of the share.
        count: Number of shares. Batches of other shares are read too, unless `batches` are `NumberedBatches`.

    Yields:
        The number of each batch, from 0, and its inputs.

    Raises:
        UserError: If a batch is none of these.
    """
    if isinstance(batches, NumberedBatches):
        numbers = range(index * batches.num // count, (index + 1) * batches.num // count)
        return zip(numbers, _inputs(batches.read(numbers)), strict=True)
    return islice(enumerate(_joined(_inputs(batches))), index, None, count)


def num_examples(inputs: Inputs) -> int | None:
    """Return the number of examples in a batch: the first dimension of its first tensor; None without one."""
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs.values()
    return next((len(tensor) for tensor in tensors if isinstance(tensor, Tensor) and tensor.ndim), None)


def _inputs(batches: Iterable[object]) -> Iterator[Inputs]:
    """Inputs of the network in each batch."""
    for batch in batches:
        type_name = type(batch).__name__
        first: object = next(iter(cast(Sequence[object], batch)), None) if isinstance(batch, list | tuple) else batch
        if not isinstance(first, Tensor | Mapping):
            raise UserError(
                f"full_model got batches of type {type_name}; give tensors, dictionaries of the network's "
                "arguments, or tuples that begin with one"
            )
        yield cast(Inputs, first)


def _joined(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """The batches; a last one of one example is part of the one before it."""
    held: list[Inputs] = []  # a batch, and one of a single example after it
    for inputs in batches:
        if len(held) == 2 or (held and num_examples(inputs) != 1):
            yield held.pop(0)
        if held and num_examples(inputs) != 1:
            yield held.pop(0)
        held.append(_copied(inputs))  # an iterator may write the next batch into the same memory
    if len(held) == 2:
        before, single = held
        try:
            held = [_join(before, single, num_examples(before))]
        except _ShapesDifferError:
            held = [before]
            log.warning(
                "the last batch has one example, which cannot be joined to the batch before it, of other shapes; "
                "BatchNorm statistics are estimated without it"
            )
    yield from held


def _copied(inputs: Inputs) -> Inputs:
    if isinstance(inputs, Tensor):
        return inputs.clone()
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}


class _ShapesDifferError(Exception):
    pass


def _join(before: Inputs, single: Inputs, num: int | None) -> Inputs:
    """A batch of `num` examples and one of one example as one batch."""
    if isinstance(before, Tensor) or isinstance(single, Tensor):
        return cast(Tensor, _join_values(before, single, num))
    if before.keys() != single.keys():
        raise _ShapesDifferError
    return {name: _join_values(value, single[name], num) for name, value in before.items()}


def _join_values(before: object, single: object, num: int | None) -> object:
    """A value of a batch of `num` examples and of one of one example as one; one that is the same in both stays."""
    if isinstance(before, Tensor) and isinstance(single, Tensor):
        if before.ndim and single.ndim and (len(before), len(single)) == (num, 1):
            if (before.shape[1:], before.dtype) == (single.shape[1:], single.dtype):
                return torch.cat([before, single])
        elif torch.equal(before, single):
            return before
        raise _ShapesDifferError
    if isinstance(before, list | tuple) and isinstance(single, list | tuple):
        values, last = cast(Sequence[object], before), cast(Sequence[object], single)
        if (len(values), len(last)) == (num, 1):
            return [*values, *last]
        before, single = values, last
    with contextlib.suppress(RuntimeError, ValueError):  # arrays have no single truth value
        if before == single:
            return cast(object, before)
    raise _ShapesDifferError
