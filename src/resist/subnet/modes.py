"""Modes of modules: those that the user keeps in eval mode while the network trains."""

from collections.abc import Callable, Set

from torch import nn

from resist.blocks.modules import named_modules
from resist.subnet.layout import Place

ModuleKey = tuple[int | None, str]  # chain, and name in the block; None and the name for the shared part


def frozen_modules(model: nn.Module, place: Callable[[str], Place]) -> set[ModuleKey]:
    """Find the modules that are in eval mode.

    Args:
        model: A sub-network, at a step of its training.
        place: Finds the place of a dotted name; see `Subnet.place`.

    Returns:
        Keys of the modules. A module of a block counts where it is in eval mode in all slots of the chain.
    """
    training: dict[ModuleKey, bool] = {}
    for name, module in named_modules(model):
        key = place(f"{name}.".lstrip(".")).key
        training[key] = module.training or training.get(key, False)
    return {key for key, trains in training.items() if not trains}


def train_except(model: nn.Module, place: Callable[[str], Place], frozen: Set[ModuleKey]) -> None:
    """Put all modules into train mode but those that `frozen_modules` found.

    Args:
        model: A network, changed in place.
        place: Finds the place of a dotted name; see `Subnet.place`.
        frozen: Keys of the modules to put into eval mode.
    """
    for name, module in named_modules(model):
        module.training = place(f"{name}.".lstrip(".")).key not in frozen
    model.training = True
