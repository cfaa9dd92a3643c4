"""Loose buffers: what a block has that is in no flat tensor goes with the block, over any number of processes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pool import Pool, by_day_with_one
from resist import Job
from resist.planning.strategy import Strategy, local_sgd, resist, switch
from resist.sync.local import Local

BLOCKS = 5


class Block(nn.Module):
    """Counts its calls, keeps a table of integers of its own, the largest value that it saw, and a list that grows."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.fc, self.number = nn.Linear(4, 4), 0
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.full((3,), number))
        self.register_buffer("largest", torch.tensor(float("-inf")))
        self.register_buffer("seen", torch.zeros(0))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x.tanh())
        if self.training:
            self.calls += 1  # type: ignore[misc]
            self.largest = torch.maximum(self.largest, y.detach().abs().max())  # type: ignore[has-type]
            self.seen = torch.cat([self.seen, y.detach().mean()[None]])  # type: ignore[has-type]
        return x + y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(number) for number in range(BLOCKS))
        self.register_buffer("mine", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


STRATEGIES: dict[str, Strategy] = {
    "alone": resist(3, 2, capacities=(2, 2, 1)),
    "keep": resist(3, 2, capacities=(2, 2, 1), optimizer_state="keep"),
    "reset": resist(3, 2, capacities=(2, 2, 1), optimizer_state="reset"),
    "shared": resist(3, 2, capacities=(4, 2, 3)),
    "grow": switch(resist(3, 2, capacities=(2, 2, 1)), resist(3, 2, capacities=(4, 3, 2)), at_round=2),
    "shrink": switch(local_sgd(3, 2), resist(3, 2, capacities=(1, 4, 2)), at_round=1),
}


def run(name: str, alone: bool = False) -> dict[str, Any]:
    """Buffers of each worker by global name after five rounds, those of the full network, and state messages."""
    strategy = STRATEGIES[name]
    job = Job(Net, strategy, scale=1.0, chains="blocks", transport=Local(3) if alone else None)
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.1) for worker in job.workers]
    messages = []
    for step in range(10):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            for _ in range(worker.index + 1):  # the holders of a block count differently
                generator = torch.Generator().manual_seed(10 * step + worker.index)
                worker.model(torch.randn(2, 4, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            worker.model.get_buffer("mine").fill_(worker.index)
        if job.step(*optimizers):
            messages.append(job.transport.take()["messages"].get("state", 0))  # type: ignore[attr-defined]
    found = {}
    for worker in job.workers:
        (held,) = job.plan.held(worker.index)
        for block, module in zip(held, worker.model.get_submodule("blocks").children(), strict=True):
            found[worker.index, block] = {name: b.clone() for name, b in module.named_buffers()}
        assert worker.model.get_buffer("mine") == worker.index
    full = job.full_model()
    return {"found": found, "full": None if full is None else full.state_dict(), "messages": messages}


@pytest.mark.parametrize("name", STRATEGIES)
def test_buffers_go_with_their_block(name: str) -> None:
    result = run(name, alone=True)
    full = result["full"]
    seen: dict[int, dict[str, Tensor]] = {}
    for (_, block), buffers in result["found"].items():
        assert buffers["table"].tolist() == [block] * 3
        assert len(buffers["seen"]) == buffers["calls"] >= 10
        assert buffers["largest"].isfinite()
        for key, value in buffers.items():  # all holders agree, and the full network has what they have
            assert torch.equal(seen.setdefault(block, buffers)[key], value), (block, key)
            assert torch.equal(full[f"blocks.{block}.{key}"], value), (block, key)
    assert full["mine"] == 0
    if name == "alone":  # each block was held by one worker in each round
        holders = [STRATEGIES[name].plan([Chain()], seed=0, round=round).plans[0] for round in range(5)]
        for block in range(BLOCKS):
            assert seen[block]["calls"] == sum(2 * (plan.holders(block)[0] + 1) for plan in holders)


class Chain:
    name, num_blocks = f"blocks:0-{BLOCKS - 1}", BLOCKS


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), by_day_with_one(STRATEGIES, (2, 3)))
def test_the_number_of_processes_does_not_matter(pool: Pool, name: str, processes: int) -> None:
    alone, results = run(name, alone=True), pool.run(processes, run, name)
    found = {key: buffers for result in results for key, buffers in result["found"].items()}
    assert found.keys() == alone["found"].keys()
    for key, buffers in alone["found"].items():
        for buffer_name, value in buffers.items():
            torch.testing.assert_close(found[key][buffer_name], value, rtol=1e-5, atol=1e-6)
    assert all(result["messages"] == alone["messages"] for result in results)
    (full,) = [result["full"] for result in results if result["full"] is not None]
    for key, value in alone["full"].items():
        torch.testing.assert_close(full[key], value, rtol=1e-5, atol=1e-6)


def test_buffers_that_do_not_differ_are_not_sent() -> None:
    """Constant tables, equal in all blocks, and the counters of BatchNorm."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.BatchNorm1d(4), nn.Linear(4, 4)
            self.register_buffer("index", torch.arange(100))
            self.register_buffer("mask", torch.full((3, 3), float("-inf")).triu(1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.fc(self.norm(x))

    job = Job(
        lambda: nn.Sequential(*(Constant() for _ in range(4))), resist(2, 1, capacities=(3, 2)), batchnorm="average"
    )
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.1) for worker in job.workers]
    for _ in range(4):
        for worker in job.workers:
            worker.model(torch.randn(3, 4)).sum().backward()
        job.step(*optimizers)
    assert "state" not in job.transport.take()["bytes"]  # type: ignore[operator]
