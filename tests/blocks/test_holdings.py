"""What is dealt out: all chains together, the share of a worker, and the notes on it."""

import logging

import pytest
from torch import Tensor, nn

from resist.blocks.chain import Chain
from resist.blocks.chains import choose_chains, try_runs
from resist.blocks.holdings import Notes, notes_on_holdings, weights_of
from resist.blocks.selection import all_chains
from resist.errors import UserError
from resist.job import Job
from resist.models import PreActResNet
from resist.planning.capacities import Capacities
from resist.planning.strategy import Strategy, local_sgd, resist, switch

WIDTH = 4


class Block(nn.Module):
    def __init__(self, inner: nn.Module | None = None, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.inner = nn.Identity() if inner is None else inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.inner(x))


def blocks(num: int, width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(*(Block(width=width) for _ in range(num)))


def names(model: nn.Module) -> tuple[str, ...]:
    return tuple(chain.name for chain in choose_chains(model, ("all",)))


def every_chain(model: nn.Module) -> tuple[tuple[Chain, ...], tuple[str, ...]]:
    return all_chains(try_runs(model), model)


def notes(model: nn.Module, strategy: Strategy, chains: tuple[str, ...] = ()) -> Notes:
    return notes_on_holdings(model, choose_chains(model, chains), strategy)


def stages(*depths: int) -> PreActResNet:
    return PreActResNet(depths, 5, width=WIDTH)  # type: ignore[arg-type]


def test_all_chains_are_the_longest_first() -> None:
    assert names(stages(1, 4, 7, 3)) == ("layer3:1-6", "layer2:1-3", "layer4:1-2")
    assert names(nn.Sequential(blocks(2), nn.Linear(WIDTH, WIDTH), blocks(3))) == ("2:0-2", "0:0-1")
    with pytest.raises(UserError, match="the model has no chain of residual blocks"):
        choose_chains(nn.Linear(2, 2), ("all",))


def test_of_nested_chains_the_longer_one_is_taken() -> None:
    deep = nn.Sequential(*(Block(blocks(5)) for _ in range(3)))
    chains, left_out = every_chain(deep)
    assert [chain.name for chain in chains] == ["0.inner:0-4", "1.inner:0-4", "2.inner:0-4"]
    assert left_out == ("chain :0-2 is left undivided: chains 0.inner:0-4 and :0-2 overlap; name each block once",)
    wide = nn.Sequential(*(Block(blocks(2)) for _ in range(3)))
    assert names(wide) == (":0-2",)
    assert len(every_chain(wide)[1]) == 3


class Renumbered(nn.Module):
    """A chain of four blocks in the list, and one of three blocks in a child behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([*(Block() for _ in range(4)), blocks(3)])
        self.last = blocks(2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


def test_a_chain_in_a_renumbered_child_is_left_out_with_a_note() -> None:
    chains, left_out = every_chain(Renumbered())
    assert [chain.name for chain in chains] == ["layers:0-3", "last:0-1"]
    assert len(left_out) == 1
    assert "chain layers.4:0-2 is left undivided: chain layers.4:0-2 comes after layers:0-3" in left_out[0]
    assert left_out[0] in notes(Renumbered(), resist(2, min_depth=0), ("all",)).remarks
    assert left_out[0] not in notes(Renumbered(), resist(2, min_depth=0), ("layers",)).remarks


def test_weights() -> None:
    model = stages(1, 4, 7, 1)
    weights = weights_of(model, choose_chains(model, ("all",)))
    assert weights.total == sum(p.numel() for p in model.parameters())
    assert weights.held(weights.num_blocks) == weights.total
    assert weights.held((0, 0)) == weights.shared == weights.total - weights.divided


FOUR, THREE = "chain 0:0-3: every worker holds all 4 blocks", "chain 2:0-2: every worker holds all 3 blocks"
BOTH = "chains 0:0-3, 2:0-2: every worker holds all blocks"
LONGER = " or name a longer chain"


@pytest.mark.parametrize(
    ("chains", "strategy", "what", "depth", "remedy"),
    [
        ((), resist(2), FOUR, 4, "`min_depth=2`"),
        (("2",), resist(2), THREE, 4, "`min_depth=2`" + LONGER),
        (("2",), resist(3, min_depth=3), THREE, 3, "`min_depth=1`" + LONGER),
        (("all",), resist(4), BOTH, 4, "`min_depth=1`"),
        ((), switch(local_sgd(2), resist(2), at_round=3), FOUR, 4, "`min_depth=2`"),
    ],
)
def test_a_chain_that_is_whole_by_the_minimum_depth_is_a_warning(
    chains: tuple[str, ...], strategy: Strategy, what: str, depth: int, remedy: str
) -> None:
    model = nn.Sequential(blocks(4), nn.Linear(WIDTH, WIDTH), blocks(3))
    (found,) = notes(model, strategy, chains).warnings
    assert found == f"{what}, since `min_depth={depth}`; that is local SGD; give {remedy}"


@pytest.mark.parametrize(
    "strategy",
    [
        resist(8, min_depth=0),
        resist(2, min_depth=3),
        resist(1),  # of one worker this is expected
        resist(2, capacities=4),  # as asked
        resist(2, capacities=Capacities(by_round={0: 2, 5: 4})),
        local_sgd(2),
    ],
)
def test_no_warning_where_the_depth_is_not_the_cause(strategy: Strategy) -> None:
    assert notes(nn.Sequential(blocks(4)), strategy).warnings == ()


def test_the_share_of_a_worker_and_what_all_chains_would_make_of_it() -> None:
    """Two chains: 8 blocks of 20 parameters, and 6 of 272."""
    model = nn.Sequential(blocks(8, 4), nn.Linear(4, 16), blocks(6, 16))
    total = 8 * 20 + 80 + 6 * 272

    def share(first: int, second: int) -> str:
        return f"{(first * 20 + 80 + second * 272) / total:.0%}"

    found = notes(model, resist(2))
    assert found.share == share(4, 6)
    assert found.remarks == (
        f"with `chains=all` a worker holds {share(4, 4)} of the weights, instead of {share(4, 6)}",
        f"with `chains=all` and `min_depth=0` a worker holds {share(4, 3)} of the weights, instead of {share(4, 6)}",
    )
    # What gains nothing for the largest worker is not proposed, nor are capacities that do not fit the other chain.
    found = notes(model, resist(2, capacities=(6, 2)))
    assert found == Notes((), f"{share(2, 6)} to {share(6, 6)}", ())
    small = nn.Sequential(blocks(3, 4), nn.Linear(4, 16), blocks(2, 16), nn.Linear(16, 4), blocks(8, 4))
    assert notes(small, resist(2, capacities=1), ("2",)).remarks == ()
    # The large one is chosen already.
    assert notes(model, resist(2), ("2",)).remarks == ()
    assert notes(model, resist(2), ("all",)).remarks == ()


def test_a_job_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="resist")
    job = Job(lambda: stages(1, 1, 5, 1), resist(2, 1), example=False)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO", "INFO"]
    assert caplog.messages[0].startswith("chain layer3:1-4: every worker holds all 4 blocks, since `min_depth=4`")
    assert caplog.messages[1] == "a worker holds 100% of the weights"
    assert caplog.messages[2].startswith("note: with `min_depth=0` a worker holds ")
    caplog.clear()
    job.close()
    Job(lambda: stages(1, 1, 5, 1), local_sgd(2, 1), example=False)
    assert caplog.records == []


def test_a_job_takes_all_chains() -> None:
    job = Job(lambda: stages(1, 4, 7, 1), resist(2, 1, min_depth=0), chains="all")
    assert [chain.name for chain in job.chains] == ["layer3:1-6", "layer2:1-3"]
    assert [worker.subnet.capacities for worker in job.workers] == [(3, 2)] * 2
