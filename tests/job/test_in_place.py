"""Jobs on chains whose blocks keep their places, or are several children: trained as the usual ones."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from resist import job as job_module
from resist.blocks.bypass import in_place
from resist.blocks.chain import Chain
from resist.blocks.chains import chosen_of
from resist.job import Job
from resist.planning.strategy import Strategy, resist, switch
from resist.sync.local import Local

WIDTH = 8
STRATEGY = switch(resist(2, 2, capacities=(3, 2)), resist(2, 2, capacities=(2, 4)), at_round=2)


class Block(nn.Module):
    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.sharpness * self.linear(self.norm(x)))


class Other(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x - torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    """Blocks of one class, or of two that alternate, called one after another or by their names."""

    def __init__(self, period: int, by_name: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(4, WIDTH)
        blocks = [(Other if i % period else Block)(0.5 + 0.1 * i) for i in range(5 * period)]
        self.blocks = nn.Module() if by_name else nn.ModuleList(blocks)
        self.by_name, self.number = by_name, len(blocks)
        for number, block in enumerate(blocks if by_name else ()):
            self.blocks.add_module(f"{number}", block)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in map(self.blocks.get_submodule, map(str, range(self.number))) if self.by_name else self.blocks:
            x = block(x)
        return self.head(x)


def train(job: Job, optimizer: Callable[..., torch.optim.Optimizer], steps: int = 9) -> tuple[nn.Module, nn.Module]:
    """The full network, and that of the averages over time."""
    optimizers = [optimizer(worker.model.parameters(), lr=0.01) for worker in job.workers]
    averages = [AveragedModel(worker.model, use_buffers=False) for worker in job.workers]
    job.follow(*averages)
    for step in range(steps):
        for worker, one, average in zip(job.workers, optimizers, averages, strict=True):
            x = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + worker.index))
            worker.model(x).square().mean().backward()
            one.step()
            one.zero_grad()
            average.update_parameters(worker.model)
        job.step(*optimizers)
    full, averaged = job.full_model(), job.full_model(averaged=True)
    assert full is not None
    assert averaged is not None
    return full, averaged


def made(build: Callable[[], nn.Module], strategy: Strategy = STRATEGY) -> Job:
    return Job(build, strategy, chains=("blocks",), batchnorm="average")


@pytest.mark.parametrize("period", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", [pytest.param(torch.optim.AdamW, marks=pytest.mark.slow), torch.optim.SGD])
def test_a_form_changes_nothing(
    period: int, optimizer: Callable[..., torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained in place or compact, called by name or in turn: equal bit for bit, with capacities that change."""
    expected = train(made(lambda: Net(period, by_name=False)), optimizer)
    by_name = made(lambda: Net(period, by_name=True))
    assert by_name.chains[0].form == "in_place"
    found = [train(by_name, optimizer)]

    def placed(found: tuple[Chain, ...], model: nn.Module, names: Sequence[str], *, needed: bool) -> tuple[object, ...]:
        return tuple(in_place(chain, model) for chain in chosen_of(found, model, names, needed=needed))

    monkeypatch.setattr(job_module, "chosen_of", placed)
    found.append(train(made(lambda: Net(period, by_name=False)), optimizer))
    x = torch.randn(4, 4)
    for pair in found:
        for one, other in zip(pair, expected, strict=True):
            assert one.state_dict().keys() == other.state_dict().keys()
            assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
            assert torch.equal(one(x), other(x))


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("by_name", [False, True])
def test_conservation(period: int, by_name: bool) -> None:
    job = Job(lambda: Net(period, by_name), STRATEGY, chains=("blocks",), batchnorm="average", scale=1.0)
    start = Net(period, by_name)
    start.load_state_dict(job.full_model().state_dict())  # type: ignore[union-attr]
    x = torch.randn(4, 4)
    for _ in range(4):
        full = job.full_model()
        assert full is not None
        assert torch.equal(full(x), start.eval()(x))
        job.synchronize()


def test_holdings_are_those_of_the_plan() -> None:
    job = made(lambda: Net(2, by_name=True))
    for _ in range(4):
        for worker in job.workers:
            names = {name.split(".")[1] for name, _ in worker.model.named_parameters() if name.startswith("blocks")}
            held = job.plan.held(worker.index)[0]
            assert names == {str(2 * block + member) for block in held for member in (0, 1)}
        job.synchronize()


@pytest.mark.parametrize("torn", [False, True])
def test_members_change_in_place_as_elsewhere(torn: bool) -> None:
    found: list[dict[str, Tensor]] = []
    for by_name in (False, True):
        strategy = resist(3, 2, capacities=(2, 3, 2))
        options = {"chains": ("blocks",), "batchnorm": "average", "replicate": True, "elastic": True}
        job = Job(lambda by_name=by_name: Net(1, by_name), strategy, **options)
        train(job, torch.optim.AdamW, 5)
        job.torn = torn
        assert job.regroup(Local(2), kept=[0, 2]).recovered
        found.append(train(job, torch.optim.AdamW, 4)[0].state_dict())
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
