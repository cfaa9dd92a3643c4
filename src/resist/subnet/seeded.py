"""Seeded building: the same full network in every process."""

from collections.abc import Callable, Sequence
from hashlib import blake2b

import torch
from torch import nn

from resist.blocks.randomness import seeded_generators
from resist.blocks.wrappers import check_layers, unwrapped
from resist.errors import UserError
from resist.subnet.randomness import gpus_in_use, seeded_gpus
from resist.subnet.tensors import tensors_of


def build_seeded(build_model: Callable[[], nn.Module], seed: int, device: str = "cpu") -> nn.Module:
    """Call `build_model()` with a seeded generator, and restore the random state.

    The generators of torch (of the CPU, and of GPUs that it uses), of Python and, if it is imported, of numpy are
    seeded, so that attributes which are drawn are equal in all processes.

    Args:
        build_model: Function without arguments that returns the full network.
        seed: Seed of the generators.
        device: Device of tensors that `build_model` creates without one, whatever `torch.set_default_device` was given.

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
    gpus = gpus_in_use()
    model = _build(build_model, seed, device, gpus)
    if gpus_in_use() != gpus:  # its first use of a GPU, whose generator could not be seeded before
        model = _build(build_model, seed, device, gpus_in_use())
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"build_model() returned a {type(model).__name__}; it has to return the network, an nn.Module")
    model = unwrapped(model)
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise UserError(f"parameter {lazy[0]!r} has no shape yet; run a batch through the network in build_model")
    check_layers(model)
    return model


def _build(build_model: Callable[[], nn.Module], seed: int, device: str, gpus: Sequence[torch.device]) -> nn.Module:
    with torch.device(device), seeded_generators(seed), seeded_gpus(seed, gpus):
        return build_model()


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
