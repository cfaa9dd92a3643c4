"""Whether a network keeps the laws that ResIST needs, tried with one batch.

1. A sub-network that holds every block computes what the network computes: bit for bit, or but for rounding where its
   weights are aligned otherwise in memory, for which the kernels of a processor may add up in another order.
2. A sub-network computes what the network computes when the blocks that it does not hold are taken out. A network that
   numbers its layers by position (`for i, block in enumerate(blocks)` with something of its own for each i) does not.
3. Every block of a chain is called once, in ascending order, with a tensor, and gives one of the same shape.
4. The blocks are residual: see `resist.subnet.residual`, here with the inputs that they really get.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.subnet import residual
from resist.subnet.chains import Chain
from resist.subnet.network import Subnet, tensors_of
from resist.subnet.residual import Call, hidden_in, hidden_out, with_hidden

ROUNDING = 1e-4  # of outputs that differ in the order of summation only, after a hundred layers

Forward = Callable[[nn.Module], object]


def check_network(model: nn.Module, chains: Sequence[Chain], forward: Forward) -> float:
    """Raise UserError, in one line with the chain and the reason, where the network breaks one of these laws.
    Returns how far the outputs of the first law are apart, as a share of the largest number; 0.0 is bit for bit.

    model:   the full network on the host. It is left as it is: a copy with larger weights is tried, for fresh ones can
             be so small that a difference between blocks drowns in the rounding.
    forward: calls the network that it is given with one batch, `lambda model: model(images)`.
    """
    model = _randomized(model).eval()
    with torch.no_grad():
        calls, expected = _record(model, chains, forward)
        for chain, of_blocks in zip(chains, calls, strict=True):
            _check_skips(model, chain, of_blocks)
        everything = [list(range(chain.num_blocks)) for chain in chains]
        apart = _compare(model, chains, everything, forward, expected)
        for keep in (0, 1):  # every other block: neighbors differ, and so do first and last
            held = [[block for block in blocks if block % 2 == keep] for blocks in everything]
            _compare(model, chains, held, forward, _without(model, chains, held, forward))
    return apart


def _randomized(model: nn.Module) -> nn.Module:
    """A copy in which every weight matters: matrices that keep the size of what goes through, gains about one."""
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if sum(size > 1 for size in parameter.shape) >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if "bias" in name.rpartition(".")[2] else 1.0))
    return found


def _record(model: nn.Module, chains: Sequence[Chain], forward: Forward) -> tuple[list[list[Call]], object]:
    """The call of every block, and the network's output."""
    order: list[tuple[int, int]] = []
    calls: dict[tuple[int, int], Call] = {}
    handles: list[Any] = []
    for number, chain in enumerate(chains):
        for block in range(chain.num_blocks):

            def note(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: object,
                key: tuple[int, int] = (number, block),
                name: str = chain.block_name(block),
            ) -> None:
                x, y = hidden_in(args, kwargs), hidden_out(output)
                if x is None or y is None or x.shape != y.shape:
                    raise UserError(
                        f"{name} does not take a tensor and return one of the same shape, alone or first in a tuple: "
                        "it cannot be left out of a sub-network; partition another chain"
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
                f"the network does not call the blocks of {chain.name} once each, one after another; partition "
                "another chain"
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
) -> float:
    subnet = Subnet(model, chains, [len(blocks) for blocks in held])
    subnet.load(tensors_of(model), held)
    what = " and ".join(f"{' '.join(map(str, each))} of {c.name}" for each, c in zip(held, chains, strict=True))
    try:
        got = forward(subnet.model.eval())
    except Exception as error:  # whatever a model of anybody's raises
        raise UserError(
            f"a sub-network with blocks {what} cannot be run ({_line(error)}): the network counts on its number of "
            "blocks; partition another chain"
        ) from error
    apart = _apart(tensors_in(got), tensors_in(expected))
    if not apart < ROUNDING:
        raise UserError(
            f"a sub-network with blocks {what} does not compute what the network computes without the others: "
            "something in it goes by the position of a block; partition another chain"
        )
    return apart


def _apart(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference between the numbers of two outputs, as a share of the largest number."""
    if [one.shape for one in ones] != [other.shape for other in others]:
        return math.inf
    shares = [0.0]
    for one, other in zip(ones, others, strict=True):
        if one.is_floating_point() and not torch.equal(one, other):
            shares.append(float((one - other).abs().max() / other.abs().max()))
    return math.nan if any(map(math.isnan, shares)) else max(shares)


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
