"""ResIST by hand for any optimizer: nothing stays from round to round but dictionaries by global name.

In every round each worker gets a new, shallow network and a new optimizer, filled from the dictionaries; after its
local steps they are filled from it, and averaged over holders. `oracle.py` has the paper's plain SGD; this one has the
optimizer, the step and the average over time that a test gives it.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oracle import shallow

Step = Callable[[int, int, nn.Module, Optimizer], None]  # (worker, step, model, optimizer): one optimizer step
Values = dict[str, Tensor]


class Plain:
    """weights: the full network's. averages: with `decay`, the exponential average of each weight."""

    def __init__(
        self, full: nn.Module, optimizer: Callable[[nn.Module], Optimizer], step: Step, decay: float | None = None
    ) -> None:
        self.full, self.optimizer, self.step, self.decay = full, optimizer, step, decay
        self.weights = {name: value.clone() for name, value in full.state_dict().items() if value.is_floating_point()}
        self.trained = {name for name, parameter in full.named_parameters() if parameter.requires_grad}
        self.averages: Values = {}
        self.states: dict[int, dict[str, dict[str, Any]]] = {}  # worker -> name -> state; what travels is in all

    def round(self, blocks: Sequence[Sequence[int]], steps: Iterable[int], *, travels: bool = True) -> None:
        """blocks: those of each worker. travels: whether the state of blocks does; that of the rest stays."""
        ends: list[tuple[Values, Values]] = []
        for worker, held in enumerate(blocks):
            net = shallow(self.full, self.weights, held)
            names = {local: global_name(local, held) for local in net.state_dict()}
            optimizer = self.optimizer(net)
            before = self.states.get(worker, {})
            counts = {k: v for state in before.values() for k, v in state.items() if not _like_a_weight(k, v)}
            for local, parameter in net.named_parameters():
                if names[local] in before:
                    optimizer.state[parameter] = copy.deepcopy({**before[names[local]], **counts})
            average = {names[local]: t for local, t in net.state_dict().items() if t.is_floating_point()}
            average = {name: self.averages.get(name, t).clone() for name, t in average.items()}
            for step in steps:
                self.step(worker, step, net, optimizer)
                self._average(average, net, names, first=step == 0)
            states = {names[n]: dict(optimizer.state[p]) for n, p in net.named_parameters() if p in optimizer.state}
            self.states[worker] = {**before, **states}
            ends.append(({names[n]: t for n, t in net.state_dict().items() if t.is_floating_point()}, average))
        for name in self.weights:
            self.weights[name] = mean([end[0][name] for end in ends if name in end[0]])
            if self.decay is not None:
                self.averages[name] = mean([end[1][name] for end in ends if name in end[1]])
        if travels:
            self._share_states(blocks)

    def _average(self, average: Values, net: nn.Module, names: dict[str, str], *, first: bool) -> None:
        parameters = dict(net.named_parameters())
        for local, value in net.state_dict().items():
            if names[local] in average:
                decay = 0.0 if first or local not in parameters else self.decay or 0.0
                average[names[local]] = decay * average[names[local]] + (1 - decay) * value.detach()

    def _share_states(self, blocks: Sequence[Sequence[int]]) -> None:
        """Average what is laid out as a weight over the holders of its block, and give it to every worker.

        A worker whose optimizer has made no step yet (a GradScaler left all of them out) counts as zero, and it gets
        nothing: without the rest of the state (Adam's step count) its optimizer could not go on from there.
        """
        started = [state for state in self.states.values() if state]
        state_names = {
            k for state in started for values in state.values() for k, v in values.items() if _like_a_weight(k, v)
        }
        for name in self.trained & {name for name in self.weights if block_of(name) is not None}:
            nothing = torch.zeros_like(self.weights[name])
            holders = [worker for worker, held in enumerate(blocks) if block_of(name) in held]
            for state_name in state_names:
                value = mean([self.states[w].get(name, {}).get(state_name, nothing) for w in holders])
                for state in started:
                    state.setdefault(name, {})[state_name] = value.clone()


def mean(values: Sequence[Tensor]) -> Tensor:
    """Of two values with the bits that `lerp` gives, so that workers which share no block can be compared exactly."""
    return values[0].lerp(values[1], 0.5) if len(values) == 2 else torch.stack(list(values)).mean(0)


def block_of(name: str) -> int | None:
    """The chain block (0 is `layer3.1`) that a global name belongs to."""
    parts = name.split(".")
    return int(parts[1]) - 1 if parts[0] == "layer3" and parts[1] != "0" else None


def global_name(local: str, held: Sequence[int]) -> str:
    slot = block_of(local)
    if slot is None:
        return local
    return ".".join(["layer3", str(1 + held[slot]), *local.split(".")[2:]])


def _like_a_weight(state_name: str, value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0
