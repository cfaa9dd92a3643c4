"""Validate a model for ResIST with one forward pass of each sub-network.

The model has to satisfy four laws:

1. A sub-network that holds every block computes the same as the network: bit for bit, or up to rounding if its weights
   have another alignment in memory, because kernels may then sum in another order.
2. A sub-network computes the same as the network with the other blocks bypassed. A network that treats its layers by
   position (`for i, block in enumerate(blocks)` with other values for each i) does not.
3. Every block of a chain is called once, in ascending order, with a tensor, and returns one of the same shape.
4. The blocks are residual, tested as in `resist.subnet.residual` with the inputs that they get in the network.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.subnet import residual
from resist.subnet.chain import Chain
from resist.subnet.chains import choose_chains
from resist.subnet.example import as_forward, record_calls
from resist.subnet.forms import choose_forms
from resist.subnet.network import Subnet, tensors_of
from resist.subnet.rehearsal import Forward
from resist.subnet.residual import Call, hidden_in, hidden_out, with_hidden

ROUNDING = 1e-4  # relative difference that another order of summation can cause, after a hundred layers


def check_network(model: nn.Module, chains: Sequence[Chain], forward: Forward) -> float:
    """Check that the network satisfies the laws above.

    The test runs a copy with larger weights, because initial weights can be so small that a difference between blocks
    is less than the rounding.

    Args:
        model: The full network on the CPU. It is not changed.
        chains: Chains to partition.
        forward: Function that calls a network with one batch, `lambda model: model(images)` for example.

    Returns:
        Largest difference between the outputs of the first law, relative to the largest number; 0.0 means bit for bit.

    Raises:
        UserError: If the network breaks a law, with the chain and the reason.
    """
    model = _randomized(model).cpu().eval()
    with torch.no_grad():
        calls, expected = _record(model, chains, forward)
        for chain in chains:
            _check_skips(model, chain, calls)
        all_blocks = [list(range(chain.num_blocks)) for chain in chains]
        difference = _compare(model, chains, all_blocks, forward, expected)
        # Hold the even blocks, then the odd ones: neighbors are missing, and each end of a chain is missing once.
        for keep in (0, 1):
            held = [[block for block in blocks if block % 2 == keep] for blocks in all_blocks]
            _compare(model, chains, held, forward, _without(model, chains, held, forward))
    return difference


def choose_checked(model: nn.Module, names: Sequence[str], example: object) -> tuple[Chain, ...]:
    """Choose the chains to partition, and check the network with an example.

    Args:
        model: The full network. It is not changed.
        names: Names of chains; see `resist.subnet.chains.choose_chains`.
        example: One batch, or a function that calls a network; see `resist.subnet.example.as_forward`.

    Returns:
        The chains.

    Raises:
        UserError: If there is no such chain, or if the network breaks a law; see `check_network`.
    """
    forward = as_forward(example)
    calls = record_calls(model, forward)
    return choose_forms(model, choose_chains(model, names, calls, forward), forward, check_network, calls)


def _randomized(model: nn.Module) -> nn.Module:
    """A copy with weights that keep the size of activations, gains around one."""
    randomized = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in randomized.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if sum(size > 1 for size in parameter.shape) >= 2:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise + (0.0 if "bias" in name.rpartition(".")[2] else 1.0))
    return randomized


def _record(model: nn.Module, chains: Sequence[Chain], forward: Forward) -> tuple[dict[str, Call], object]:
    """The call of every block by name, and the network's output."""
    order: list[tuple[int, str]] = []
    calls: dict[str, Call] = {}
    handles: list[Any] = []
    for number, chain in enumerate(chains):
        for name, _ in (branch for block in range(chain.num_blocks) for branch in chain.scaled(block)):

            def record(
                _module: nn.Module,
                args: tuple[Any, ...],
                kwargs: dict[str, Any],
                output: object,
                number: int = number,
                name: str = name,
            ) -> None:
                x, y = hidden_in(args, kwargs), hidden_out(output)
                if x is None or y is None or x.shape != y.shape:
                    raise UserError(
                        f"{name} does not take a tensor and return one of the same shape, alone or first in a tuple: "
                        "it cannot be left out of a sub-network; partition another chain"
                    )
                order.append((number, name))
                calls[name] = Call(args, kwargs).with_input(x.clone())  # a block may write into its input

            handles.append(model.get_submodule(name).register_forward_hook(record, with_kwargs=True))
    try:
        output = forward(model)
    finally:
        for handle in handles:
            handle.remove()
    for number, chain in enumerate(chains):
        called = [name for chain_number, name in order if chain_number == number]
        if called != [name for block in range(chain.num_blocks) for name, _ in chain.scaled(block)]:
            raise UserError(
                f"the network does not call the blocks of {chain.name} once each, one after another; partition "
                "another chain"
            )
    return calls, output


