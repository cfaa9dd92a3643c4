"""Small networks, batches that depend only on worker and step, and the loop that a user would write."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from resist.job import Job
from resist.models import PreActResNet
from resist.planning.strategy import Strategy
from resist.sync.worker import Worker

CLASSES = 5
BLOCKS = 6  # in the chain of `tiny`


def tiny() -> PreActResNet:
    """A pre-activation ResNet with six blocks in its chain. In double precision, so that tolerances can be tight."""
    return PreActResNet((1, 1, BLOCKS + 1, 1), CLASSES, width=4).double()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(torch.relu(self.norm(x)))


def slight() -> nn.Module:
    """Six blocks of one convolution, for tests that compile it. In double precision."""
    blocks = nn.Sequential(*(Residual() for _ in range(BLOCKS)))
    return nn.Sequential(nn.Conv2d(3, 4, 3), blocks, nn.Flatten(), nn.Linear(144, CLASSES)).double()


def preact(model: nn.Module | None) -> PreActResNet:
    assert isinstance(model, PreActResNet)
    return model


def full_of(job: Job) -> PreActResNet:
    """The full network of a job on `tiny`."""
    return preact(job.full_model())


def batch(worker: int, step: int, num: int = 4) -> tuple[Tensor, Tensor]:
    """Images (num, 3, 8, 8) float64 and labels (num,)."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    images = torch.randn(num, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.randint(CLASSES, (num,), generator=generator)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def make(
    strategy: Strategy,
    optimizer: Callable[[nn.Module], Optimizer] = sgd,
    network: Callable[[], nn.Module] = tiny,
    **options: object,
) -> tuple[Job, list[Optimizer]]:
    """A job and the optimizers of its hosted workers."""
    job = Job(network, strategy, **{"batchnorm": "average", **options})  # type: ignore[arg-type]
    return job, [optimizer(worker.model) for worker in job.workers]


def train_step(worker: int, model: Callable[[Tensor], Tensor], optimizer: Optimizer, step: int) -> None:
    images, labels = batch(worker, step)
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def local_step(job: Job, optimizers: Sequence[Optimizer]) -> None:
    """A step of every hosted worker, before `job.step`."""
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        train_step(worker.index, worker.model, optimizer, job.step_index)


def train(job: Job, optimizers: Sequence[Optimizer], steps: int) -> None:
    for _ in range(steps):
        local_step(job, optimizers)
        job.step(*optimizers)


def weights(job: Job) -> dict[str, Tensor]:
    """Parameters and float buffers of the full network by global dotted name, cloned."""
    full = job.full_model()
    assert full is not None
    return floats(full)


def floats(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if t.is_floating_point()}


def by_name(job: Job, worker: Worker, value: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """`value(parameter)` of the worker's parameters by global dotted name, cloned; left out where it is None."""
    named: dict[str, Tensor] = {}
    for parameter, place in worker.subnet.parameter_places():
        name = worker.subnet.layout.full_name(place, job.plan.held(worker.index))
        if (tensor := value(parameter)) is not None:
            named[name] = tensor.detach().clone()
    return named


def states(job: Job, optimizers: Sequence[Optimizer], state_name: str) -> list[dict[str, Tensor]]:
    """The optimizer state `state_name` of each hosted worker by global dotted name."""
    return [
        by_name(job, worker, lambda parameter, o=optimizer: o.state.get(parameter, {}).get(state_name))
        for worker, optimizer in zip(job.workers, optimizers, strict=True)
    ]


class Shared:
    """A process that shares the work with others, whose results are known."""

    def __init__(self, index: int, count: int, results: list[Tensor]) -> None:
        self.index, self.count, self.results = index, count, results

    def gather(self, action: Callable[[], Tensor]) -> list[Tensor]:
        self.results.append(action())
        return self.results
