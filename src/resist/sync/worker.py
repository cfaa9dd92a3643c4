"""One of the S trainers, hosted by this process, and what it keeps beside its network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist.subnet.network import Subnet
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS
from resist.sync.optimizer_state import adopt_state, follow_resize


@dataclass(frozen=True)
class Replica:
    """What one process keeps of the network as it was synchronized, by global dotted name: its workers' parts, and
    second copies of blocks that others hold alone. round, step: those that were done."""

    round: int
    step: int
    tensors: dict[str, Tensor]


class Worker:
    """`model` is its sub-network, an ordinary `nn.Module`.

    state:      the optimizer's state by kind, laid out as the weights are; also an outer optimizer's.
    optimizers: those that `Job.step` was given for it.
    start:      the weights with which the round began, where something asks for them.
    average:    of its weights over time; see `Job.follow`.
    """

    def __init__(self, index: int, subnet: Subnet) -> None:
        self.index, self.subnet = index, subnet
        self.model: nn.Module = subnet.model
        self.state: dict[str, Tensor] = {}
        self.optimizers: list[Optimizer] = []
        self.anchor: Tensor | None = None
        self.average: Subnet | None = None

    def begin(self, *, keep_anchor: bool, outer: bool) -> None:
        """Remember the weights with which a round begins, where something will ask for them."""
        if keep_anchor or outer:
            self.anchor = self.subnet.flat.clone()
        if outer:
            self.state.setdefault(VELOCITY, torch.zeros_like(self.subnet.flat))

    def collect_state(self, policy: str) -> None:
        """Lay the optimizers' state out in `state`, as it is before a synchronization; or forget it."""
        for optimizer in self.optimizers:
            if policy == "reset":
                optimizer.state.clear()
            else:
                adopt_state(self.subnet, optimizer, self.state)
        if policy == "reset":
            self.state = {kind: flat for kind, flat in self.state.items() if kind == VELOCITY}

    def go_on(self, flats: Mapping[str, Tensor], capacities: Sequence[int], held: Sequence[Sequence[int]]) -> None:
        """Take over what a synchronization left in `flats`, by kind, and become the sub-network of the next plan."""
        self.state = {kind: flat for kind, flat in flats.items() if kind not in (WEIGHTS, AVERAGE)}
        if tuple(capacities) != self.subnet.capacities:
            before = {id(parameter) for parameter in self.model.parameters()}
            self.subnet.resize(capacities, flats[WEIGHTS])
            for optimizer in self.optimizers:
                follow_resize(self.subnet, optimizer, before, self.state)
            if self.average is not None:
                self.average.resize(capacities, flats[AVERAGE])
        for subnet in filter(None, (self.subnet, self.average)):
            subnet.hold(held)
