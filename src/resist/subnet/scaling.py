"""Scaling: the forward hooks that multiply the branch of a chain block in the full network.

A block x + f(x) becomes x + scale * f(x). `scale_branches` sets the hooks of whole chains, `scale_blocks` those of
named blocks, `scales_of` reads them back and `unhook` removes one."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from resist.errors import UserError
from resist.subnet.chains import Chain
from resist.subnet.residual import hidden_in, hidden_out, with_hidden


class ScaleBranch:
    """Forward hook that turns a block's x + f(x) into x + scale * f(x). A class, so that the model can be pickled.

    x is the block's first argument, or the first tensor among named ones; of a tuple that a block returns, the first
    tensor is scaled. Raises UserError for a block that is called otherwise.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        x, y = hidden_in(args, kwargs), hidden_out(output)
        if x is None or y is None or x.shape != y.shape:
            raise UserError(
                f"a {type(module).__name__} cannot be scaled: it has to take a tensor and return one of the same "
                "shape, alone or first in a tuple; partition another chain, or give scale=1.0"
            )
        return with_hidden(output, torch.lerp(x.to(y.dtype), y, self.scale))


def scale_branches(model: nn.Module, chains: Sequence[Chain], scales: Sequence[float]) -> None:
    """Multiply the branch of every chain block of a full network by its chain's scale, from the next forward on."""
    for chain, scale in zip(chains, scales, strict=True):
        for block in range(chain.num_blocks):
            if scale != 1.0:
                model.get_submodule(chain.block_name(block)).register_forward_hook(ScaleBranch(scale), with_kwargs=True)


def scales_of(model: nn.Module) -> dict[str, float]:
    """The scale of each block whose branch is scaled by a hook, by dotted name, in the model's order."""
    return {
        name: hook.scale
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if isinstance(hook, ScaleBranch)
    }


def scale_blocks(model: nn.Module, scales: Mapping[str, float]) -> nn.Module:
    """Scale the branches of these blocks by hooks, from the next forward on: what `scales_of` undoes.

    Raises UserError where the model has no such block.
    """
    for name, scale in scales.items():
        container, _, key = name.rpartition(".")
        try:
            keys = tuple(model.get_submodule(container)._modules)
            index = keys.index(key)
        except (AttributeError, ValueError) as error:
            raise UserError(f"the model has no block {name!r} to scale; build the network that was exported") from error
        scale_branches(model, [Chain(container, index, index, keys)], [float(scale)])
    return model


def unhook(block: nn.Module) -> None:
    """Take the scale off one block."""
    for key in [key for key, hook in block._forward_hooks.items() if isinstance(hook, ScaleBranch)]:
        for table in (block._forward_hooks, block._forward_hooks_with_kwargs, block._forward_hooks_always_called):
            cast(dict[int, object], table).pop(key, None)
