"""Buffers and other tensors that a network keeps besides its weights: none is lost, or stays with the slot."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pool import Pool
from resist.errors import DivergedError
from resist.job import Job
from resist.planning.strategy import Strategy, local_sgd, resist, switch
from resist.subnet.network import Subnet

pytestmark = pytest.mark.slow

WIDTH, TOKENS, BLOCKS = 8, 4, 6


class Block(nn.Module):
    """A residual block; subclasses keep something besides the weights."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(F.relu(self.norm(x)))


class Net(nn.Module):
    def __init__(self, block: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(block(i) for i in range(BLOCKS))
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def step(job: Job, optimizers: list[torch.optim.Optimizer]) -> None:
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        generator = torch.Generator().manual_seed(100 * worker.index + job.step_index)
        optimizer.zero_grad()
        worker.model(torch.randn(5, TOKENS, 3, generator=generator)).square().mean().backward()
        optimizer.step()
    job.step(*optimizers)


def make(build: Callable[[], nn.Module], strategy: Strategy, **options: Any) -> tuple[Job, list[torch.optim.Optimizer]]:
    job = Job(build, strategy, chains="blocks", seed=1, **options)
    return job, [torch.optim.SGD(worker.model.parameters(), lr=0.05, momentum=0.9) for worker in job.workers]


def full_of(job: Job, **options: Any) -> nn.Module:
    full = job.full_model(**options)
    assert full is not None
    return full


class Masked(Block):
    """A causal mask with -inf, and a table of the block's own."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        mask = torch.triu(torch.full((TOKENS, TOKENS), float("-inf")), 1)
        self.register_buffer("mask", torch.where(mask.isinf(), mask, -0.1 * index))
        self.register_buffer("table", torch.rand(TOKENS, TOKENS) / 3 + index)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(x @ x.mT + self.get_buffer("mask") + self.get_buffer("table"), -1)
        return x + self.fc(weights @ self.norm(x))


def masked() -> nn.Module:
    net = Net(Masked)
    net.register_buffer("bias", torch.tensor([float("inf"), 0.3, 0.7]))
    net.register_buffer("positions", torch.rand(1000))
    return net


CONSTANT = ("mask", "table", "bias", "positions")


def constants(net: nn.Module) -> dict[str, Tensor]:
    return {name: b.clone() for name, b in net.named_buffers() if name.rpartition(".")[2] in CONSTANT}


def train_masked(strategy: Strategy) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], dict[str, int]]:
    """The constants of the full network and of each sub-network after three rounds, and the bytes of the last one."""
    job, optimizers = make(masked, strategy)
    own: list[dict[str, Tensor]] = []
    for _ in range(6):
        job.transport.take()
        step(job, optimizers)
    taken = job.transport.take()["bytes"]
    for worker in job.workers:
        layout, held = worker.subnet.layout, worker.subnet.held
        names = {n: layout.full_name(worker.subnet.place(n), held) for n in constants(worker.subnet.model)}
        own.append({names[n]: value for n, value in constants(worker.subnet.model).items()})
    full = job.full_model()
    return {} if full is None else constants(full), own, taken  # type: ignore[return-value]


@pytest.mark.parametrize("strategy", [local_sgd(2, 2), local_sgd(3, 2), resist(3, 2, min_depth=0)], ids=repr)
def test_constant_buffers_are_left_alone(strategy: Strategy) -> None:
    """Bit for bit, and unsent: -inf is no sign of divergence, and equal copies are not averaged."""
    found, own, taken = train_masked(strategy)
    expected = constants(Job(masked, resist(1), chains="blocks", seed=1).full_model() or nn.Identity())
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    if strategy.name == "local_sgd":
        assert all(torch.equal(buffers[name], expected[name]) for buffers in own for name in buffers)
        parameters = sum(p.numel() for p in masked().parameters())
        assert taken["shared"] == strategy.workers * (2 * (strategy.workers - 1) * 4 * parameters // strategy.workers)


@pytest.mark.parametrize("strategy", [local_sgd(2, 2), resist(2, 2, min_depth=0)], ids=repr)
def test_constant_buffers_are_left_alone_in_two_processes(pool: Pool, strategy: Strategy) -> None:
    expected = train_masked(resist(1, 2))[0]
    found = pool.run(2, train_masked, strategy)[0][0]
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_divergence_is_named() -> None:
    job, optimizers = make(masked, resist(2, 1))
    with torch.no_grad():
        job.workers[1].model.get_parameter("head.weight")[0, 0] = torch.nan
    with pytest.raises(DivergedError, match=r"worker 1 has weights that are not finite \(.*weight\) at the end of"):
        step(job, optimizers)


class Statistic(Block):
    """A running mean, written in place or assigned, with or without a graph."""

    how = "in place"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("ema", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 1))
        if self.how == "in place":
            self.ema.mul_(0.9).add_(0.1 * mean.detach())
        else:
            self.ema = 0.9 * self.ema.detach() + 0.1 * (mean if self.how == "graph" else mean.detach())
        return super().forward(x)


@pytest.mark.parametrize("how", ["assigned", "graph"])
@pytest.mark.parametrize(
    "strategy",
    [resist(2, 2, min_depth=4), local_sgd(3, 2), switch(resist(2, 2), local_sgd(2, 2), at_round=1), resist(1, 3)],
    ids=["parts", "everything", "growing", "one"],
)
def test_an_assigned_buffer_is_as_one_written_in_place(
    monkeypatch: pytest.MonkeyPatch, how: str, strategy: Strategy
) -> None:
    results: list[dict[str, Tensor]] = []
    for way in ("in place", how):
        monkeypatch.setattr(Statistic, "how", way)
        job, optimizers = make(lambda: Net(Statistic), strategy, replicate=strategy.workers > 1)
        for _ in range(7):
            step(job, optimizers)
        state = {name: value.clone() for name, value in job.workers[0].subnet.state(job.plan.held(0)).items()}
        full = {f"full.{name}": value for name, value in full_of(job).state_dict().items()}
        replicas = {f"replica.{name}": t.clone() for r in job.replicas for name, t in r.tensors.items()}
        results.append(state | full | replicas)
    first, second = results
    assert first.keys() == second.keys()
    assert all(first[name].abs().max() > 0 for name in first if name.endswith("ema") and name.startswith("full."))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-6, atol=1e-7)


class Codebook(nn.Module):
    """A module that all blocks use, with a statistic that each of them changes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("usage", torch.zeros(WIDTH))
        self.register_buffer("table", torch.rand(WIDTH) / 3)

    def forward(self, x: Tensor) -> Tensor:
        usage = 0.9 * self.get_buffer("usage") + 0.1 * x.detach().mean((0, 1))
        if Statistic.how == "assigned":
            self.usage = usage
        else:
            self.get_buffer("usage").copy_(usage)
        return x + self.get_buffer("table")


def with_codebook() -> nn.Module:
    codebook = Codebook()

    class Coded(Block):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.codebook = codebook

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.codebook(x)) - self.codebook.table

    return Net(Coded)


