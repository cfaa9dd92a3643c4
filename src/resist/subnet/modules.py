"""Typed access to the tables of a module, which torch keeps private or declares without types."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

# Any BatchNorm layer.
BatchNorm = nn.modules.batchnorm._BatchNorm


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over all modules with their dotted names."""
    return cast(Iterator[tuple[str, nn.Module]], model.named_modules(remove_duplicate=remove_duplicate))


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Children by name, those included that are registered twice. The dict is the module's own."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters by name, without those of its children. The dict is the module's own."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers by name, without those of its children. The dict is the module's own."""
    return module._buffers


def hook_tables(module: nn.Module) -> tuple[dict[int, object], ...]:
    """Forward hooks by number, followed by the tables of their options. The dicts are the module's own."""
    tables = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    return cast(tuple[dict[int, object], ...], tables)


def fork_rng() -> AbstractContextManager[None]:
    """Restore the state of torch's CPU generator at the end of a `with` block."""
    return torch.random.fork_rng(devices=[])
