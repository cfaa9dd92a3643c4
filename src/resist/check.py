"""Whether a network keeps the laws that ResIST needs, tried with one batch.

1. A sub-network that holds every block computes what the network computes, bit for bit.
2. A sub-network computes what the network computes when the blocks that it does not hold are taken out. A network that
   numbers its layers by position (`for i, block in enumerate(blocks)` with something of its own for each i) does not.
3. Every block of a chain is called once, in ascending order, with a tensor, and gives one of the same shape.
4. The blocks are residual: see `resist.residual`, here with the inputs that they really get.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resist import residual
from resist.chains import Chain
from resist.errors import UserError
from resist.residual import Call, hidden_in, hidden_out, with_hidden
from resist.subnet import Subnet, tensors_of

Forward = Callable[[nn.Module], object]


def check_network(model: nn.Module, chains: Sequence[Chain], forward: Forward) -> None:
    """Raise UserError, in one line with the chain and the reason, where the network breaks one of these laws.

    model:   the full network on the host, with weights. It is left as it is, in eval mode.
    forward: calls the network that it is given with one batch, `lambda model: model(images)`.
    """
    model.eval()
    with torch.no_grad():
        calls, expected = _record(model, chains, forward)
        for chain, of_blocks in zip(chains, calls, strict=True):
            _check_skips(model, chain, of_blocks)
        everything = [list(range(chain.num_blocks)) for chain in chains]
        _compare(model, chains, everything, forward, expected)
        for keep in (0, 1):  # every other block: neighbours differ, and so do first and last
            held = [[block for block in blocks if block % 2 == keep] for blocks in everything]
            _compare(model, chains, held, forward, _without(model, chains, held, forward))


def _record(model: nn.Module, chains: Sequence[Chain], forward: Forward) -> tuple[list[list[Call]], object]:
    """The call of every block, and the network's output."""
    order: list[tuple[int, int]] = []
    calls: dict[tuple[int, int], Call] = {}
    handles: list[Any] = []
    for number, chain in enumerate(chains):
        for block in range(chain.num_blocks):

            def note(
                _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object,
                key: tuple[int, int] = (number, block), name: str = chain.block_name(block),
            ) -> None:
                x, y = hidden_in(args, kwargs), hidden_out(output)
                if x is None or y is None or x.shape != y.shape:
                    raise UserError(
                        f"{name} does not take a tensor and return one of the same shape, alone or first in a tuple: it "
                        "cannot be left out of a sub-network; partition another chain"
                    )
                order.append(key)
                calls[key] = Call(args, kwargs).with_input(x.clone())  # a block may write into its input

            handles.append(model.get_submodule(chain.block_name(block)).register_forward_hook(note, with_kwargs=True))
    try:
        output = forward(model)
    finally:
        for handle in handles:
            handle.remove()
    for number, chain in enumerate(chains):
        if [block for of_chain, block in order if of_chain == number] != list(range(chain.num_blocks)):
            raise UserError(
                f"the network does not call the blocks of {chain.name} once each, one after another; partition another chain"
            )
    return [[calls[number, block] for block in range(c.num_blocks)] for number, c in enumerate(chains)], output


def _check_skips(model: nn.Module, chain: Chain, calls: Sequence[Call]) -> None:
    kinds = [residual.skip_of(model.get_submodule(chain.block_name(b)), call) for b, call in enumerate(calls)]
    for block, kind in enumerate(kinds):
        if kind not in residual.RESIDUAL:
            raise UserError(
                f"{chain.block_name(block)} is no residual block: with all its weights zero it does not give its input "
                "back; partition another chain"
            )


def _without(model: nn.Module, chains: Sequence[Chain], held: Sequence[Sequence[int]], forward: Forward) -> object:
    """What the network gives when each block that is not held gives its input back."""

    def skip(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        x = hidden_in(args, kwargs)
        assert x is not None, "_record has looked"
        return with_hidden(output, x)

    handles = [
        model.get_submodule(chain.block_name(block)).register_forward_hook(skip, with_kwargs=True)
        for chain, blocks in zip(chains, held, strict=True)
        for block in range(chain.num_blocks)
        if block not in blocks
    ]
    try:
        return forward(model)
    finally:
        for handle in handles:
            handle.remove()


def _compare(
    model: nn.Module, chains: Sequence[Chain], held: Sequence[Sequence[int]], forward: Forward, expected: object
) -> None:
    subnet = Subnet(model, chains, [len(blocks) for blocks in held])
    subnet.load(tensors_of(model), held)
    names = ", ".join(chain.name for chain in chains)
    blocks = " and ".join(" ".join(map(str, each)) for each in held)
    try:
        got = forward(subnet.model.eval())
    except Exception as error:  # whatever a model of anybody's raises
        raise UserError(
            f"a sub-network with blocks {blocks} of {names} cannot be run ({_line(error)}): the network counts on its "
            "number of blocks; partition another chain"
        ) from error
    mine, theirs = tensors_in(got), tensors_in(expected)
    whole = all(len(each) == chain.num_blocks for each, chain in zip(held, chains, strict=True))
    same = len(mine) == len(theirs) and all(
        one.shape == other.shape
        and (torch.equal(one, other) if whole else torch.allclose(one, other, rtol=1e-4, atol=1e-5))
        for one, other in zip(mine, theirs, strict=False)
    )
    if not same:
        raise UserError(
            f"a sub-network with blocks {blocks} of {names} does not compute what the network computes without the others:"
            " something in it goes by the position of a block; partition another chain"
        )


def tensors_in(value: object) -> list[Tensor]:
    """The tensors in an output: a tensor, or tuples, lists, dicts and named fields of them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for item in value for t in tensors_in(item)] if isinstance(value, tuple | list) else []


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
