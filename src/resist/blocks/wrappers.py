"""Networks that `build_model` returns in a wrapper, and layers that cannot be trained in a sub-network."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

import logging
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.optim.swa_utils import AveragedModel

from resist.blocks.contents import TABLES, is_leaf, touches
from resist.blocks.modules import children_of, hook_tables_of, named_modules, tables_of
from resist.errors import UserError

log = logging.getLogger(__name__)

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_SHARDED = ("FullyShardedDataParallel", "FSDPModule")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network in a wrapper, and take off the wrappers of its parts.

    Args:
        model: A network. It, or parts of it, may be in a wrapper of torch.compile, DataParallel,
            DistributedDataParallel or AveragedModel.

    Returns:
        The plain network, changed in place.
    """
    found: dict[str, None] = {}
    model = _unwrap(model, found)
    for module in list(model.modules()):
        children = children_of(module)
        for name, child in list(children.items()):
            if child is not None:
                children[name] = _unwrap(child, found)
    for wrapper in found:
        again = "; compile job.model" if wrapper == "torch.compile" else ""
        log.warning("build_model returned a network in %s: Job trains the network in it%s", wrapper, again)
    return model


def _unwrap(model: nn.Module, found: dict[str, None]) -> nn.Module:
    while (compiled := _is_compiled(model)) or isinstance(model, _WRAPPERS):
        found["torch.compile" if compiled else type(model).__name__] = None
        model = cast(nn.Module, getattr(model, "_orig_mod" if compiled else "module"))
    if vars(model).get("_compiled_call_impl") is not None:  # by model.compile()
        found["torch.compile"] = None
        model.__dict__["_compiled_call_impl"] = None
    return model


def _is_compiled(model: nn.Module) -> bool:
    dynamo: Any = sys.modules.get("torch._dynamo")  # which torch.compile imports, and which takes as long as torch
    return dynamo is not None and isinstance(model, dynamo.OptimizedModule)


def check_layers(model: nn.Module) -> None:
    """Check for layers that a copy of the network cannot have.

    Args:
        model: The full network.

    Raises:
        UserError: If there is one, with its name and the remedy.
    """
    if isinstance(model, ScriptModule):
        raise UserError(
            "build_model returned a network of torch.jit, whose blocks cannot be left out; return the plain network, "
            "and script the one of full_model"
        )
    for name, module in named_modules(model):
        for base in type(module).__mro__:
            if base.__name__ in _SHARDED and base.__module__.startswith("torch.distributed"):
                raise UserError(
                    f"{name or 'the network'} is sharded by FSDP; a worker's sub-network is on one device: return the "
                    "plain network"
                )
        for hook in (hook for table in hook_tables_of(module).values() for hook in table.values()):
            _check_hook(name, hook)
        _check_views(name, module)
    for name, tensor in model.named_parameters():
        if tensor._post_accumulate_grad_hooks or tensor._backward_hooks:  # pyright: ignore
            raise UserError(
                f"parameter {name!r} has a gradient hook, which copies of the network do not have; register it on "
                "job.model, or change gradients by a hook of the module or by the optimizer"
            )
        if type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor":
            raise UserError(f"parameter {name!r} is a DTensor, distributed already; return the plain network")


def _check_hook(name: str, hook: object) -> None:
    for old in ("weight_norm", "spectral_norm"):
        if type(hook).__module__ == f"torch.nn.utils.{old}":
            raise UserError(
                f"{name} has the old form of {old}, a hook; use torch.nn.utils.parametrizations.{old} in build_model"
            )


def _check_views(name: str, module: nn.Module) -> None:
    """Refuse attributes that share memory with a weight: a copy would not follow the weight."""

    @cache  # few modules have a tensor as an attribute
    def weights() -> list[Tensor]:
        return [*module.parameters(), *module.buffers()]

    def is_view(part: object) -> bool:
        if not isinstance(part, Tensor) or any(part is weight for weight in weights()):
            return False
        return _address(part) in {_address(weight) for weight in weights() if weight.numel() and not weight.is_meta}

    for attribute, value in vars(module).items():
        if attribute not in TABLES and not is_leaf(value) and touches(value, is_view):
            raise UserError(
                f"attribute {attribute} of {name or 'the network'} is a view of a weight, which would not follow the "
                "weight into a sub-network; take the view in forward"
            )


def _address(tensor: Tensor) -> int:
    """Address of the memory that a tensor is in; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def check_blocks(model: nn.Module, names: Iterable[str]) -> None:
    """Check for state of blocks that is in no attribute, and for references to them.

    Args:
        model: The full network.
        names: Dotted names of the blocks of its chains.

    Raises:
        UserError: If a layer of a block has `get_extra_state`; if an attribute elsewhere refers to a block, or to a
            part of one, which a sub-network may not hold.
    """
    block_of: dict[int, str] = {}
    for name in names:
        for part, module in named_modules(model.get_submodule(name)):
            block_of[id(module)] = name
            block_of |= {id(t): name for table in tables_of(module).values() for t in table.values() if t is not None}
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise UserError(
                    f"{'.'.join(filter(None, (name, part)))} has state of its own (get_extra_state), which does not go "
                    "with its block; keep it in buffers, or partition another chain"
                )
    for name, module in named_modules(model):
        within, found = block_of.get(id(module)), list[str]()

        def is_elsewhere(part: object, within: str | None = within, found: list[str] = found) -> bool:
            if block_of.get(id(part), within) != within:
                found.append(block_of[id(part)])
            return bool(found)

        for attribute, value in vars(module).items():
            if attribute not in TABLES and not is_leaf(value) and touches(value, is_elsewhere):
                raise UserError(
                    f"{attribute} of {name or 'the network'} refers to {found[0]}, which a sub-network may not hold; "
                    "refer to its container and take the block in forward, or partition another chain"
                )
