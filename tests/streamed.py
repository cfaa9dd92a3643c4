"""Jobs whose shared part is averaged in fragments, for tests."""

from collections.abc import Callable
from dataclasses import replace

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

STEPS = 4  # of a round


def single() -> PreActResNet:
    return PreActResNet((1, 1, 7, 1), 5, width=4)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Run:
    """A job on `single` with fragments, its optimizers and batches."""

    def __init__(
        self,
        strategy: Strategy,
        wire: str | Wire = "fp32",
        fragments: int = 2,
        delay: int = 1,
        *,
        equal: bool = False,
        make: Callable[[nn.Module], Optimizer] = sgd,
        network: Callable[[], nn.Module] = single,
        **options: object,
    ) -> None:
        options = {"batchnorm": "average", "example": False, "seed": 3, **options}
        wire = replace(as_wire(wire), fragments=fragments, delay=delay)
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


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "resist": lambda: resist(3, STEPS),
    "average": lambda: resist(3, STEPS, capacities=(4, 3, 2), optimizer_state="average"),
    "outer": lambda: resist(3, STEPS, min_depth=3, outer=OuterSGD()),
    "local_sgd": lambda: local_sgd(3, STEPS, optimizer_state="average"),
    "diloco": lambda: diloco(3, STEPS),
    "switch": lambda: switch(
        local_sgd(3, STEPS), switch(resist(3, STEPS), local_sgd(3, STEPS), at_round=4), at_round=2
    ),
    "growing": lambda: resist(3, STEPS, capacities=Capacities(by_worker=2, by_round={2: 4, 3: 6})),
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
