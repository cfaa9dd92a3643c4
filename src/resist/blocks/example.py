"""Example: one batch, with which a network is run and the arguments of its blocks are recorded.

An example ends guessing: a block that takes a mask, a table or a time step is tried with those that it gets in the
network.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from resist.blocks.outside import OutsideSkips
from resist.blocks.rehearsal import Forward, Rehearsal, snapshot, stand_in
from resist.blocks.runs import Run, runs
from resist.blocks.streams import Call
from resist.blocks.trial import called_names
from resist.errors import UserError

MOST_ITEMS = 4  # a larger batch is cut to so many items, where all its tensors have the same first dimension


def as_forward(example: object) -> Forward:
    """Make a function that calls a network with an example.

    Every call gets copies on the CPU, so a network may write into its input. A batch of more than `MOST_ITEMS` items is
    cut if the network takes the shorter one.

    Args:
        example: A tensor; a tuple or list, whose items are the positional arguments, or if the network does not take
            them the first item alone (loaders give images and labels); a dict of keyword arguments; or a function that
            calls a network, as in `lambda model: model(batch, steps=3)`. Any other object is the only argument.

    Returns:
        The function. It raises what the network raises.

    Raises:
        UserError: If the example is a network, a class or an iterator.
    """
    if isinstance(example, nn.Module | type):
        raise UserError(
            f"`example` is {example if isinstance(example, type) else type(example).__name__}; give a batch, or a "
            "function that calls a network, as in example=lambda model: model(batch)"
        )
    if isinstance(example, Iterator):
        raise UserError("`example` is an iterator; give one batch of it, as in example=next(iter(loader))")
    if callable(example) and not isinstance(example, Tensor):
        return cast(Forward, example)
    return _Batch(example)


class _Batch:
    """Calls networks with a batch, always in the form that the first network took."""

    def __init__(self, example: object) -> None:
        whole = [_call_of(example)]
        if isinstance(example, tuple | list) and len(cast(Sequence[object], example)) > 1:
            whole.append(Call((cast(Sequence[object], example)[0],)))
        self._calls = [call for one in whole for call in (_cut(one), one) if call is not None]

    def __call__(self, model: nn.Module) -> object:
        failure: Exception | None = None
        for number, call in enumerate(self._calls):
            if len(self._calls) > 1 and not _binds(model, call):
                continue
            copied = snapshot(call)
            try:
                output = model(*copied.args, **copied.kwargs)
            except Exception as error:  # models of users can raise anything; another form may fit
                failure = error
                continue
            self._calls = [self._calls[number]]
            return output
        if failure is None:  # no form fits the signature: the network itself says so
            call = snapshot(self._calls[0])
            return model(*call.args, **call.kwargs)
        raise failure


def _binds(model: nn.Module, call: Call) -> bool:
    """True if the network's signature takes these arguments."""
    try:
        inspect.signature(model.forward).bind(*call.args, **call.kwargs)
    except TypeError:
        return False
    except ValueError:  # it has no signature
        return True
    return True


def _call_of(example: object) -> Call:
    if isinstance(example, Mapping):
        return Call((), {str(name): value for name, value in cast(Mapping[object, object], example).items()})
    if isinstance(example, tuple | list):
        return Call(tuple(cast(Sequence[object], example)))
    return Call((example,))


def _cut(call: Call) -> Call | None:
    """The call with fewer items; None if the first dimensions differ, or there are few."""
    tree = call.args, dict(call.kwargs)
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1 or max(sizes) <= MOST_ITEMS:
        return None
    return Call(*tree_map(_shorter, tree))


def _shorter(leaf: object) -> object:
    return leaf[:MOST_ITEMS] if isinstance(leaf, Tensor) else leaf


@dataclass(frozen=True)
class Seen:
    """What runs with one example show of a network.

    Attributes:
        runs: Candidates for chains.
        calls: First call of every module of their blocks, by dotted name. The arguments are copies. A module that is
            not called is left out.
        outside: Tests for skip connections outside of blocks.
    """

    runs: tuple[Run, ...]
    calls: Mapping[str, Call]
    outside: OutsideSkips


def look(rehearsal: Rehearsal, model: nn.Module, base: nn.Module) -> Seen:
    """Run a copy of a network with an example, and record the calls of what may be blocks.

    Args:
        rehearsal: The example.
        model: The full network. It is not changed.
        base: A copy of it, with any weights. It is not changed either.

    Returns:
        What has been seen.
    """
    candidates = tuple(runs(model))
    names = {name for run in candidates for block in range(len(run.blocks)) for name in called_names(run, block)}
    copied = stand_in(base)
    calls: dict[str, Call] = {}

    def recorder(name: str) -> Callable[..., None]:
        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name not in calls:
                calls[name] = snapshot(Call(args, kwargs))

        return record

    for name in names:
        copied.get_submodule(name).register_forward_pre_hook(recorder(name), with_kwargs=True)
    rehearsal.run(copied)
    return Seen(candidates, calls, OutsideSkips(rehearsal, base))