@pytest.mark.parametrize("how", ["in place", "assigned"])
@pytest.mark.parametrize(
    "strategy",
    [resist(3, 1, min_depth=0), local_sgd(3, 1), switch(resist(2, 1), local_sgd(2, 1), at_round=1)],
    ids=["parts", "everything", "growing"],
)
def test_a_buffer_that_all_blocks_use_is_averaged_over_workers(
    monkeypatch: pytest.MonkeyPatch, how: str, strategy: Strategy
) -> None:
    monkeypatch.setattr(Statistic, "how", how)
    job, optimizers = make(with_codebook, strategy)
    table = full_of(job).get_submodule("blocks.0.codebook").get_buffer("table").clone()
    for _ in range(3):
        seen: list[Tensor] = []
        with monkeypatch.context() as patch:
            patch.setattr(job, "step", lambda *_: None)
            step(job, optimizers)
        for worker in job.workers:
            seen.append(worker.model.get_submodule("blocks.0.codebook").get_buffer("usage").clone())
        job.step(*optimizers)
        expected = torch.stack(seen).mean(0)
        assert expected.abs().max() > 0
        for model in (*(worker.model for worker in job.workers), full_of(job)):
            for block in model.get_submodule("blocks").children():
                torch.testing.assert_close(block.codebook.get_buffer("usage"), expected)
                assert torch.equal(block.codebook.get_buffer("table"), table)


