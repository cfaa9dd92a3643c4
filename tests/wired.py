"""Jobs with wire formats, or whose shared part is averaged in fragments, for tests."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resist.job import Job
from resist.models import PreActResNet
from resist.planning.capacities import Capacities
from resist.planning.strategy import OuterSGD, Strategy, diloco, local_sgd, resist, switch
from resist.planning.wire import Wire, as_wire
from resist.sync.worker import Worker
from support import floats

STEPS = 4  # of a round with fragments


def single() -> PreActResNet:
    """As `support.tiny`, in single precision."""
    return PreActResNet((1, 1, 7, 1), 5, width=4)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.003)


class Run:
    """A job on `single`, its optimizers and averages. With `equal`, all workers train alike."""

    def __init__(
        self,
        strategy: Strategy,
        wire: str | Wire = "fp32",
        make: Callable[[nn.Module], Optimizer] = sgd,
        *,
        equal: bool = False,
        network: Callable[[], nn.Module] = single,
        **options: object,
    ) -> None:
        options = {"batchnorm": "average", "example": False, "seed": 3, **options}
        self.job = Job(network, strategy, wire=wire, **options)  # type: ignore[arg-type]
        self.optimizers, self.equal = [make(worker.model) for worker in self.job.workers], equal
        self.job.attach(*self.optimizers)
        self.averages: list[AveragedModel] = []
        self.kept: list[Tensor] = []

    def follow(self) -> "Run":
        update = get_ema_multi_avg_fn(0.9)
        self.averages = [AveragedModel(worker.model, multi_avg_fn=update) for worker in self.job.workers]
        self.job.follow(*self.averages)
        return self

    def train(self, steps: int) -> "Run":
        """Take steps with random gradients towards zero, which is faster than batches, and change the statistics."""
        for _ in range(steps):
            for worker, optimizer in zip(self.job.workers, self.optimizers, strict=True):
                seed = self.job.step_index if self.equal else 1000 * worker.index + self.job.step_index
                random = torch.Generator().manual_seed(seed)
                for parameter in worker.model.parameters():
                    noise = torch.randn(parameter.shape, generator=random)
                    parameter.grad = parameter.detach() + noise if parameter.requires_grad else None
                for name, buffer in worker.model.named_buffers():
                    if "running" in name:
                        buffer.add_(0.01 if self.equal else 0.01 * (worker.index + 1))
                optimizer.step()
            for worker, average in zip(self.job.workers, self.averages, strict=False):
                average.update_parameters(worker.model)
            self.job.step(*self.optimizers)
        return self

    def weights(self) -> dict[str, Tensor]:
        full = self.job.full_model()
        assert full is not None
        return floats(full)


def streamed(strategy: Strategy, wire: str | Wire = "fp32", fragments: int = 2, delay: int = 1, **options: Any) -> Run:
    """A run with fragments."""
    return Run(strategy, replace(as_wire(wire), fragments=fragments, delay=delay), **options)


# Each with its number of local steps.
STRATEGIES: dict[str, Callable[[int], Strategy]] = {
    "resist": lambda steps: resist(3, steps),
    "average": lambda steps: resist(3, steps, capacities=(4, 3, 2), optimizer_state="average"),
    "reset": lambda steps: resist(3, steps, optimizer_state="reset"),
    "outer": lambda steps: resist(3, steps, min_depth=3, outer=OuterSGD()),
    "local_sgd": lambda steps: local_sgd(3, steps, optimizer_state="average"),
    "diloco": lambda steps: diloco(3, steps),
    "switch": lambda steps: switch(
        local_sgd(3, steps), switch(resist(3, steps), local_sgd(3, steps), at_round=4), at_round=2
    ),
    "growing": lambda steps: resist(3, steps, capacities=Capacities(by_worker=2, by_round={2: 4, 3: 6})),
}


def anchors(worker: Worker) -> Tensor:
    return torch.cat([fragment.feedback.anchor for fragment in worker.fragments])


def everyones(worker: Worker, *, blocks: bool) -> Tensor:
    """What every worker trains: of the shared part, or of all blocks as well."""
    layout = worker.subnet.layout
    return torch.cat([worker.subnet.flat[start:end] for start, end in layout.ranges(blocks=blocks)])


def tensors_of(run: Run) -> list[Tensor]:
    """Everything that the next rounds depend on."""
    found: list[Tensor] = []
    for worker in run.job.workers:
        found += [worker.subnet.flat, *(worker.state[name][torch.float32] for name in sorted(worker.state))]
        for feedback in (fragment.feedback for fragment in worker.fragments):
            found += [t for t in (feedback.anchor, feedback.error, feedback.piece_error) if t is not None]
    return [tensor.clone() for tensor in found]
