"""Networks whose tensors have several dtypes, or one that is averaged in another: one flat tensor for each."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pool import Pool
from resist.blocks.chains import choose_chains
from resist.cost.footprint import build_on_meta
from resist.cost.sizes import sizes_of
from resist.cost.traffic import round_traffic
from resist.job import Job
from resist.planning.strategy import OuterSGD, Strategy, local_sgd, resist, switch
from resist.subnet.tensors import tensors_of
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


class Half(nn.Module):
    """Everything in dtypes of fewer than 32 bits, a buffer in 8."""

    dtype = torch.bfloat16

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(HalfBlock() for _ in range(4))
        self.head = nn.Linear(WIDTH, 37)
        self.to(self.dtype)
        for module in (self, *self.blocks):
            module.register_buffer("scales", torch.ones(WIDTH).to(torch.float8_e4m3fn))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class HalfBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.fc(x))


def averaged(strategy: Strategy, dropped: tuple[int, ...] = ()) -> dict[int, dict[str, Tensor]]:
    """Set the weights of each worker to numbers that depend on its index, synchronize; the weights of hosted ones."""
    job = Job(Half, strategy, chains="blocks", seed=1, on_nonfinite="drop")
    for worker in job.workers:
        with torch.no_grad():
            for name, tensor in worker.subnet.state(job.plan.held(worker.index)).items():
                tensor.copy_(value(worker.index, name, tensor))
    job.synchronize({worker: "a loss of nan" for worker in dropped if worker in job.transport.hosted})
    return {worker.index: {n: t.float() for n, t in named(job, worker).items()} for worker in job.workers}


def value(worker: int, name: str, like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * worker + sum(map(ord, name)))
    return torch.randn(like.shape, generator=generator).to(like.dtype)


def expected_means(strategy: Strategy, dropped: tuple[int, ...] = ()) -> dict[str, Tensor]:
    job = Job(Half, strategy, chains="blocks", seed=1)
    copies: dict[str, list[Tensor]] = {}
    for worker in job.workers:
        for name, tensor in worker.subnet.state(job.plan.held(worker.index)).items():
            if worker.index not in dropped:
                copies.setdefault(name, []).append(value(worker.index, name, tensor))
    return {name: mean(tensors).float() for name, tensors in copies.items()}


@pytest.mark.parametrize("dropped", [(), (1,)])
@pytest.mark.parametrize("strategy", [resist(5, 1, min_depth=3), local_sgd(3, 1)], ids=["parts", "everything"])
def test_half_precision_is_rounded_once(strategy: Strategy, dropped: tuple[int, ...]) -> None:
    expected = expected_means(strategy, dropped)
    for tensors in averaged(strategy, dropped).values():
        for name, found in tensors.items():
            if name in expected:  # else only a dropped worker held it
                assert torch.equal(found, expected[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_half_precision_is_rounded_once_over_processes(pool: Pool, processes: int) -> None:
    """Also where processes host several workers, and unequally many; all workers end with the same bits."""
    for strategy in (resist(5, 1, min_depth=3), local_sgd(4, 1)):
        expected = expected_means(strategy)
        for result in pool.run(processes, averaged, strategy):
            for tensors in result.values():
                for name, found in tensors.items():
                    assert torch.equal(found, expected[name]), name


def trained(name: str) -> dict[str, Tensor]:
    job = Job(Net, STRATEGIES[name], chains="blocks", seed=1)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(worker.model.parameters(), lr=0.1, momentum=0.9) for worker in job.workers
    ]
    for _ in range(6):
        local_steps(job, optimizers)
        job.step(*optimizers)
    full = job.full_model()
    return {} if full is None else {name: t.clone() for name, t in full.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRATEGIES)
def test_several_dtypes_in_two_processes(pool: Pool, name: str) -> None:
    expected = trained(name)
    found = pool.run(2, trained, name)[0]
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        rtol = 2e-2 if tensor.dtype == torch.bfloat16 else 2e-3
        torch.testing.assert_close(found[key], tensor, rtol=rtol, atol=2e-3)


def test_bytes_of_several_dtypes_are_those_of_the_cost_model() -> None:
    template = build_on_meta(Net)
    sizes = sizes_of(template, choose_chains(template, ("blocks",)))
    strategy = resist(3, 1, capacities=(4, 3, 2), optimizer_state="reset")
    job = Job(Net, strategy, chains="blocks", seed=1)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.SGD(worker.model.parameters(), lr=0.1) for worker in job.workers
    ]
    job.transport.take()
    local_steps(job, optimizers)
    job.step(*optimizers)
    taken = job.transport.take()["bytes"]
    expected = round_traffic(sizes, job.plan_of(0), job.plan_of(1), strategy=strategy)
    assert taken == {kind: number for kind, number in expected.bytes.items() if number}
