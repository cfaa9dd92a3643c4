"""Typed access to the tables of a module, which torch keeps private or declares without types."""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

# Any BatchNorm layer.
BatchNorm = nn.modules.batchnorm._BatchNorm
# Attributes that nn.Module itself keeps.
OF_MODULE = frozenset(vars(nn.Module())) | {"_is_full_backward_hook", "_compiled_call_impl"}
_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
# Any layer of torch with running statistics.
Norm = nn.modules.batchnorm._BatchNorm | nn.modules.instancenorm._InstanceNorm
NORMS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def named_modules(model: nn.Module, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over all modules with their dotted names."""
    return cast(Iterator[tuple[str, nn.Module]], model.named_modules(remove_duplicate=remove_duplicate))


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's own table of children.

    It includes children that are registered twice.
    """
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's own table of parameters, without those of children."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's own table of buffers, without those of children."""
    return module._buffers


def tables_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the module's own tables of parameters, buffers and children, without those of children."""
    return {"parameters": module._parameters, "buffers": module._buffers, "children": module._modules}


def hook_tables(module: nn.Module) -> tuple[dict[int, object], ...]:
    """Return the module's own tables of forward hooks, by number.

    The hooks come first, followed by the tables of their options.
    """
    tables = (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called)
    return cast(tuple[dict[int, object], ...], tables)


def hook_tables_of(module: nn.Module) -> dict[str, dict[int, Any]]:
    """Return the module's own tables of all kinds of hooks, and of their options, by name."""
    tables = vars(module)
    return {name: tables[name] for name in sorted(OF_MODULE & tables.keys()) if name.endswith(_HOOKS)}


def pre_hook_tables(module: nn.Module) -> tuple[dict[int, object], ...]:
    """Return the module's own tables of forward pre-hooks, by number.

    The hooks come first, followed by the table of their options.
    """
    return cast(tuple[dict[int, object], ...], (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs))


def fork_rng(devices: Sequence[torch.device] = ()) -> AbstractContextManager[None]:
    """Make a context that restores torch's generators of the CPU and of `devices` at its end."""
    return torch.random.fork_rng(devices=list(devices))


def is_float(tensor: Tensor) -> bool:
    """Check for a real or complex floating-point dtype."""
    return tensor.is_floating_point() or tensor.is_complex()
