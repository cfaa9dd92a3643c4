"""Zeroing: copies of single blocks whose weights are set, and inputs for them."""

import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_map

from resist.blocks.modules import BatchNorm, children_of, fork_rng, pre_hook_tables
from resist.blocks.rehearsal import stand_in
from resist.blocks.streams import Call

SIZES = 6  # largest number of channel counts to try for a block
TOKENS, MOST_TOKENS = 16, 1024  # default and largest number of tokens to try


@contextmanager
def alone() -> Generator[None]:
    """Context in which blocks run on the CPU, even if the default device is meta, and leave no trace."""
    with torch.device("cpu"), fork_rng(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def copy_on_cpu(block: nn.Module) -> nn.Module:
    """Copy a block in evaluation mode, with BatchNorm in training mode.

    Args:
        block: A block on any device, meta included. It is not changed.

    Returns:
        The copy, on the CPU. Layers in it whose weight is computed return zeros.
    """
    trial = stand_in(block, own_weights=True, to_cpu=False)
    if any(tensor.is_meta for tensor in (*trial.parameters(), *trial.buffers())):
        trial.to_empty(device="cpu")
        for buffer in trial.buffers():
            buffer.zero_()
    trial.cpu().eval()
    for module in trial.modules():
        if isinstance(module, BatchNorm):
            module.train()
        if module is not trial and _is_normalized(module):  # its weight does not become zero with its parameters
            module.register_forward_hook(_return_zeros)
    return trial


def _is_normalized(module: nn.Module) -> bool:
    """True for a layer whose weight is computed: parametrizations, and the hooks of old weight and spectral norms."""
    hooks = pre_hook_tables(module)[0].values()
    return "parametrizations" in children_of(module) or any(isinstance(h, WeightNorm | SpectralNorm) for h in hooks)


def _return_zeros(_module: nn.Module, _args: object, output: object) -> object:
    return tree_map(_zeros, output)


def _zeros(leaf: object) -> object:
    return torch.zeros_like(leaf) if isinstance(leaf, Tensor) else leaf


def fill(trial: nn.Module, gain: float, *, with_buffers: bool = False) -> bool:
    """Set matrices and biases to zero, and gains to a number.

    Args:
        trial: A copy of a block, changed in place.
        gain: Value of the gains.
        with_buffers: Set variances to one and other buffers to zero too: those of a frozen BatchNorm are weights.

    Returns:
        False if there are no such buffers.
    """
    for name, parameter in trial.named_parameters():
        vector = sum(size > 1 for size in parameter.shape) < 2 and "bias" not in name.rpartition(".")[2]
        parameter.fill_(gain if vector else 0.0)
    filled = not with_buffers
    for module in trial.modules() if with_buffers else ():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and not isinstance(module, BatchNorm):
                buffer.fill_(1.0 if "var" in name else 0.0)
                filled = True
    return filled


def guesses(block: nn.Module) -> Iterator[Call]:
    """Guess inputs: images, tokens and vectors with channel counts that fit the weights.

    Args:
        block: A block on the CPU.

    Yields:
        Calls with one tensor.
    """
    parameters = list(block.parameters())
    if not parameters:
        return
    sizes: dict[int, None] = {}
    for module in block.modules():
        for name in ("in_channels", "num_features", "normalized_shape", "num_channels", "in_features"):
            size: object = getattr(module, name, None)
            if isinstance(size, tuple | list) and size:
                size = cast(Sequence[object], size)[-1]
            if isinstance(size, int) and size > 0:
                sizes.setdefault(size)
    for parameter in parameters:
        sizes.update(dict.fromkeys((*parameter.shape[:2], parameter.shape[-1]) if parameter.dim() else ()))
    channels = list(sizes)[:SIZES]
    # The number of tokens of a mixer is a size of its weights, that of relative positions a size of their table.
    tables = [buffer.shape[-1] for buffer in block.buffers() if buffer.dim() >= 2]
    tokens = [n for n in dict.fromkeys((*channels, *tables)) if n <= MOST_TOKENS]
    for shape in (
        *(
            (2, *rest)
            for c in channels
            for rest in ((c, 8, 8), (TOKENS, c), (8, 8, c), (c,), (c, TOKENS), (c, 2, 8, 8))
        ),
        *((2, n, c) for c, n in product(channels, tokens)),
        *((2, *rest) for c in channels for rest in ((c, 14, 14), (14, 14, c))),  # windows of 7 by 7
    ):
        yield Call((torch.zeros(shape, dtype=parameters[0].dtype),))
