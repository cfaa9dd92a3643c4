"""References of benchmarks/models.py, made by hand: a network whose blocks count in part, or not at all.

They use nothing of the package: hooks on the plain network, and for our own networks the formula written out.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def main_output(output: Any) -> Tensor:
    """Return the logits of an output: its first tensor, or the entry of that name."""
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    return main_output(next(iter(output.values())) if isinstance(output, Mapping) else output[0])


def with_gains(model: nn.Module, gains: Mapping[str, float], *, outside: bool = False) -> nn.Module:
    """Copy a network, with x + gain * (block(x) - x) in place of some blocks.

    A block works on copies of its arguments, since it may write into them. The hidden state is its first tensor.

    Args:
        model: The plain network.
        gains: Gain by dotted name of a block; 0 takes it out.
        outside: The network adds what a block returns to the hidden state: gain * block(x) then.
    """
    copied = copy.deepcopy(model)
    for name, gain in gains.items():
        _hook(copied.get_submodule(name), gain, outside)
    return copied


def _hook(block: nn.Module, gain: float, outside: bool) -> None:
    kept: list[Tensor] = []

    def enter(_block: nn.Module, args: Any, kwargs: Any) -> Any:
        kept.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        return tuple(map(_copied, args)), {key: _copied(value) for key, value in kwargs.items()}

    def leave(_block: nn.Module, _args: Any, output: Any) -> Any:
        x, y = kept.pop(), output if isinstance(output, Tensor) else output[0]
        y = gain * y if outside else x + gain * (y - x)
        return y if isinstance(output, Tensor) else (y, *output[1:])

    block.register_forward_pre_hook(enter, with_kwargs=True)
    block.register_forward_hook(leave)


def _copied(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) else value


def preact_formula(model: Any, images: Tensor, gains: Mapping[str, float]) -> Tensor:
    """Compute the logits of a network of `resist.models`, block by block.

    Args:
        model: The network, in evaluation mode.
        images: (batch, channels, height, width).
        gains: Gain by dotted name of a block; 1 for the others.
    """
    x = model.stem(images)
    if model.stem.stride == (2, 2):
        x = F.max_pool2d(x, 3, 2, padding=1)
    for section in ("layer1", "layer2", "layer3", "layer4"):
        for number, block in enumerate(model.get_submodule(section)):
            out = F.relu(block.norm1(x))
            skip = x if block.shortcut is None else block.shortcut(out)
            out = block.conv2(F.relu(block.norm2(block.conv1(out))))
            if hasattr(block, "conv3"):
                out = block.conv3(F.relu(block.norm3(out)))
            x = skip + gains.get(f"{section}.{number}", 1.0) * out
    if model.norm is not None:
        x = F.relu(model.norm(x))
    return model.head(x.mean(dim=(2, 3)))


@torch.no_grad()
def with_noise(model: nn.Module) -> nn.Module:
    """Change vectors, and matrices of nearly zeros, so that every branch counts; many begin at zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if sum(size > 1 for size in parameter.shape) < 2:
            parameter.add_(0.2 * noise)
        elif parameter.abs().max() < 1e-3:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model


def apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number; inf for other shapes or numbers not finite."""
    if found.shape != expected.shape or not found.isfinite().all() or not expected.isfinite().all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))
