"""Optimizers that a loop gives to `Job.step`: whose parameters they train, and what is refused."""

import gc
import logging
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from resist.errors import UserError
from resist.planning.strategy import Strategy
from resist.subnet.network import Subnet

log = logging.getLogger(__name__)

# Optimizers of torch.distributed that average gradients or weights, or shard state, over processes themselves.
_COLLECTIVE = ("ZeroRedundancyOptimizer", "PostLocalSGDOptimizer", "DistributedOptimizer")
# Its modules that do so. All by name, since this file imports no torch.distributed.
_WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel")


def innermost(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that a wrapper contains.

    Args:
        optimizer: An optimizer, or a wrapper of one with the same parameter groups (Accelerate's, Lookahead).

    Returns:
        The optimizer inside of all wrappers; without a wrapper the optimizer itself.
    """
    for value in vars(optimizer).values():
        if isinstance(value, Optimizer) and value.param_groups is optimizer.param_groups:
            return innermost(value)
    return optimizer


def check_alone(optimizers: Sequence[Optimizer], models: Iterable[nn.Module]) -> None:
    """Refuse what joins the workers beside the job.

    Means over workers would be means over different blocks.

    Looks at all objects of the process once, some hundredths of a second, if there are models.

    Args:
        optimizers: Optimizers as they were given to `Job.step`.
        models: The sub-networks of the hosted workers.

    Raises:
        UserError: If an optimizer is that of an Accelerator over several processes, if a wrapper of torch.distributed
            holds one of the models, or if its parameters are sharded.
    """
    for optimizer in optimizers:
        spanned = int(getattr(getattr(optimizer, "accelerator_state", None), "num_processes", 1))
        if spanned > 1:
            raise UserError(
                f"accelerate spans {spanned} processes and averages gradients itself; create the Accelerator within "
                "resist.integrations.alone()"
            )
    networks = {id(model): model for model in models}
    sharded = any(type(p).__name__ == "DTensor" for model in networks.values() for p in model.parameters())
    wrapper = "fully_shard" if sharded else None
    for found in gc.get_objects() if networks and not sharded else ():
        name = type(found).__name__
        if name in _WRAPPERS and isinstance(found, nn.Module) and any(id(m) in networks for m in found.modules()):
            wrapper = name
    if wrapper is not None:
        raise UserError(
            f"{wrapper} around the network of a worker would mix it with those of other workers, which hold other "
            "blocks; use job.model itself, and resist.ddp or resist.local_sgd to train the full network on each worker"
        )


def optimizers_of(subnets: Sequence[Subnet], optimizers: Sequence[Optimizer]) -> list[list[Optimizer]]:
    """Group optimizers by the sub-network whose parameters they train.

    Args:
        subnets: The sub-networks of the hosted workers.
        optimizers: Their optimizers, in any order.

    Returns:
        The optimizers of each sub-network, without their wrappers.

    Raises:
        UserError: If an optimizer trains the parameters of no sub-network or of several, if two optimizers train the
            same parameter, or if a sub-network has no optimizer.
    """
    subnet_of = {id(p): number for number, subnet in enumerate(subnets) for p in subnet.model.parameters()}
    grouped: list[list[Optimizer]] = [[] for _ in subnets]
    trained_by: dict[int, int] = {}  # id of a parameter -> number of the optimizer
    models = "job.model" if len(subnets) == 1 else "worker.model for each of job.workers"
    for number, optimizer in enumerate(optimizers):
        if not hasattr(optimizer, "param_groups"):
            raise UserError(f"job.step was given a {type(optimizer).__name__}; give it the optimizers themselves")
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {subnet_of[parameter] for parameter in parameters & subnet_of.keys()}
        if len(trained) != 1:
            trains = "no parameter of the job's network" if not trained else "the networks of several workers"
            raise UserError(f"optimizer {number} has {trains}; make it from the parameters of {models}")
        twice = parameters & trained_by.keys()
        if twice:
            raise UserError(
                f"optimizers {trained_by[twice.pop()]} and {number} train the same parameters; give each parameter to "
                "one"
            )
        trained_by |= dict.fromkeys(parameters, number)
        if outside := len(parameters - subnet_of.keys()):
            log.warning(
                "optimizer %d trains %d parameter%s outside of the network: each worker trains its own, and it is "
                "neither averaged nor saved; move it into the module that build_model returns",
                number,
                outside,
                "s" * (outside > 1),
            )
        grouped[trained.pop()].append(innermost(optimizer))
    if not all(grouped):
        raise UserError(f"{len(optimizers)} optimizers, none for job.workers[{grouped.index([])}]; pass one for each")
    return grouped


def check_optimizers(optimizers: Iterable[Optimizer], strategy: Strategy) -> None:
    """Refuse optimizers whose state cannot go with a block.

    Args:
        optimizers: Optimizers as they were given to `Job.step`.
        strategy: The strategy. With one worker, or an average of the gradients in every step, no state has to move.

    Raises:
        UserError: If one communicates by itself, keeps one history over all parameters with another policy than
            "reset", or keeps tensors outside of its state.
    """
    if strategy.workers == 1 or strategy.every_step:
        return
    moving = [stage.optimizer_state for stage in strategy.stages if stage.optimizer_state != "reset"]
    for optimizer in optimizers:
        inner, name = innermost(optimizer), type(optimizer).__name__
        if any(cls.__name__ in _COLLECTIVE for cls in type(inner).__mro__):
            raise UserError(
                f"{type(inner).__name__} communicates over all processes, whose workers have different blocks; give "
                "each worker a plain optimizer"
            )
        if moving and _has_one_history(inner):
            raise UserError(
                f"{type(inner).__name__} keeps one history over all parameters, which cannot go with the blocks "
                f"(`optimizer_state={moving[0]!r}`); give the strategy `optimizer_state='reset'`"
            )
        if inner is not optimizer and moving and optimizer.state is not inner.state and optimizer.state:
            raise UserError(
                f"{name} keeps state of its own beside that of {type(inner).__name__}, which it wraps; give the "
                "strategy `optimizer_state='reset'`, or job.step the inner optimizer"
            )
        if outside := _outside_state(inner):
            raise UserError(
                f"{type(inner).__name__} keeps tensors in its attribute {outside!r}, where they cannot go with the "
                "blocks; keep them in optimizer.state"
            )


def _has_one_history(optimizer: Optimizer) -> bool:
    """Check for one state of all parameters, as that of L-BFGS."""
    if isinstance(optimizer, LBFGS):
        return True
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if len(parameters) < 2 or len(optimizer.state) != 1:
        return False
    ((owner, state),) = optimizer.state.items()
    total = sum(parameter.numel() for parameter in parameters)
    return any(tensor.numel() == total != owner.numel() for tensor in _tensors_in(state))


def _outside_state(optimizer: Optimizer) -> str | None:
    """The name of an attribute with tensors besides parameters and numbers."""
    ours = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults"):
            continue
        if any(tensor.numel() > 1 and id(tensor) not in ours for tensor in _tensors_in(value)):
            return name
    return None


def _tensors_in(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in cast(dict[Any, object], value).values():
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in cast(Sequence[object], value):
            yield from _tensors_in(item)