class Growing(Block):
    """A cache that grows, and one that is made in the first forward pass."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("late", None)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.cat((self.seen, x.detach().mean().reshape(1)))
        self.late = torch.zeros(2) if self.late is None else self.late + 1
        return super().forward(x)


@pytest.mark.parametrize("strategy", [resist(2, 2), switch(resist(2, 1), local_sgd(2, 2), at_round=1), local_sgd(2, 2)])
def test_buffers_that_grow_break_nothing(strategy: Strategy) -> None:
    job, optimizers = make(lambda: Net(Growing), strategy)
    for _ in range(5):
        step(job, optimizers)
    full = full_of(job)
    assert {len(block.get_buffer("seen")) for block in full.get_submodule("blocks").children()} <= set(range(7))
    assert len(full.get_buffer("blocks.0.seen")) == 6
    full(torch.randn(2, TOKENS, 3))
    loose = job.workers[0].subnet.loose()
    assert {"seen", "late"} <= set(loose[0, 0])


def test_buffers_that_grew_are_saved_and_loaded() -> None:
    first, optimizers = make(lambda: Net(Growing), resist(2, 2))
    for _ in range(4):
        step(first, optimizers)
    state = first.state_dict()
    second, _ = make(lambda: Net(Growing), resist(2, 2))
    for worker in second.workers:
        worker.model(torch.randn(2, TOKENS, 3))  # makes the late ones
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.05, momentum=0.9) for worker in second.workers]
    second.step(*optimizers)
    second.synchronize()
    second.load_state_dict(state)
    for a, b in zip(first.workers, second.workers, strict=True):
        ours, theirs = dict(a.model.named_buffers()), dict(b.model.named_buffers())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_loose_buffers_can_be_moved() -> None:
    """What is not loose in the values returns to its view."""
    net = Net(Growing)
    job = Job(lambda: net, resist(2, 1), chains="blocks")
    subnet = job.workers[0].subnet
    block = subnet.model.get_submodule("blocks.0")
    block(torch.ones(1, TOKENS, WIDTH))
    values = {name: value.clone() for name, value in subnet.loose()[0, 0].items()}
    assert values["seen"].shape == (2,)
    subnet.put_loose(0, 1, values)
    assert torch.equal(subnet.model.get_buffer("blocks.1.seen"), values["seen"])
    assert subnet.model.get_buffer("blocks.1.seen") is not values["seen"]
    subnet.put_loose(0, 0, {})
    assert subnet.model.get_buffer("blocks.0.seen").shape == (1,)
    assert (0, 0) not in subnet.loose() or "seen" not in subnet.loose()[0, 0]


def test_what_is_loose() -> None:
    class Counting(Block):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.register_buffer("count", torch.tensor(index))
            self.register_buffer("low", torch.tensor(float("inf")))
            self.usual, self.cumulative = nn.BatchNorm1d(TOKENS), nn.BatchNorm1d(TOKENS, momentum=None)

    subnet = Subnet(Net(Counting), [], ())
    assert set(subnet.loose()[None, 0]) == {
        f"blocks.{i}.{name}" for i in range(BLOCKS) for name in ("count", "low", "cumulative.num_batches_tracked")
    }


class Keeping(Block):
    """Results of the forward pass that are kept, in several forms."""

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        self.aux = (h**2).mean()
        self.maps = {"first": [h * 2], "pair": (h, self.aux)}
        self.norm.seen = h
        return h


@pytest.mark.parametrize("strategy", [resist(2, 2), switch(resist(2, 2), local_sgd(2, 2), at_round=1)])
def test_kept_activations_are_copied_without_their_graph(strategy: Strategy) -> None:
    job, optimizers = make(lambda: Net(Keeping), strategy, replicate=True)
    for _ in range(5):
        step(job, optimizers)
    kept = job.workers[0].model.get_submodule("blocks.0").aux
    full = full_of(job)
    assert job.workers[0].model.get_submodule("blocks.0").aux is kept
    assert kept.requires_grad
    assert not full.get_submodule("blocks.0").aux.requires_grad
    full(torch.randn(2, TOKENS, 3)).sum().backward()


def test_hooks_of_the_user_stay_with_the_subnetwork() -> None:
    calls: list[str] = []

    class Hooked(Block):
        def __init__(self, index: int) -> None:
            super().__init__(index)
            self.fc.register_forward_hook(double)

    job, optimizers = make(lambda: Net(Hooked), switch(resist(2, 1), local_sgd(2, 1), at_round=1))
    for worker in job.workers:
        for module in worker.model.get_submodule("blocks").modules():
            module.register_forward_hook(lambda *_: calls.append("forward"))
            module.register_forward_pre_hook(lambda *_: calls.append("pre"))
            module.register_full_backward_hook(lambda *_: calls.append("backward"))
    for _ in range(3):
        step(job, optimizers)
    assert calls
    calls.clear()
    full = full_of(job)
    x = torch.randn(2, TOKENS, 3)
    out = full(x)
    out.sum().backward()
    assert not calls
    job.workers[0].model(x)
    assert calls
    block = full.get_submodule("blocks.0")
    plain = F.linear(torch.ones(WIDTH), block.fc.weight, block.fc.bias)
    torch.testing.assert_close(block.fc(torch.ones(WIDTH)), 2 * plain)


def double(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
    return 2 * output


def test_each_tensor_of_the_full_network_can_be_saved_alone() -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__(Statistic)
            self.out = nn.Linear(WIDTH, 2)
            self.out.weight = self.head.weight
            self.register_buffer("first", torch.ones(300))
            self.register_buffer("second", self.first)

    job, optimizers = make(Tied, resist(2, 1))
    step(job, optimizers)
    full = full_of(job)
    file = io.BytesIO()
    torch.save(full.head.state_dict(), file)
    assert len(file.getvalue()) < 3000
    assert full.out.weight is full.head.weight
    assert full.second is full.first
    storages = {t.untyped_storage().data_ptr() for t in (*full.parameters(), *full.buffers())}
    assert len(storages) == len(list(full.parameters())) + len(list(full.buffers()))


def test_attributes_of_parameters_are_kept() -> None:
    def build() -> nn.Module:
        net = Net(Block)
        for parameter in net.parameters():
            parameter.no_decay = parameter.dim() == 1
        return net

    job, optimizers = make(build, switch(resist(2, 1), local_sgd(2, 1), at_round=1))
    step(job, optimizers)
    step(job, optimizers)
    for model in (job.workers[0].model, full_of(job)):
        assert all(p.no_decay == (p.dim() == 1) for p in model.parameters())


class Tallied(Block):
    """A count, a cumulative norm, and a mask of the block's own with -inf."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.tensor([0.1 * index, float("-inf")]))
        self.cumulative = nn.BatchNorm1d(TOKENS, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("count").add_(1)
        return super().forward(self.cumulative(x))


def tallies(strategy: Strategy) -> dict[str, Tensor]:
    """The loose buffers of the full network after five rounds of two steps."""
    job, optimizers = make(lambda: Net(Tallied), strategy, batchnorm="average")
    for _ in range(10):
        step(job, optimizers)
    full = job.full_model()
    return {} if full is None else dict(full.named_buffers())


def test_loose_buffers_of_other_processes_reach_the_full_network(pool: Pool) -> None:
    """Blocks go to and fro; each has been trained for ten steps, and keeps its mask."""
    strategy = resist(2, 2, min_depth=0)
    found, alone = pool.run(2, tallies, strategy)[0], tallies(strategy)
    assert found.keys() == alone.keys()
    for index in range(BLOCKS):
        name = f"blocks.{index}"
        assert int(found[f"{name}.count"]) == 10
        assert int(found[f"{name}.cumulative.num_batches_tracked"]) == 10
        assert torch.equal(found[f"{name}.mask"], torch.tensor([0.1 * index, float("-inf")]))
    assert all(torch.equal(found[name], alone[name]) for name in found if "running" not in name)
