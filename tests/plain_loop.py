"""ResIST by hand for any optimizer: nothing stays from round to round but dictionaries by global name.

In every round each worker gets a new, shallow network and a new optimizer, filled from the dictionaries; after its
local steps they are filled from it, and averaged over holders. `oracle.py` has the paper's plain SGD; this one has the
optimizer, the step and the average over time that a test gives it.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    def round(self, blocks: Sequence[Sequence[int]], steps: Iterable[int], owners: Mapping[int, int]) -> None:
        """blocks: those of each worker. owners: the worker that decides for each block what is not averaged."""
        ends: list[tuple[Values, Values]] = []
        for worker, held in enumerate(blocks):
            net = shallow(self.full, self.weights, held)
            names = {local: global_name(local, held) for local in net.state_dict()}
            optimizer = self.optimizer(net)
            before = self.states.get(worker, {})
            for local, parameter in net.named_parameters():
                if names[local] in before:
                    optimizer.state[parameter] = copy.deepcopy(before[names[local]])
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
        self._share_states(blocks, owners)

    def _average(self, average: Values, net: nn.Module, names: dict[str, str], *, first: bool) -> None:
        parameters = dict(net.named_parameters())
        for local, value in net.state_dict().items():
            if names[local] in average:
                decay = 0.0 if first or local not in parameters else self.decay or 0.0
                average[names[local]] = decay * average[names[local]] + (1 - decay) * value.detach()

    def _share_states(self, blocks: Sequence[Sequence[int]], owners: Mapping[int, int]) -> None:
        """Average the state of each parameter over the holders of its block that have one, and give it to every worker.

        Counts are those of the block's owner. Where no holder has any state (a GradScaler left out all their steps, or
        the parameter had no gradient), every optimizer starts over.
        """
        for name in self.trained:
            block = block_of(name)
            if block is None:
                continue
            holders = [worker for worker, held in enumerate(blocks) if block in held]
            holders.sort(key=lambda worker: worker != owners.get(block, 0))
            found = [self.states[worker][name] for worker in holders if name in self.states[worker]]
            for state in self.states.values():
                state.pop(name, None)
                if found:
                    state[name] = {k: copy.deepcopy(v) for k, v in found[0].items()}
                    for key in [key for key, value in found[0].items() if _like_a_weight(key, value)]:
                        state[name][key] = mean([held[key] for held in found])


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
