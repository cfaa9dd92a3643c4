"""Build the full network, the same in every process, and say what was built."""

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import nn

from resist.errors import UserError
from resist.subnet.network import tensors_of


def build_seeded(build_model: Callable[[], nn.Module], seed: int) -> nn.Module:
    """`build_model()` with torch's generator of the host seeded, the caller's random state untouched.

    Not `torch.manual_seed`: that seeds the generators of all devices too, and nobody would restore those.
    """
    if isinstance(build_model, nn.Module):  # which can be called as well
        raise UserError(
            f"Job was given a {type(build_model).__name__}; give it the function that builds one, as in "
            "Job(lambda: Net(), ...), so that all processes begin with the same weights"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build_model()
    if not isinstance(model, nn.Module):
        raise UserError(f"build_model() returned a {type(model).__name__}; it has to return the network, an nn.Module")
    lazy = [name for name, p in model.named_parameters() if isinstance(p, nn.parameter.UninitializedParameter)]
    if lazy:
        raise UserError(f"parameter {lazy[0]!r} has no shape yet; run a batch through the network in build_model")
    return model


def fingerprint(model: nn.Module) -> dict[str, str]:
    """Short texts that differ where the structure or the weights of two networks do."""
    tensors = tensors_of(model)
    shapes = repr([(name, tuple(t.shape), str(t.dtype)) for name, t in tensors.items()])
    weights = blake2b(digest_size=8)
    for tensor in tensors.values():
        weights.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "structure": blake2b(shapes.encode(), digest_size=8).hexdigest(),
        "weights": weights.hexdigest(),
    }
