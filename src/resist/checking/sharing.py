"""Weights of rehearsals: larger ones than at the beginning, shared by a network and its sub-networks."""

from collections.abc import Sequence

import torch
from torch import nn

from resist.blocks.modules import children_of, named_modules, parameters_of
from resist.blocks.rehearsal import Rehearsal, stand_in
from resist.checking.trace import Trace
from resist.errors import UserError
from resist.subnet.network import Subnet

LEVELS = (1.0, 0.1, 0.0)  # of noise; the next one is taken where numbers overflow, or the network refuses its weights


def with_larger_weights(rehearsal: Rehearsal, model: nn.Module) -> nn.Module:
    """Copy a network, with weights that let differences between blocks show.

    Initial weights can be so small that they do not, and branches that begin at zero hide everything.

    Args:
        rehearsal: Runs it.
        model: The full network. It is not changed.

    Returns:
        The copy, with weights that keep the size of activations and gains around one; with smaller changes or the
        initial weights where that is not finite.
    """
    copied = stand_in(model, own_weights=True)
    for level in LEVELS:
        _randomize(copied, model, level)
        trial, trace = stand_in(copied), Trace()
        trace.follow({name: module for name, module in named_modules(trial) if name and children_of(module)})
        try:
            if trace.end(rehearsal.run(trial)).finite or level == 0:
                break
        except UserError:
            raise
        except Exception:  # models of users can raise anything
            continue
    return copied


@torch.no_grad()
def _randomize(copied: nn.Module, model: nn.Module, level: float) -> None:
    generator = torch.Generator().manual_seed(0)
    initial = dict(model.named_parameters())
    for name, parameter in copied.named_parameters():
        if not (parameter.is_floating_point() or parameter.is_complex()) or parameter.numel() == 0:
            continue
        noise = torch.randn(
            parameter.shape, generator=generator, dtype=torch.complex64 if parameter.is_complex() else None
        )
        matrix = sum(size > 1 for size in parameter.shape) >= 2
        if matrix:
            noise = noise / parameter[0].numel() ** 0.5
        if level == 1.0:
            parameter.copy_(noise if matrix else 0.3 * noise + (0.0 if "bias" in name.rpartition(".")[2] else 1.0))
        else:
            parameter.copy_(initial[name].cpu() + level * noise.to(parameter.dtype))


def share_weights(subnet: Subnet, held: Sequence[Sequence[int]], model: nn.Module) -> None:
    """Let a sub-network use the weights of a network itself, so that both compute the same bits.

    Kernels may sum in another order where weights have another alignment in memory.

    Args:
        subnet: The sub-network, with the weights of `model`. It is of no use in training afterwards.
        held: Its blocks.
        model: The network.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in named_modules(subnet.model):
        own = parameters_of(module)
        for key, parameter in own.items():
            if parameter is not None:
                place = subnet.place(f"{prefix}.{key}".lstrip("."))
                own[key] = weights[subnet.layout.full_name(place, held)]