def _check_skips(model: nn.Module, chain: Chain, calls: Mapping[str, Call]) -> None:
    for name, skip_type in (branch for block in range(chain.num_blocks) for branch in chain.scaled(block)):
        module = model.get_submodule(name)
        if skip_type != residual.OUTSIDE and residual.skip_of(module, calls[name]) not in residual.RESIDUAL:
            reason = residual.reason_without_skip(module, calls[name])
            raise UserError(f"{name} is not a residual block: {reason}; partition another chain")


def _without(model: nn.Module, chains: Sequence[Chain], held: Sequence[Sequence[int]], forward: Forward) -> object:
    """Output of the network with the blocks that are not held bypassed."""

    def skip(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        x = hidden_in(args, kwargs)
        assert x is not None, "_record has checked it"
        return with_hidden(output, x)

    def add_nothing(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> object:
        y = hidden_out(output)
        assert y is not None, "_record has checked it"
        return with_hidden(output, torch.zeros_like(y))

    handles = [
        model.get_submodule(name).register_forward_hook(
            add_nothing if skip_type == residual.OUTSIDE else skip, with_kwargs=True
        )
        for chain, blocks in zip(chains, held, strict=True)
        for block in range(chain.num_blocks)
        if block not in blocks
        for name, skip_type in chain.scaled(block)
    ]
    try:
        return forward(model)
    finally:
        for handle in handles:
            handle.remove()


def _compare(
    model: nn.Module, chains: Sequence[Chain], held: Sequence[Sequence[int]], forward: Forward, expected: object
) -> float:
    """Difference to the expected output; UserError if it is more than rounding."""
    subnet = Subnet(model, chains, [len(blocks) for blocks in held])
    subnet.load(tensors_of(model), held)
    names = " and ".join(f"{' '.join(map(str, blocks))} of {c.name}" for blocks, c in zip(held, chains, strict=True))
    try:
        output = forward(subnet.model.eval())
    except Exception as error:  # models of users can raise anything
        raise UserError(
            f"a sub-network with blocks {names} cannot be run ({_line(error)}): the network depends on its number of "
            "blocks; partition another chain"
        ) from error
    difference = _difference(tensors_in(output), tensors_in(expected))
    if not difference < ROUNDING:  # also if it is NaN
        raise UserError(
            f"a sub-network with blocks {names} does not compute the same as the network without the others: "
            "a part of it depends on the position of a block; partition another chain"
        )
    return difference


def _difference(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference between two outputs, relative to the largest number."""
    if [tensor.shape for tensor in outputs] != [tensor.shape for tensor in expected]:
        return math.inf
    shares = [0.0]
    for tensor, reference in zip(outputs, expected, strict=True):
        if tensor.is_floating_point() and not torch.equal(tensor, reference):
            shares.append(float((tensor - reference).abs().max() / reference.abs().max()))
    return math.nan if any(map(math.isnan, shares)) else max(shares)


def tensors_in(value: object) -> list[Tensor]:
    """Collect the tensors in an output.

    Args:
        value: A tensor, or nested tuples, lists and dicts of tensors.

    Returns:
        The tensors in their order. Other values are ignored.
    """
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(cast(dict[object, object], value).values())
    items = cast(Sequence[object], value) if isinstance(value, tuple | list) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def _line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
