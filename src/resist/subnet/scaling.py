"""Scaling: forward hooks that multiply the branches of chain blocks.

A block x + f(x) becomes x + scale * f(x). `scale_branches` sets the hooks of whole chains, `scale_blocks` those of
named blocks, `scales_of` reads them and `unhook` removes one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from resist.blocks.chain import Chain
from resist.blocks.modules import hook_tables, named_modules, pre_hook_tables
from resist.blocks.residual import OUTSIDE
from resist.blocks.streams import Stream, default_source, hidden_in, hidden_out, replaced, with_hidden
from resist.errors import UserError
from resist.planning.plan import RoundPlan

ScaleRecord = float | Mapping[str, Any]  # scale of a block; a mapping if its hook needs more than that

_KEPT = "resist_kept"  # attribute of the copy that a block works on: its hidden state as it was


class KeepInput:
    """Forward pre-hook that gives a block a copy of its hidden state.

    So `ScaleBranch` finds the state as it was, if the block writes into it (`x += f(x)`). Whether a block does cannot
    be seen in compiled and exported networks, so every block gets a copy; it costs one pass over the state. This is a
    class and not a closure, so that the model can be pickled.

    Args:
        stream: Places of the hidden state. Default: as in `ScaleBranch`.
    """

    def __init__(self, stream: Stream | None = None) -> None:
        self.stream = stream

    def __call__(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source = default_source(args, kwargs) if self.stream is None else self.stream.source
        x = hidden_in(args, kwargs, source)
        if x is None or source is None:
            return None
        copied = x.clone()
        setattr(copied, _KEPT, x)
        return replaced(args, kwargs, source, copied)


class ScaleBranch:
    """Forward hook that scales the branch of a residual block.

    A block x + f(x) becomes x + scale * f(x). Here x is the block's first argument, or the first tensor among its
    keyword arguments. If the block returns a tuple, mapping or dataclass, its first tensor is scaled. This is a class
    and not a closure, so that the model can be pickled.

    Args:
        scale: Factor of the branch.
        stream: Places of x and of what is scaled, if they are others.

    Attributes:
        scale: Factor of the branch.
        stream: The places; None for those above.

    Raises:
        UserError: In the forward pass, if the block does not map a tensor to one of the same shape.
    """

    def __init__(self, scale: float, stream: Stream | None = None) -> None:
        self.scale, self.stream = scale, stream

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        source, target = (None, None) if self.stream is None else (self.stream.source, self.stream.target)
        x, y = hidden_in(args, kwargs, source), hidden_out(output, target)
        if x is None or y is None or x.shape != y.shape:
            raise UserError(
                f"a {type(module).__name__} cannot be scaled: it has to take a tensor and return one of the same "
                "shape, alone or first in a tuple; partition another chain, give Job an `example`, or scale=1.0"
            )
        x = getattr(x, _KEPT, x)
        return with_hidden(output, torch.lerp(x.to(y.dtype), y, self.scale), target)


class ScaleOutput:
    """Forward hook that scales what a module returns, for branches that the network adds outside of their block.

    Args:
        scale: Factor of the branch.

    Attributes:
        scale: Factor of the branch.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        y = hidden_out(output)
        return output if y is None else with_hidden(output, y * self.scale)


def chain_scales(scale: str | float, plan: RoundPlan) -> list[float]:
    """Compute the factor of each chain's branches in the full network.

    Args:
        scale: "inclusion": the probability that a worker holds a block, mean capacity / num_blocks. "1/S": one over the
            number of workers, unless every worker holds every block of the chain. Or a number above 0.
        plan: Plan of the round whose weights are scaled.

    Returns:
        Factor of each chain.

    Raises:
        UserError: If `scale` is anything else.
    """
    if isinstance(scale, int | float) and 0 < scale < math.inf:
        return [float(scale)] * len(plan.plans)
    if scale not in ("inclusion", "1/S"):
        raise UserError(f"`scale={scale!r}` is not inclusion, 1/S, or a number above 0")
    return [
        sum(chain.capacities) / chain.workers / chain.num_blocks
        if chain.held_by_all or scale == "inclusion"
        else 1 / chain.workers
        for chain in plan.plans
    ]


