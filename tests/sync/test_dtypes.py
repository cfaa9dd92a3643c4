"""Networks whose tensors have several dtypes, or one that is averaged in another: one flat tensor for each."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resist.job import Job
from resist.planning.strategy import OuterSGD, Strategy, local_sgd, resist, switch
from resist.subnet.network import tensors_of
from resist.sync.worker import Worker

WIDTH = 8


class Mixed(nn.Module):
    """A block with half-precision weights, a norm in single precision, a complex filter, a double statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH).bfloat16()
        self.filter = nn.Parameter(0.1 * torch.randn(WIDTH // 2 + 1, dtype=torch.complex64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("seen").add_(x.detach().square().mean())
        h = torch.fft.irfft(torch.fft.rfft(self.norm(x)) * self.filter, WIDTH)
        return x + self.fc(F.relu(h).bfloat16()).float()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Mixed() for _ in range(6))
        self.head = nn.Linear(WIDTH, 3).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.bfloat16()).float()


def local_steps(job: Job, optimizers: list[torch.optim.Optimizer]) -> None:
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        generator = torch.Generator().manual_seed(100 * worker.index + job.step_index)
        optimizer.zero_grad()
        worker.model(torch.randn(5, 4, generator=generator)).square().mean().backward()
        optimizer.step()


def named(job: Job, worker: Worker) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in worker.subnet.state(job.plan.held(worker.index)).items()}


def mean(copies: list[Tensor]) -> Tensor:
    """The exact mean, rounded once."""
    wide = torch.complex128 if copies[0].is_complex() else torch.float64
    return torch.stack([copy.to(wide) for copy in copies]).mean(0).to(copies[0].dtype)


STRATEGIES = {
    "parts": resist(3, 2, capacities=(4, 3, 2)),
    "everything": local_sgd(3, 2, optimizer_state="average"),
    "growing": switch(resist(2, 2), local_sgd(2, 2), at_round=1),
    "outer": resist(2, 2, min_depth=4, outer=OuterSGD(1.0, 0.0)),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_each_tensor_becomes_its_mean_over_holders(name: str) -> None:
    strategy: Strategy = STRATEGIES[name]
    job = Job(Net, strategy, chains="blocks", seed=1)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(worker.model.parameters(), lr=0.1, momentum=0.9) for worker in job.workers
    ]
    for _ in range(3):
        local_steps(job, optimizers)
        job.step(*optimizers)
        local_steps(job, optimizers)
        before = [named(job, worker) for worker in job.workers]
        job.step(*optimizers)
        for worker in job.workers:
            for key, value in named(job, worker).items():
                expected = mean([tensors[key] for tensors in before if key in tensors])
                assert value.dtype == expected.dtype
                rtol = 8e-3 if value.dtype == torch.bfloat16 else 1e-6
                torch.testing.assert_close(value, expected, rtol=rtol, atol=1e-8)
    full = job.full_model()
    assert full is not None
    dtypes = {torch.float32, torch.bfloat16, torch.complex64, torch.float64}
    assert {tensor.dtype for tensor in tensors_of(full).values()} == dtypes
