"""Batches for statistics: a last batch of one example, shares of several processes, layers that get one value."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import resist
from resist.subnet.batchnorm import recalibrate
from resist.subnet.calibration import NumberedBatches, numbered_inputs
from support import Shared

CPU = torch.device("cpu")


def sizes(batches: list[Any]) -> list[int]:
    return [len(inputs) for _, inputs in numbered_inputs(batches) if isinstance(inputs, Tensor)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [([4, 4, 1], [4, 5]), ([4, 1, 1], [4, 2]), ([1, 4], [1, 4]), ([4, 1, 3], [4, 1, 3]), ([1], [1]), ([1, 1], [2])],
)
def test_a_last_batch_of_one_joins_the_one_before_it(given: list[int], expected: list[int]) -> None:
    examples = torch.arange(20.0).split([*given, 20 - sum(given)])[:-1]
    assert sizes(list(examples)) == expected
    assert sizes([(batch, "label") for batch in examples]) == expected
    joined = [inputs for _, inputs in numbered_inputs(iter(examples)) if isinstance(inputs, Tensor)]
    assert torch.equal(torch.cat(joined), torch.cat(examples))


def test_values_of_a_dictionary_are_joined() -> None:
    def batch(num: int, **more: object) -> dict[str, object]:
        return {"x": torch.ones(num, 3), "names": ["a"] * num, "scale": torch.tensor(2.0), "mode": "fast", **more}

    _, joined = next(numbered_inputs([batch(2), batch(1)]))
    assert isinstance(joined, dict)
    assert joined["x"].shape == (3, 3)
    assert joined["names"] == ["a"] * 3
    assert (float(joined["scale"]), joined["mode"]) == (2.0, "fast")


@pytest.mark.parametrize(
    "last", [torch.ones(1, 4), {"x": torch.ones(1, 3)}, {"x": torch.ones(1, 3), "mode": "slow"}], ids=str
)
def test_a_remainder_of_other_shapes_is_left_out_with_a_message(last: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = torch.ones(2, 3) if isinstance(last, Tensor) else {"x": torch.ones(2, 3), "mode": "fast"}
    with caplog.at_level(logging.WARNING, "resist"):
        assert len(list(numbered_inputs([before, last]))) == 1
    assert len(caplog.messages) == 1
    assert "the last batch has one example" in caplog.messages[0]


def test_an_iterator_may_write_each_batch_into_the_same_memory() -> None:
    def reused() -> Iterator[Tensor]:
        memory = torch.zeros(2, 4, 5)
        for step in range(3):
            yield memory.copy_(torch.full((2, 4, 5), float(step)) + torch.arange(5.0))

    one, other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    recalibrate(one, reused(), CPU)
    recalibrate(other, [batch.clone() for batch in reused()], CPU)
    assert torch.equal(one.running_mean, other.running_mean)


def test_the_job_of_a_loop_whose_loader_ends_with_one_example() -> None:
    def build() -> nn.Module:
        blocks = [Residual(nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8))) for _ in range(4)]
        return nn.Sequential(nn.Linear(3, 8), nn.Sequential(*blocks), nn.Linear(8, 2))

    job = Job(build, resist(workers=2, local_steps=2), example=False)
    data = torch.utils.data.TensorDataset(torch.randn(9, 3), torch.zeros(9))
    full = job.full_model(torch.utils.data.DataLoader(data, batch_size=4))
    again = job.full_model([data.tensors[0][:4], data.tensors[0][4:]])
    assert full is not None
    assert again is not None
    assert all(map(torch.equal, full.state_dict().values(), again.state_dict().values()))
    with pytest.raises(UserError, match=r"layer 1\.0\.body\.0 \(BatchNorm1d\) gets one value .*input 1 x 8\); give ba"):
        job.full_model([data.tensors[0][:1]])


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Drawing(nn.Module):
    """A network that draws, whose first norm is called twice and whose last one for some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.drop, self.seldom = nn.BatchNorm1d(4), nn.Dropout(0.5), nn.InstanceNorm1d(4, affine=True)
        self.seldom = nn.InstanceNorm1d(4, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.twice(self.twice(x) + 1))
        return self.seldom(x) if x.shape[0] > 2 else x


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("numbered", [False, True])
def test_several_processes_estimate_the_bits_of_one(count: int, numbered: bool) -> None:
    data = [torch.randn(2 + step % 3, 4, 5, generator=torch.Generator().manual_seed(step)) for step in range(7)]
    batches = NumberedBatches(7, lambda steps: iter(data[steps.start : steps.stop])) if numbered else data
    alone, together = Drawing(), Drawing()
    recalibrate(alone, batches, CPU, seed=3)
    results: list[Tensor] = []
    for index in range(count):  # the last one has the results of all
        with contextlib.suppress(UserError) if index < count - 1 else contextlib.nullcontext():  # no batch so far
            recalibrate(together, batches, CPU, seed=3, processes=Shared(index, count, results))
    for (name, one), all_of_them in zip(alone.state_dict().items(), together.state_dict().values(), strict=True):
        assert torch.equal(one, all_of_them), name
    assert int(alone.twice.num_batches_tracked) == 14
    assert int(alone.seldom.num_batches_tracked) == sum(len(batch) > 2 for batch in data)
    with pytest.raises(UserError, match="full_model got no batches"):
        recalibrate(together, [], CPU, processes=Shared(0, 1, []))


def test_the_mean_of_a_norm_that_is_called_twice_counts_both_calls() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            self.norm(x)
            return self.norm(x + 4)

    model = Twice()
    recalibrate(model, [torch.ones(3, 2), torch.full((3, 2), 2.0)], CPU)
    assert model.norm.running_mean is not None
    torch.testing.assert_close(model.norm.running_mean, torch.full((2,), 3.5))
