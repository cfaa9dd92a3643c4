"""Networks with tied weights, tables that blocks share, buffers that forward writes to, scalars as parameters."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import OuterSGD, Strategy, diloco, local_sgd, resist, switch
from resist.subnet.seeded import build_seeded
from resist.subnet.tensors import tensors_of


class Rotation(nn.Module):
    """A table without parameters, as rotary embeddings have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0.1, 2.0, 8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.get_buffer("table")


class Standardize(nn.Module):
    """Buffers only, of one block (or of none): a running mean of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("mean").lerp_(x.detach().mean(0), 0.1)
            self.get_buffer("seen").add_(1)
        return x - self.get_buffer("mean")


class Block(nn.Module):
    """Two layers with one weight, a scalar gate, a rotation (an own one, or one of all blocks), a mask."""

    def __init__(self, rotation: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.rotation, self.standardize = rotation, Standardize()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.gate = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.first(self.rotation(self.standardize(x))).tanh() * self.get_buffer("mask")
        return x + self.gate * self.second(inner)


class Net(nn.Module):
    def __init__(self, shared: bool, rotation_first: bool, num_blocks: int = 5) -> None:
        super().__init__()
        rotation, mask = Rotation(), torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1])
        if rotation_first:
            self.rotation = rotation
        self.stem = nn.Linear(4, 8)
        blocks = [
            Block(rotation if shared else Rotation(), mask if shared else mask.clone()) for _ in range(num_blocks)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.rotation = rotation
        self.head, self.other = nn.Linear(8, 4), nn.Linear(8, 4)
        self.other.weight = self.head.weight
        self.register_buffer("offset", torch.ones(4))
        self.other.register_buffer("offset", self.get_buffer("offset"))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.rotation(x)
        return self.head(x) + self.other(x) * self.other.get_buffer("offset")


NETS: dict[str, Callable[[], nn.Module]] = {
    "own tables": lambda: Net(shared=False, rotation_first=False),
    "a table of all blocks": lambda: Net(shared=True, rotation_first=False),
    "a table of all, outside": lambda: Net(shared=True, rotation_first=True),
}
STRATEGY = switch(resist(2, 2, capacities=(3, 3)), resist(2, 2, capacities=(4, 2)), at_round=2)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("chain", ["blocks:0-4", "blocks:1-4"])
def test_conservation(net: str, chain: str) -> None:
    """Splitting and averaging, with capacities that change, gives every tensor and the logits back, bit for bit."""
    job = Job(NETS[net], STRATEGY, chains=(chain,), scale=1.0)
    start = build_seeded(NETS[net], 0).eval()
    x = torch.randn(3, 4)
    for _ in range(5):
        full = job.full_model()
        assert full is not None
        assert full.state_dict().keys() == start.state_dict().keys()
        for name, value in start.state_dict().items():
            assert torch.equal(value, full.state_dict()[name]), name
        assert torch.equal(full(x), start(x))
        job.synchronize()


@pytest.mark.parametrize("net", NETS)
def test_averages_are_conserved(net: str) -> None:
    """As the weights are, tables of all blocks included."""
    job = Job(NETS[net], STRATEGY, scale=1.0)
    job.follow(*(AveragedModel(worker.model) for worker in job.workers))
    start = build_seeded(NETS[net], 0).eval()
    for _ in range(4):
        job.synchronize()
    full = job.full_model(averaged=True)
    assert full is not None
    assert all(torch.equal(value, full.state_dict()[name]) for name, value in start.state_dict().items())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training(net: str, optimizer: type[torch.optim.Optimizer]) -> None:
    """What is tied stays tied, tables stay as they are, all that is trained changes."""
    job = Job(NETS[net], STRATEGY)
    optimizers = [optimizer(worker.model.parameters(), lr=0.1) for worker in job.workers]  # type: ignore[call-arg]
    start = {name: t.detach().clone() for name, t in tensors_of(build_seeded(NETS[net], 0)).items()}
    for step in range(10):
        for worker, one in zip(job.workers, optimizers, strict=True):
            one.zero_grad()
            generator = torch.Generator().manual_seed(10 * step + worker.index)
            worker.model(torch.randn(6, 4, generator=generator)).square().mean().backward()
            one.step()
        job.step(*optimizers)
    full = job.full_model()
    assert isinstance(full, Net)
    assert full.head.weight is full.other.weight
    assert full.get_buffer("offset") is full.other.get_buffer("offset")
    for block in full.blocks:
        assert block.first.weight is block.second.weight
    for name, value in tensors_of(full).items():
        constant = name.endswith(("table", "mask", "offset"))
        assert torch.equal(start[name], value) == constant, name
    assert (job.round, job.workers[0].subnet.capacities) == (5, (4,))


def test_a_step_count_is_no_weight_for_a_parameter_without_dimensions() -> None:
    """Adam's step count has the shape of such a parameter; it must not travel as a third state."""
    job = Job(NETS["own tables"], resist(2, 1, capacities=(3, 3)))
    optimizers = [torch.optim.Adam(worker.model.parameters()) for worker in job.workers]
    for _ in range(2):
        for worker in job.workers:
            worker.model(torch.randn(6, 4)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        job.step(*optimizers)
    assert [set(worker.state) for worker in job.workers] == [{"exp_avg", "exp_avg_sq"}] * 2
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        for state in optimizer.state.values():
            assert float(state["step"]) == 2
        gate = worker.model.get_parameter("blocks.0.gate")
        (flat,) = worker.state["exp_avg"].values()
        inside = optimizer.state[gate]["exp_avg"].data_ptr() - flat.data_ptr()
        assert 0 <= inside < flat.numel() * flat.element_size()


def test_a_table_of_another_type_is_no_obstacle_where_all_blocks_share_it() -> None:
    def mixed() -> nn.Module:
        net = Net(shared=True, rotation_first=False).double()
        net.rotation.table = net.rotation.get_buffer("table").float()
        return net

    job = Job(mixed, resist(2, 1, capacities=(3, 3)), scale=1.0)
    full = job.full_model()
    assert full is not None
    assert full.get_submodule("rotation").get_buffer("table").dtype == torch.float32
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(full(x), build_seeded(mixed, 0).eval()(x))


def test_weights_tied_across_blocks_leave_nothing_to_deal_out() -> None:
    """As in ALBERT: every block is the same."""

    def albert() -> nn.Module:
        net = Net(shared=True, rotation_first=True)
        for block in net.blocks:
            block.first.weight = block.second.weight = net.blocks[0].first.weight
        return net

    with pytest.raises(UserError, match="the model has no chain"):
        Job(albert, resist(2, 1))


def tower() -> nn.Module:
    """No two layers are alike, so nothing can be partitioned."""
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.parametrize("example", [False, torch.ones(4, 6)])
@pytest.mark.parametrize("strategy", [local_sgd(3, 2), diloco(3, 2, outer=OuterSGD(1.0, 0.0))])
def test_a_network_without_a_chain_is_trained_whole(strategy: Strategy, example: object) -> None:
    def trained(model: nn.Module, worker: int, steps: range, optimizer: torch.optim.Optimizer) -> None:
        for step in steps:
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + worker))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    job = Job(tower, strategy, batchnorm="average", example=example, replicate=True)
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.1) for worker in job.workers]
    mean = build_seeded(tower, 0)
    for round in range(2):
        steps = range(2 * round, 2 * round + 2)
        copies = [deepcopy(mean) for _ in range(3)]
        for index, copy in enumerate(copies):
            trained(copy, index, steps, torch.optim.SGD(copy.parameters(), lr=0.1))
        for name, tensor in tensors_of(mean).items():
            if tensor.is_floating_point():
                tensor.data.copy_(torch.stack([tensors_of(copy)[name] for copy in copies]).mean(0))
        for step in steps:
            for worker, optimizer in zip(job.workers, optimizers, strict=True):
                trained(worker.model, worker.index, range(step, step + 1), optimizer)
            job.step(*optimizers)
    assert job.chains == ()
    full = job.full_model()
    assert full is not None
    for name, tensor in tensors_of(mean).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensors_of(full)[name], tensor, rtol=1e-5, atol=1e-6)

    again = Job(tower, strategy, batchnorm="average", example=example)
    again.attach(*(torch.optim.SGD(worker.model.parameters(), lr=0.1) for worker in again.workers))
    again.load_state_dict(job.state_dict())
    for name, tensor in tensors_of(again.workers[1].model).items():
        assert torch.equal(tensor, tensors_of(job.workers[0].model)[name])


@pytest.mark.parametrize("example", [False, torch.ones(4, 6)])
def test_resist_needs_a_chain_also_after_a_warmup_and_where_one_is_named(example: object) -> None:
    for strategy, chains in ((resist(2, 1), ()), (resist(2, 1, warmup_rounds=1), ()), (local_sgd(2, 1), "all")):
        with pytest.raises(UserError, match="the model has no chain"):
            Job(tower, strategy, chains=chains, example=example)
