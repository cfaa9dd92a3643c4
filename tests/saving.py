"""Jobs that are saved and loaded: networks with everything that has a state, and the optimizers of users."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resist.job import Job
from resist.planning.strategy import Strategy, local_sgd, resist, switch
from support import batch

STEPS = 2  # in a round


class Block(nn.Module):
    """Names that end as those of the network do; a parameter of one element; dropout; a counter that is used."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.conv, self.act, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.PReLU(), nn.Dropout(0.2)
        self.gain = nn.Parameter(torch.tensor(0.5))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return x + self.gain * self.drop(self.conv(self.act(self.norm(x))))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.PReLU()
        self.blocks = nn.Sequential(*[Block() for _ in range(6)])
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.act(self.norm(self.conv(x)))).flatten(1))


def network() -> nn.Module:
    return Network().double()


def halves(model: nn.Module) -> list[Optimizer]:
    """Two optimizers for a worker: one with groups, and one for the rest."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    small = [p for name, p in model.named_parameters() if p.dim() <= 1 and "norm" not in name]
    norms = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": small, "lr": 0.02}, {"params": norms, "weight_decay": 0.0}]
    return [torch.optim.SGD(matrices, lr=0.05, momentum=0.9), torch.optim.AdamW(groups, lr=0.01)]


class Counting(Optimizer):
    """State in Python: a number for each parameter, and one for all."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    own = self.state[p]
                    own["seen"] = own.get("seen", 0) + 1
                    own["scale"] = 0.9 * own.get("scale", 1.0) + 0.1 * float(p.grad.norm())
                    p.sub_(p.grad, alpha=group["lr"] / own["seen"] / (1 + own["scale"]))


OPTIMIZERS: dict[str, Callable[[nn.Module], list[Optimizer]]] = {
    "sgd": lambda model: [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)],
    "adam": lambda model: [torch.optim.Adam(model.parameters(), lr=0.01)],
    "adamw": lambda model: [torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)],
    "nadam": lambda model: [torch.optim.NAdam(model.parameters(), lr=0.01)],
    "adafactor": lambda model: [torch.optim.Adafactor(model.parameters(), lr=0.05)],
    "rmsprop": lambda model: [torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5, centered=True)],
    "adagrad": lambda model: [torch.optim.Adagrad(model.parameters(), lr=0.05)],  # its state begins with it
    "asgd": lambda model: [torch.optim.ASGD(model.parameters(), lr=0.05)],
    "two": halves,
    "python": lambda model: [Counting(model.parameters(), lr=0.05)],
}
# By day these are saved in files, and the others only as a dictionary.
IN_FILES = ("adamw", "two", "adafactor", "python")


def warmed_up(workers: int = 3, policy: str = "travel") -> Strategy:
    """Two rounds of local SGD, then parts: capacities change."""
    parts = resist(workers, STEPS, min_depth=3, optimizer_state=policy)
    return switch(local_sgd(workers, STEPS, optimizer_state=policy), parts, at_round=1)


@dataclass
class Loop:
    """A user's loop: a job, the optimizers of its workers, averages where wanted, a schedule of the learning rate."""

    strategy: Strategy
    optimizer: Callable[[nn.Module], list[Optimizer]] = OPTIMIZERS["sgd"]
    averaged: bool = False
    build: Callable[[], nn.Module] = network
    scheduled: bool = True
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.job = Job(self.build, self.strategy, batchnorm="average", **self.options)
        self.own = [self.optimizer(worker.model) for worker in self.job.workers]
        self.optimizers = [one for own in self.own for one in own]
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR
        self.schedules = [cosine(one, 20) for one in self.optimizers] if self.scheduled else []
        self.averages: list[AveragedModel] = []
        if self.averaged:
            decay = get_ema_multi_avg_fn(0.7)
            self.averages = [AveragedModel(worker.model, multi_avg_fn=decay) for worker in self.job.workers]
            self.job.follow(*self.averages)

    def attached(self) -> "Loop":
        self.job.attach(*self.optimizers)
        return self

    def train(self, steps: int) -> "Loop":
        for _ in range(steps):
            for number, worker in enumerate(self.job.workers):
                torch.manual_seed(self.job.step_seed(worker.index))
                images, labels = batch(worker.index, self.job.step_index)
                images = images.to(next(worker.model.parameters()).dtype)

                def closure(
                    model: nn.Module = worker.model, images: Tensor = images, labels: Tensor = labels
                ) -> Tensor:
                    model.zero_grad()
                    loss = F.cross_entropy(model(images).double(), labels)
                    loss.backward()
                    return loss

                for one in self.own[number]:
                    if isinstance(one, torch.optim.LBFGS):
                        one.step(closure)  # type: ignore[arg-type]
                if not isinstance(self.own[number][0], torch.optim.LBFGS):
                    closure()
                    for one in self.own[number]:
                        one.step()
                if self.averages:
                    self.averages[number].update_parameters(worker.model)
            for schedule in self.schedules:
                schedule.step()
            self.job.step(*self.optimizers)
        return self

    def everything(self) -> list[Any]:
        """All that decides how training goes on, but the schedules."""
        found: list[Any] = [self.job.round, self.job.step_index]
        for number, worker in enumerate(self.job.workers):
            found += [worker.model.state_dict()]
            for one in self.own[number]:
                states = [one.state.get(p, {}) for group in one.param_groups for p in group["params"]]
                found += [states, [{**group, "params": len(group["params"])} for group in one.param_groups]]
        return [*found, *(average.state_dict() for average in self.averages)]


def same(one: Any, two: Any, where: str = "") -> bool:
    """Equal, bit for bit, in nested dicts and lists."""
    if isinstance(one, Tensor):
        return (one.shape, one.dtype) == (two.shape, two.dtype) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key], f"{where}.{key}") for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(same(a, b, where) for a, b in zip(one, two, strict=True))
    return one == two


def equal(one: Sequence[Any], two: Sequence[Any]) -> bool:
    return same(list(one), list(two))