def scale_branches(model: nn.Module, chains: Sequence[Chain], scales: Sequence[float]) -> None:
    """Scale the branch of every chain block of a full network.

    Args:
        model: The full network. Its blocks get hooks, which act from the next forward pass on.
        chains: Chains of the network.
        scales: Factor of each chain. A factor of 1.0 sets no hook.
    """
    for chain, scale in zip(chains, scales, strict=True):
        for block in range(chain.num_blocks):
            streams = dict(chain.streams)
            for name, skip_type in chain.scaled(block) if scale != 1.0 else ():
                _scale(model.get_submodule(name), scale, streams.get(name), outside=skip_type == OUTSIDE)


def _scale(module: nn.Module, scale: float, stream: Stream | None = None, *, outside: bool) -> None:
    """Set the hooks of one module, before the hooks that it has."""
    if outside:
        module.register_forward_hook(ScaleOutput(scale), prepend=True)
        return
    module.register_forward_pre_hook(KeepInput(stream), with_kwargs=True)
    module.register_forward_hook(ScaleBranch(scale, stream), with_kwargs=True, prepend=True)


def scales_of(model: nn.Module) -> dict[str, float]:
    """Collect the scales of all modules with a hook.

    Args:
        model: The full network.

    Returns:
        Scale of each block, or other module with a branch, by dotted name.
    """
    return {
        name: hook.scale
        for name, module in named_modules(model)
        for hook in hook_tables(module)[0].values()
        if isinstance(hook, ScaleBranch | ScaleOutput)
    }


def adds_outside(module: nn.Module) -> bool:
    """Check for a hook that scales all that a module returns.

    Args:
        module: A module of a full network.

    Returns:
        True if it has one: the network adds its output to the hidden state.
    """
    return any(isinstance(hook, ScaleOutput) for hook in hook_tables(module)[0].values())


def records_of(model: nn.Module) -> dict[str, ScaleRecord]:
    """Collect the scales of all modules with a hook, with what else their hooks know.

    Args:
        model: The full network.

    Returns:
        Scale of each block, or other module with a branch, by dotted name, fit for JSON; see `scale_blocks`.
    """
    return {
        name: _record(hook.scale, isinstance(hook, ScaleOutput), getattr(hook, "stream", None))
        for name, module in named_modules(model)
        for hook in hook_tables(module)[0].values()
        if isinstance(hook, ScaleBranch | ScaleOutput)
    }


def records_for(chain: Chain, scale: float) -> dict[str, ScaleRecord]:
    """Return the records that `records_of` would have after `scale_branches`.

    Args:
        chain: A chain of the network.
        scale: Factor of its branches.

    Returns:
        The records by dotted name.
    """
    streams = dict(chain.streams)
    return {
        name: _record(scale, skip_type == OUTSIDE, streams.get(name))
        for block in range(chain.num_blocks)
        for name, skip_type in chain.scaled(block)
    }


def _record(scale: float, outside: bool, stream: Stream | None) -> ScaleRecord:
    if outside:
        return {"scale": scale, "outside": True}
    if stream is not None:
        return {"scale": scale, "source": list(stream.source), "target": list(stream.target)}
    return scale


def scale_blocks(model: nn.Module, scales: Mapping[str, ScaleRecord]) -> nn.Module:
    """Scale the branches of single blocks, as `records_of` lists them.

    Args:
        model: The full network. Its blocks get hooks, which act from the next forward pass on.
        scales: By dotted name the factor of each block; or a mapping with the `scale`, and `outside` where the network
            adds what the block returns, or `source` and `target`, the places of the hidden state (see `Stream`).

    Returns:
        The same model.

    Raises:
        UserError: If the model has no block of that name.
    """
    for name, record in scales.items():
        try:
            block = model.get_submodule(name)
        except AttributeError as error:
            raise UserError(f"the model has no block {name!r} to scale; build the network that was exported") from error
        entries: Mapping[str, Any] = record if isinstance(record, Mapping) else {"scale": record}
        if (scale := float(entries["scale"])) != 1.0:
            places = "source" in entries
            stream = Stream(tuple(entries["source"]), tuple(entries["target"])) if places else None
            _scale(block, scale, stream, outside=bool(entries.get("outside")))
    return model


def unhook(block: nn.Module) -> None:
    """Remove the scaling hook of one block.

    Args:
        block: The block, changed in place.
    """
    for tables in (hook_tables(block), pre_hook_tables(block)):
        for key in [key for key, hook in tables[0].items() if isinstance(hook, ScaleBranch | ScaleOutput | KeepInput)]:
            for table in tables:
                table.pop(key, None)
