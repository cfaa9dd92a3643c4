"""Seeded building: the same full network in every process."""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import nn

from resist.blocks.randomness import seeded_generators
from resist.blocks.wrappers import check_layers, unwrapped
from resist.errors import UserError
from resist.subnet.tensors import tensors_of


def build_seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Call `build_model()` with a seeded generator, and restore the random state.

    Those of Python and numpy are seeded too, so that attributes which are drawn are equal in all processes.

    Args:
        build_model: Function without arguments that returns the full network.
        seed: Seed of the generators.

    Returns:
        The network, without wrappers.

    Raises:
        UserError: If `build_model` is a network, does not return one, leaves a lazy parameter without a shape, or
            returns one with layers that a sub-network cannot have; see `resist.blocks.wrappers`.
    """
    if isinstance(build_model, nn.Module):  # a network can be called too
        raise UserError(
            f"Job was given a {type(build_model).__name__}; give it the function that builds one, as in "
            "Job(lambda: Net(), ...), so that all processes begin with the same weights"
        )
    with seeded_generators(seed):
        model = build_model()
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"build_model() returned a {type(model).__name__}; it has to return the network, an nn.Module")
    model = unwrapped(model)
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise UserError(f"parameter {lazy[0]!r} has no shape yet; run a batch through the network in build_model")
    check_layers(model)
    return model


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Compute digests of a network, to compare it between processes.

    Args:
        model: The full network, not on the meta device.

    Returns:
        A digest of the names, shapes and types of its tensors ("structure") and one of their values ("weights").
    """
    tensors = tensors_of(model)
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise UserError(
            f"{meta[0]!r} is on the meta device, without values; let build_model build the network on the CPU"
        )
    shapes = repr([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()])
    weights = blake2b(digest_size=8)
    for tensor in tensors.values():
        weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "structure": blake2b(shapes.encode(), digest_size=8).hexdigest(),
        "weights": weights.hexdigest(),
    }
