"""Attributes that differ along a chain move with their blocks; scaling of blocks that return a tuple."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import SwinTransformer

from resist.blocks.chains import choose_chains
from resist.cost.footprint import build_on_meta
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import local_sgd as everything
from resist.planning.strategy import resist, switch
from resist.subnet.scaling import scale_branches

BLOCKS = 7


class Gated(nn.Module):
    """A block that depends on its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(number / 10)
        self.number, self.shift = number, [number, -number]

    def forward(self, hidden: Tensor, mask: None = None) -> tuple[Tensor, str]:
        return hidden + torch.sin((1 + self.number) * self.linear(hidden)).roll(self.shift[0], -1), "more"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated(number) for number in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(hidden=x, mask=None)
        return x


def gated(model: nn.Module) -> list[Gated]:
    return [module for module in model.modules() if isinstance(module, Gated)]


def held(job: Job, index: int) -> tuple[int, ...]:
    return job.plan.held(index)[0]


STRATEGIES = [
    resist(3, 1, min_depth=0),
    resist(2, 1, capacities=(2, 6)),
    switch(everything(2, 1), resist(2, 1, capacities=(3, 5)), at_round=2),
]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["equal", "unequal", "warm-up"])
def test_they_are_where_their_block_is_in_every_round(strategy: object) -> None:
    """So a sub-network computes what the network computes without the blocks that it does not hold."""
    job = Job(Net, strategy, seed=3)  # type: ignore[arg-type]
    averages = [AveragedModel(worker.model) for worker in job.workers]
    job.follow(*averages)
    x = torch.randn(5, 4)
    for _ in range(5):
        whole = job_network(job)
        for worker, average in zip(job.workers, averages, strict=True):
            blocks = held(job, worker.index)
            for model in (worker.model, average.module):
                assert [one.number for one in gated(model)] == list(blocks)
                assert [one.shift for one in gated(model)] == [[b, -b] for b in blocks]
                assert [one.drop.p for one in gated(model)] == [b / 10 for b in blocks]
            y = x
            for number in blocks:
                y, _ = gated(whole)[number].eval()(y)
            torch.testing.assert_close(worker.model.eval()(x), y)
        job.synchronize()
    full = job.full_model()
    assert full is not None
    assert [(one.number, one.drop.p) for one in gated(full)] == [(b, b / 10) for b in range(BLOCKS)]


def job_network(job: Job) -> nn.Module:
    """The network as it was built, without training."""
    with torch.random.fork_rng():
        torch.manual_seed(job.seed)
        return Net()


@pytest.mark.parametrize("scale", [0.25, 0.6])
def test_the_branch_of_a_block_that_returns_a_tuple_and_is_called_by_name(scale: float) -> None:
    net, x = Net().eval(), torch.randn(3, 4)
    expected = x
    for block in gated(net):
        expected = expected + scale * (block(expected)[0] - expected)
    scale_branches(net, choose_chains(net, ("layers",)), [scale])
    torch.testing.assert_close(net(x), expected)
    assert net.layers[0](hidden=x)[1] == "more"


@pytest.mark.parametrize(
    "forward",
    [lambda x: x[:1], lambda x: None, lambda x: (None, x)],
    ids=["shape", "nothing", "second"],
)
def test_a_block_that_cannot_be_scaled_is_reported(forward: object) -> None:
    class Odd(Gated):
        pass

    net = Net()
    chains = choose_chains(net, ("layers:0-1",))
    net.layers[0] = Odd(0)
    net.layers[0].forward = forward  # type: ignore[method-assign,assignment]
    scale_branches(net, chains, [0.5])
    with pytest.raises(UserError, match=r"an? Odd cannot be scaled: it has to take a tensor and return one"):
        net.layers[0](torch.randn(2, 4))


def test_windows_are_shifted_with_their_block() -> None:
    """torchvision's Swin: every other block of a section shifts its windows."""

    def build() -> SwinTransformer:
        return SwinTransformer([4, 4], 8, [1, 1, 6, 1], [1, 2, 2, 2], [2, 2], num_classes=3)

    (chain,) = choose_chains(build_on_meta(build))
    assert chain.name == "features.5:0-5"
    job = Job(build, resist(2, 1, min_depth=0), seed=1)
    for _ in range(4):
        for worker in job.workers:
            section = worker.model.get_submodule("features.5")
            shifts = [block.attn.shift_size for block in section.children()]  # type: ignore[union-attr]
            assert shifts == [[0, 0] if block % 2 == 0 else [1, 1] for block in held(job, worker.index)]
        job.synchronize()
