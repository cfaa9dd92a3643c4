"""Running statistics of the full network: which layers are estimated again, and what that leaves alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import resist
from resist.subnet.batchnorm import has_running_statistics, recalibrate


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.conv(x)))


class Net(nn.Module):
    def __init__(self, stem: nn.Module | None = None) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(4) if stem is None else stem
        self.blocks = nn.Sequential(*(Block() for _ in range(4)))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.blocks(self.stem(x))


def data(step: int) -> Tensor:
    return 2 + 3 * torch.randn(8, 4, 5, generator=torch.Generator().manual_seed(step))


def train(job: Job, steps: int) -> None:
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.01) for worker in job.workers]
    for step in range(steps):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            worker.model(data(10 * worker.index + step)).square().mean().backward()
            optimizer.step()
        job.step(*optimizers)


def norms(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (module.running_mean.clone(), module.running_var.clone())
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.InstanceNorm1d)
    }


@pytest.mark.parametrize("frozen", ["stem", "all", "whole network"])
def test_layers_that_the_user_froze_are_left_alone(frozen: str) -> None:
    job = Job(Net, resist(2, 2), seed=3)
    before = norms(job.workers[0].model)
    with torch.no_grad():
        for worker in job.workers:
            for module in worker.model.modules():
                if isinstance(module, nn.BatchNorm1d):
                    module.running_mean.fill_(0.5)
            if frozen == "whole network":
                worker.model.eval()
            for name, module in worker.model.named_modules():
                if frozen == "all" or name == "stem":
                    module.eval() if isinstance(module, nn.BatchNorm1d) else None
    train(job, 4)
    for worker in job.workers:
        worker.model.eval()  # as one does to look at a sub-network between two rounds
    full = job.full_model([data(99)])
    assert full is not None
    after = norms(full)
    for name, (mean, var) in after.items():
        left_alone = frozen != "stem" or name == "stem"
        assert torch.equal(mean, torch.full((4,), 0.5)) == left_alone, name
        assert torch.equal(var, before["stem"][1]) == left_alone, name
    if frozen != "stem":
        job.full_model()  # needs no batches


def test_instance_norm_is_estimated_too() -> None:
    job = Job(lambda: Net(nn.InstanceNorm1d(4, track_running_stats=True)), resist(2, 2), batchnorm="recalibrate")
    train(job, 2)
    with pytest.raises(UserError, match="estimates statistics on training batches"):
        job.full_model()
    full = job.full_model([data(50), data(51), data(52)])
    assert full is not None
    mean, var = norms(full)["stem"]
    batches = torch.cat([data(step) for step in (50, 51, 52)])
    torch.testing.assert_close(mean, batches.mean((0, 2)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(var, batches.var(2).mean(0), rtol=1e-4, atol=1e-4)
    assert full.get_submodule("stem").momentum == 0.1


def test_layers_frozen_before_the_first_step_are_left_alone() -> None:
    job = Job(Net, resist(2, 2), seed=3)
    for worker in job.workers:
        worker.model.get_submodule("stem").eval()
    full = job.full_model([data(99)])
    assert full is not None
    assert torch.equal(norms(full)["stem"][0], torch.zeros(4))
    assert not torch.equal(norms(full)["blocks.0.norm"][0], torch.zeros(4))


@pytest.mark.parametrize("wrap", [lambda x: {"x": x, "other": "text"}, lambda x: ({"x": x}, 0), lambda x: [x, 0]])
def test_batches_may_be_keyword_arguments(wrap: Callable[[Tensor], object]) -> None:
    class Named(Net):
        def forward(self, x: Tensor, other: str = "text") -> Tensor:
            assert other == "text"
            return super().forward(x)

    found, expected = Named(), Net()
    found.load_state_dict(expected.state_dict())
    for model, batches in ((found, [wrap(data(1)), wrap(data(2))]), (expected, [data(1), data(2)])):
        torch.manual_seed(0)
        recalibrate(model, batches, torch.device("cpu"))
    assert all(map(torch.equal, found.state_dict().values(), expected.state_dict().values()))
    with pytest.raises(UserError, match="full_model got batches of type int; give tensors, dictionaries of"):
        recalibrate(found, [0], torch.device("cpu"))


class Frozen(nn.Module):
    """As FrozenBatchNorm2d: statistics that are never estimated."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.full((4,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x - self.running_mean[:, None]


def test_a_frozen_norm_asks_for_no_batches() -> None:
    model = nn.Sequential(Frozen())
    assert not has_running_statistics(model)
    assert has_running_statistics(nn.Sequential(nn.BatchNorm1d(3)).eval())


def test_estimation_is_that_of_torch_and_leaves_other_buffers_alone() -> None:
    """As `torch.optim.swa_utils.update_bn`, without dropout; counters of the network stay."""
    model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    for module in (*model.modules(), *other.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    recalibrate(model.eval(), [data(step) for step in range(3)], torch.device("cpu"))
    torch.optim.swa_utils.update_bn([data(step) for step in range(3)], other)
    for name, value in other.state_dict().items():
        if name != "calls":
            torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    assert float(model.calls) == 0
    assert not model.training


def test_the_random_state_is_not_touched() -> None:
    job = Job(Net, resist(2, 2), seed=3)
    train(job, 2)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = job.full_model([data(50)])
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second = job.full_model([data(50)])
    assert first is not None
    assert second is not None
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
