"""Optimizers by name: a class of torch.optim as in "adamw", or of timm as in "timm:lamb".

One rule for `lr`, `momentum`, `nesterov` and `weight_decay`: a value that is given goes to the optimizer, and is an
error where the optimizer has no such argument. What is not given is the default of the optimizer itself, for sgd that
of the paper. All further arguments of the optimizer are keys of `optimizer_args`.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from resist.errors import UserError, first_line, nearest
from resist.runs.config import OptimizationConfig

# The options of an optimizer, with the paper's values, which are the defaults of sgd.
PAPER: dict[str, float | bool] = {"lr": 0.03, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4}
TIMM_MOMENTUM = 0.9  # default of timm's factory, of those optimizers that have a momentum
# Arguments that are not for users, or that do not work with an ordinary step.
INTERNAL = {"self", "params", "differentiable", "args", "kwargs"}
REFUSED = {
    "lbfgs": "it computes the loss several times in a step; take it in your own loop",
    "sparseadam": "it takes sparse gradients only, which no layer of these networks has; give adam",
}


def resolve(o: OptimizationConfig) -> OptimizationConfig:
    """Fill in the defaults of the optimizer, and check its options.

    One other than plain sgd takes a step on a small matrix.

    Returns:
        The options, with None only for those that the optimizer does not have.

    Raises:
        UserError: The optimizer is unknown, cannot be used, or does not take an option that is given.
    """
    optimizer = _find(o.optimizer)
    arguments = _arguments(optimizer)
    values: dict[str, Any] = {}
    for name, paper in PAPER.items():
        given = getattr(o, name)
        if name in arguments:
            values[name] = given if given is not None else paper if o.optimizer.lower() == "sgd" else arguments[name]
        elif given is not None:
            raise UserError(f"`{name}` has no effect with `optimizer={o.optimizer}`; remove it")
    for name in o.optimizer_args:
        if name in PAPER:
            raise UserError(f"`optimizer_args` has {name!r}, which is an entry of its own; give `{name}`")
        if name not in arguments:
            known = ", ".join(sorted(arguments.keys() - PAPER.keys()))
            raise UserError(f"`optimizer_args` has {name[:40]!r}, which {o.optimizer} does not take; it takes {known}")
    o = replace(o, **values)
    if not isinstance(o.lr, int | float):
        raise UserError(f"`optimizer={o.optimizer}` has no learning rate of its own; give `lr`")
    if o.optimizer.lower() == "rprop" and (o.lr_schedule != "constant" or o.lr_warmup_steps):
        raise UserError(
            "`lr_schedule` and `lr_warmup_steps` have no effect with `optimizer=rprop`, which adapts its steps by "
            "itself; give `lr_schedule=constant` alone"
        )
    if o.no_decay_norm_and_bias and not o.weight_decay:
        raise UserError("`no_decay_norm_and_bias` has no effect without `weight_decay`; give one, or remove it")
    if o.optimizer.lower() != "sgd" or o.optimizer_args:
        _try(o)
    return o


def build_optimizer(o: OptimizationConfig, model: nn.Module) -> Optimizer:
    """Make the optimizer of a network.

    Args:
        o: Options that `resolve` has completed.
        model: The network. With `no_decay_norm_and_bias`, its biases and its parameters of at most one dimension are a
            group of their own, the second one.

    Raises:
        UserError: The optimizer does not take the network's parameters.
    """
    if not o.no_decay_norm_and_bias:
        return optimizer_for(o, model.parameters())
    groups: list[dict[str, Any]] = [{"params": []}, {"params": [], "weight_decay": 0.0}]
    for name, parameter in model.named_parameters():
        groups[parameter.dim() <= 1 or name.endswith(".bias")]["params"].append(parameter)
    return optimizer_for(o, groups)


def optimizer_for(o: OptimizationConfig, params: Iterable[Any]) -> Optimizer:
    """Make the optimizer of some parameters, or groups of them.

    Args:
        o: Options that `resolve` has completed.
        params: As the optimizer takes them.

    Raises:
        UserError: The optimizer does not take them.
    """
    options = {name: value for name in PAPER if (value := getattr(o, name)) is not None}
    further = {name: tuple(value) if isinstance(value, list) else value for name, value in o.optimizer_args.items()}
    try:
        return _find(o.optimizer)(params, **options, **further)
    except (TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            f"`optimizer={o.optimizer}` cannot be made: {first_line(error)}; give other values, or another one"
        ) from error


def _try(o: OptimizationConfig) -> None:
    """Take a step on a matrix. Raises UserError for an optimizer that needs more than gradients."""
    weight = nn.Parameter(torch.ones(2, 2, device="cpu"))
    weight.grad = torch.ones(2, 2, device="cpu")
    with torch.random.fork_rng(devices=[]):
        optimizer = optimizer_for(o, [weight])
        try:
            optimizer.step()
        except Exception as error:  # any error of the optimizer's own code
            raise UserError(
                f"`optimizer={o.optimizer}` cannot take a step: {first_line(error)}; give another one"
            ) from error


def _arguments(optimizer: Callable[..., Optimizer]) -> Mapping[str, Any]:
    """Return the arguments of an optimizer with their defaults."""
    parameters = inspect.signature(optimizer).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in INTERNAL}
    if isinstance(optimizer, partial) and "momentum" in defaults:
        defaults["momentum"] = TIMM_MOMENTUM
    return defaults


def _find(name: str) -> Callable[..., Optimizer]:
    """Return the class of an optimizer, for some of timm's with arguments of its own."""
    library, colon, short = name.lower().rpartition(":")
    if library == "timm":
        return _find_in_timm(short)
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    if short in REFUSED and not colon:
        raise UserError(f"`optimizer={name}` is not supported: {REFUSED[short]}")
    if colon or short not in classes:
        near = nearest(short, classes)
        hint = f"did you mean {near}" if near else f"give one of {', '.join(sorted(set(classes) - set(REFUSED)))}"
        raise UserError(f"`optimizer={name[:60]}` is no class of torch.optim; {hint}, or timm:NAME for one of timm")
    return classes[short]


def _find_in_timm(name: str) -> Callable[..., Optimizer]:
    try:
        from timm.optim import (
            get_optimizer_class,  # pyright: ignore[reportPrivateImportUsage]
            get_optimizer_info,  # pyright: ignore[reportPrivateImportUsage]
            list_optimizers,  # pyright: ignore[reportPrivateImportUsage]
        )
    except ImportError as error:
        raise UserError(f"`optimizer=timm:{name}` needs timm: pip install 'torch-resist[timm]'") from error
    try:
        info = get_optimizer_info(name)
    except ValueError as error:
        near = nearest(name, map(str, list_optimizers()))
        hint = f"; did you mean timm:{near}?" if near else ""
        raise UserError(f"`optimizer=timm:{name[:60]}` is no optimizer of timm{hint}") from error
    if info.second_order:
        raise UserError(f"`optimizer=timm:{name}` is not supported: it needs second derivatives of the loss")
    try:
        return partial(get_optimizer_class(name))  # type: ignore[return-value]
    except (ImportError, ValueError, AssertionError) as error:
        raise UserError(f"`optimizer=timm:{name}` is not installed: {first_line(error)}") from error
