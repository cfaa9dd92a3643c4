"""Trace: what the blocks of a network get and return in one run, and the first difference between two runs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from resist.blocks.streams import Path, tensors_at

ROUNDING = 1e-4  # relative difference that another order of summation can cause, after a hundred layers
COARSE = 2e-2  # the same for numbers of 16 bits and less
# Fields of outputs of transformers with an entry for each layer; a sub-network has fewer.
PER_LAYER = ("hidden_states", "attentions", "router_logits", "router_probs", "past_key_values")
# Sums over the layers, in outputs with an entry of routers: a sub-network has the terms of its own layers.
WITH_ROUTERS = ("loss", "aux_loss", "z_loss")


@dataclass
class Visit:
    """One call of a block.

    Attributes:
        name: Global dotted name of the block in the full network.
        inputs: Tensors among the arguments, by their place.
        outputs: Tensors in the output, by their place.
    """

    name: str
    inputs: dict[Path, Tensor]
    outputs: dict[Path, Tensor] = field(default_factory=dict[Path, Tensor])


@dataclass
class Trace:
    """The calls of some blocks in one run, and the output of the network.

    Attributes:
        visits: The calls, in their order.
        output: Tensors in the output.
    """

    visits: list[Visit] = field(default_factory=list[Visit])
    output: dict[Path, Tensor] = field(default_factory=dict[Path, Tensor])
    _open: list[Visit] = field(default_factory=list[Visit])

    def follow(self, modules: Mapping[str, nn.Module], *, inputs_only: bool = False) -> None:
        """Record all further calls of blocks.

        Args:
            modules: The blocks, by their names in the full network. They get hooks.
            inputs_only: Do not record what they return.
        """
        for name, module in modules.items():

            def enter(_module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                self._open.append(Visit(name, _copied((args, kwargs))))
                self.visits.append(self._open[-1])

            def leave(_module: nn.Module, _args: Any, output: Any) -> None:
                self._open.pop().outputs = _copied(output)

            module.register_forward_pre_hook(enter, with_kwargs=True)
            if not inputs_only:
                module.register_forward_hook(leave)

    def end(self, output: object) -> "Trace":
        """Record the output of the network.

        Args:
            output: What the network returned.

        Returns:
            This trace.
        """
        self.output = _copied(without_layers(output))
        return self

    @property
    def finite(self) -> bool:
        """True if no block returned NaN or inf, and the network no NaN."""
        states = (tensor for visit in self.visits for tensor in visit.outputs.values())
        finite = all(bool(t.isfinite().all()) for t in states if t.is_floating_point() or t.is_complex())
        return finite and not any(bool(t.isnan().any()) for t in self.output.values())


@dataclass(frozen=True)
class Difference:
    """The first difference between two runs.

    Attributes:
        kind: "calls" (other blocks were called, or in another order), "input" or "output" (of a block), "end" (of the
            network).
        name: Global dotted name of the block; "" at the end.
        place: Place of the tensor that differs.
        size: Difference relative to the largest number; inf if shapes differ.
    """

    kind: str
    name: str = ""
    place: Path = ()
    size: float = math.inf


def first_difference(trace: Trace, expected: Trace, *, outputs: bool = True) -> Difference | None:
    """Find the first difference that is more than rounding.

    Args:
        trace: The one run.
        expected: The other run.
        outputs: Compare what blocks return too.

    Returns:
        The difference; None if there is none.
    """
    for visit, other in zip(trace.visits, expected.visits, strict=False):
        if visit.name != other.name:
            return Difference("calls", visit.name)
        pairs = ("input", visit.inputs, other.inputs), ("output", visit.outputs, other.outputs)
        for kind, left, right in pairs if outputs else pairs[:1]:
            place, size = _largest(left, right)
            if size is not None:
                return Difference(kind, visit.name, place, size)
    if len(trace.visits) != len(expected.visits):
        return Difference("calls", (*trace.visits, *expected.visits)[-1].name)
    place, size = _largest(trace.output, expected.output)
    return None if size is None else Difference("end", "", place, size)


def _largest(left: Mapping[Path, Tensor], right: Mapping[Path, Tensor]) -> tuple[Path, float | None]:
    """Place and size of the first difference between tensors; None if there is none."""
    if left.keys() != right.keys():
        return next(iter(left.keys() ^ right.keys())), math.inf
    for place, tensor in left.items():
        size = relative(tensor, right[place])
        narrow = tensor.dtype.itemsize <= 2
        if not size < (COARSE if narrow else ROUNDING):  # also if it is NaN
            return place, size
    return (), None


def relative(left: Tensor, right: Tensor) -> float:
    """Compute the difference of two tensors relative to the largest number.

    Args:
        left: The one tensor.
        right: The other tensor.

    Returns:
        The difference; 0.0 if they are equal, NaN at the same places included; inf if shapes or types differ.
    """
    if left.shape != right.shape or left.dtype != right.dtype:
        return math.inf
    if torch.equal(left, right):
        return 0.0
    if not (left.is_floating_point() or left.is_complex()):
        return math.inf
    same = (left == right) | (left.isnan() & right.isnan())
    wide = torch.complex128 if left.is_complex() else torch.float64
    apart = (left.to(wide) - right.to(wide)).abs().masked_fill(same, 0.0)
    largest = right.to(wide).abs().nan_to_num(0.0, 0.0, 0.0).max()
    return float((apart / largest).max()) if float(apart.max()) else 0.0


def _copied(value: object) -> dict[Path, Tensor]:
    return {path: tensor.detach().clone() for path, tensor in tensors_at(value)}


def without_layers(output: object) -> object:
    """Leave out the fields of an output that have an entry for each layer.

    Args:
        output: Output of a network.

    Returns:
        The output; of an output of transformers, a dict.
    """
    if not (isinstance(output, Mapping) and is_dataclass(cast(object, output))):
        return cast(object, output)
    fields = {name: value for name, value in cast(Mapping[str, object], output).items() if value is not None}
    routed = any("router" in name for name in fields)
    left_out = (*PER_LAYER, *(WITH_ROUTERS if routed else ()))
    return {name: value for name, value in fields.items() if not name.endswith(left_out)}


def tensors_in(value: object) -> list[Tensor]:
    """Collect the tensors in an output.

    Args:
        value: A tensor, or nested tuples, lists, mappings and dataclasses of tensors.

    Returns:
        The tensors in their order. Other values are ignored.
    """
    return [tensor for _, tensor in tensors_at(value)]
