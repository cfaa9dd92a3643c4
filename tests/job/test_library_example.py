"""`Job(..., example=batch)`: it changes nothing but what is refused, in all processes."""

import copy
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import resist
from pool import Pool
from resist import Job, UserError
from resist.checking.unchecked import note_unchecked
from support import batch, make, sgd, tiny, train, weights

TWO = resist.resist(2, 2, min_depth=0)


@pytest.mark.slow
def test_training_is_bit_for_bit_the_same() -> None:
    rng = torch.get_rng_state()
    found = []
    for example in (False, batch(0, 0), lambda model: model(batch(0, 0)[0])):
        job, optimizers = make(TWO, example=example)
        assert torch.equal(rng, torch.get_rng_state())
        train(job, optimizers, 4)
        found.append(weights(job))
    assert all(torch.equal(value, other[name]) for other in found[1:] for name, value in found[0].items())


@pytest.mark.slow
def test_without_an_example_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    note_unchecked.cache_clear()
    with caplog.at_level(logging.INFO, logger="resist"):
        for example in (False, batch(0, 0), None, None):
            Job(tiny, TWO, example=example)
    lines = [record.getMessage() for record in caplog.records if "without an example" in record.getMessage()]
    assert len(lines) == 1
    assert "give Job one batch, example=batch" in lines[0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class LastNorm(nn.Module):
    """It uses a layer of its last block again."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if len(x) == 3:
            raise RuntimeError("three items")
        return self.blocks[-1].a(x)  # type: ignore[operator,union-attr]


def refusal(_: object) -> str:
    """Processes with different batches, of which one cannot be run."""
    index = torch.distributed.get_rank()
    try:
        Job(LastNorm, TWO, example=torch.randn(3 if index == 1 else 2, 4))
    except UserError as error:
        return str(error)
    return "accepted"


@pytest.mark.slow
def test_all_processes_fail_with_one_of_them(pool: Pool) -> None:
    answers = pool.run(2, refusal, None)
    assert len(set(answers)) == 1
    assert "process 0" in answers[0]


def other_batches(_: object) -> list[str]:
    index = torch.distributed.get_rank()
    job = Job(tiny, TWO, batchnorm="average", example=batch(index, 0, num=2 + index))
    train(job, [sgd(job.model)], 2)
    return [chain.name for chain in job.chains]


@pytest.mark.slow
def test_processes_may_have_other_batches(pool: Pool) -> None:
    assert pool.run(2, other_batches, None) == [["layer3:1-6"]] * 2


def test_the_reason_has_its_cause() -> None:
    with pytest.raises(UserError, match=r"cannot be run with `example` \(RuntimeError: three items\)") as raised:
        Job(LastNorm, TWO, example=torch.randn(3, 4))
    assert isinstance(raised.value.__cause__, RuntimeError)


class ByRange(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for number in range(6):
            x = self.blocks[number](x)
        return x


def test_an_error_of_a_sub_network_says_that_it_is_shallower() -> None:
    job = Job(ByRange, TWO)
    for worker in job.workers:
        with pytest.raises(IndexError) as raised:
            worker.model(torch.randn(2, 4))
        (note,) = raised.value.__notes__
        assert "holds only some of the 6 blocks of chain blocks:0-5. If the whole network takes this batch" in note
    whole = Job(ByRange, resist.local_sgd(1))
    assert whole.model(torch.randn(2, 4)).shape == (2, 4)
    with pytest.raises(RuntimeError) as other:
        whole.model(torch.randn(2, 5))
    assert not hasattr(other.value, "__notes__")


class InTurn(ByRange):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_hint_is_no_obstacle_to_copies_and_compilation() -> None:
    """One graph without a break, and none of it in the full network."""
    job = Job(InTurn, TWO)
    model, x, graphs = copy.deepcopy(job.workers[0].model), torch.randn(2, 4), list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    assert pickle.dumps(model)
    assert torch.equal(torch.compile(model, backend=backend, fullgraph=True)(x), job.workers[0].model(x))
    assert len(graphs) == 1
    full = job.full_model()
    assert full is not None
    assert not full._forward_hooks
