"""Frozen weights and buffers: unsent while nobody changes them, exchanged from the round in which somebody does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pool import Pool
from resist.blocks.chains import choose_chains
from resist.cost.footprint import build_on_meta
from resist.cost.sizes import sizes_of
from resist.cost.traffic import round_traffic
from resist.job import Job
from resist.models import PreActResNet
from resist.planning.schedule import allreduce_bytes
from resist.planning.strategy import OuterSGD, Strategy, local_sgd, resist
from resist.subnet.changes import Watch

pytestmark = pytest.mark.slow

WIDTH = 8


class Lora(nn.Module):
    """A block with frozen weights and a small part that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm.requires_grad_(False)
        self.fc.requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.fc(torch.relu(h)) + self.up(self.down(h))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList(Lora() for _ in range(6))
        self.target = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, 3)
        self.register_buffer("table", torch.rand(100) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + 0 * self.target(x).sum()


def make(strategy: Strategy, **options: Any) -> tuple[Job, list[torch.optim.Optimizer]]:
    job = Job(Net, strategy, chains="blocks", seed=1, **options)
    return job, [torch.optim.SGD(worker.model.parameters(), lr=0.1, momentum=0.9) for worker in job.workers]


def step(job: Job, optimizers: list[torch.optim.Optimizer], *, synchronize: bool = True) -> None:
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        generator = torch.Generator().manual_seed(100 * worker.index + job.step_index)
        optimizer.zero_grad()
        worker.model(torch.randn(5, 3, generator=generator)).square().mean().backward()
        optimizer.step()
    if synchronize:
        job.step(*optimizers)


def train(strategy: Strategy, rounds: int) -> tuple[dict[str, Tensor], dict[str, int]]:
    job, optimizers = make(strategy)
    taken: Any = {}
    for _ in range(rounds):
        job.transport.take()
        step(job, optimizers)
        taken = job.transport.take()["bytes"]
    full = job.full_model()
    return {} if full is None else {n: t.clone() for n, t in full.state_dict().items()}, taken


FROZEN = ("stem", "target", "norm", "fc.", "table")


def frozen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if any(part in name for part in FROZEN)}


def test_a_change_of_any_tensor_in_any_slot_is_found() -> None:
    """Also one that no version counter shows, and of tensors that are summed together."""
    job = Job(lambda: PreActResNet((1, 1, 7, 1), 5, width=4), resist(2, 1), example=False, seed=1)
    subnet, seen = job.workers[0].subnet, 0
    subnet.changing.clear()
    watch = Watch(subnet)
    assert watch.changed() == set()
    for place, buffer in subnet.buffers.items():
        if buffer.view is not None:
            before = buffer.view.data[-1].clone()
            buffer.view.data[-1] += 1
            assert watch.changed() == {place.key}
            buffer.view.data[-1] = before
            seen += 1
    assert seen > 20
    assert watch.changed() == set()


@pytest.mark.parametrize("strategy", [local_sgd(3, 1), resist(5, 1, min_depth=3), resist(3, 1, min_depth=2)])
def test_frozen_weights_keep_their_bits_and_are_not_averaged(strategy: Strategy) -> None:
    found, taken = train(strategy, 4)
    expected, _ = train(resist(1, 1), 0)
    for name, value in frozen(expected).items():
        assert torch.equal(found[name], value), name
    trained = 4 * sum(p.numel() for n, p in Net().named_parameters() if n.startswith("head"))
    if strategy.name == "local_sgd":
        trained = 4 * sum(p.numel() for p in Net().parameters() if p.requires_grad)
    workers = strategy.workers
    assert taken["shared"] == workers * allreduce_bytes(trained, workers)


def test_frozen_weights_keep_their_bits_in_two_processes(pool: Pool) -> None:
    expected, _ = train(resist(1, 1), 0)
    for strategy in (resist(5, 1, min_depth=3), local_sgd(3, 1)):
        found, _ = pool.run(2, train, strategy, 3)[0]
        assert all(torch.equal(found[name], value) for name, value in frozen(expected).items())


@pytest.mark.parametrize("strategy", [local_sgd(3, 1), resist(3, 1, min_depth=2)])
def test_the_cost_model_counts_what_is_sent(strategy: Strategy) -> None:
    template = build_on_meta(Net)
    sizes = sizes_of(template, choose_chains(template, ("blocks",)))
    job, optimizers = make(strategy)
    for number in range(2):
        job.transport.take()
        plans = job.plan_of(number), job.plan_of(number + 1)
        step(job, optimizers)
        taken: Any = job.transport.take()["bytes"]
        expected = round_traffic(sizes, *plans, strategy=strategy)
        assert taken["shared"] == expected.bytes["shared"]
        assert taken.get("blocks", 0) == expected.bytes["blocks"]


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).double().mean(0)


def named(job: Job) -> list[dict[str, Tensor]]:
    return [{n: t.clone() for n, t in w.subnet.state(job.plan.held(w.index)).items()} for w in job.workers]


CHANGES = {
    "requires_grad": lambda net, worker: net.target.requires_grad_(),
    "one worker": lambda net, worker: net.target.weight.mul_(2) if worker == 1 else None,
    "data": lambda net, worker: net.target.weight.data.add_(worker),
    "new data": lambda net, worker: setattr(net.target.weight, "data", net.target.weight.data * (1 + worker)),
    "buffer": lambda net, worker: net.table.add_(worker),
    "permuted": lambda net, worker: setattr(net, "table", net.table.roll(worker)),
    "block": lambda net, worker: net.blocks[0].fc.weight.data.mul_(1 + worker),
}


@pytest.mark.parametrize("outer", [None, OuterSGD(1.0, 0.0)])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["local_sgd", "resist"])
def test_what_changes_is_averaged_from_then_on(name: str, change: str, outer: OuterSGD | None) -> None:
    strategy = resist(3, 1, capacities=(6, 6, 6) if name == "local_sgd" else (4, 3, 3), outer=outer)
    job, optimizers = make(strategy)
    step(job, optimizers)
    for _ in range(3):
        with torch.no_grad():
            for worker in job.workers:
                CHANGES[change](worker.subnet.model, worker.index)
        step(job, optimizers, synchronize=False)
        before = named(job)
        job.step(*optimizers)
        for tensors in named(job):
            for key, value in tensors.items():
                expected = mean([own[key] for own in before if key in own])
                torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=key)
    full = job.full_model()
    assert full is not None


def unfreeze(rank_of_worker: int) -> dict[str, Tensor]:
    """One worker of two unfreezes the target in the second round."""
    job, optimizers = make(resist(2, 2, min_depth=4))
    step(job, optimizers)
    step(job, optimizers)
    for worker in job.workers:
        if worker.index == rank_of_worker:
            with torch.no_grad():
                worker.model.get_parameter("target.weight").add_(1.0)
    step(job, optimizers)
    step(job, optimizers)
    full = job.full_model()
    return {} if full is None else {n: t.clone() for n, t in full.state_dict().items()}


def test_a_change_in_one_process_is_averaged(pool: Pool) -> None:
    expected = unfreeze(1)
    found = pool.run(2, unfreeze, 1)[0]
    torch.testing.assert_close(expected["target.weight"], weight_at_first() + 0.5, rtol=1e-5, atol=1e-6)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def weight_at_first() -> Tensor:
    return train(resist(1, 1), 0)[0]["target.weight"]
