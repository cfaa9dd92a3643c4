"""Attributes that blocks change in training go with their block: numbers, containers, generators, caches."""

import collections
import functools
import io
import logging
import pickle
import random
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from odd_blocks import BLOCKS, WIDTH, Block, Net, value
from pool import Pool
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import resist, switch
from resist.subnet.python_state import _Unpickler


class Meter:
    def __init__(self) -> None:
        self.mean = 0.0

    def update(self, number: float) -> float:
        self.mean = 0.9 * self.mean + 0.1 * number
        return self.mean


# What a block has, made from its number, and its gain in a forward pass, which changes it.
KINDS: dict[str, tuple[Callable[[int], Any], Callable[[Any, float], float]]] = {
    "float": (lambda number: 0.0, lambda block, x: 0.9 * block.kept + 0.1 * x),
    "tensor": (lambda number: torch.zeros(WIDTH), lambda block, x: float(block.kept.mul_(0.9).add_(0.1 * x).mean())),
    "array": (lambda number: np.zeros(2), lambda block, x: float(np.add(block.kept, x, out=block.kept)[0])),
    "deque": (lambda number: collections.deque([0.0], 3), lambda block, x: block.kept.append(x) or sum(block.kept)),
    "dict": (lambda number: {"n": 0, "own": None}, lambda block, x: block.count(x)),
    "object": (lambda number: Meter(), lambda block, x: block.kept.update(x)),
    "torch": (lambda number: torch.Generator().manual_seed(number), lambda block, x: block.draw()),
    "numpy": (np.random.default_rng, lambda block, x: block.kept.random()),
    "python": (random.Random, lambda block, x: block.kept.random()),
    "none": (lambda number: None, lambda block, x: value(block.number) if block.kept is None else block.kept + x),
    "cache": (lambda number: {}, lambda block, x: block.kept.setdefault(WIDTH, value(block.number))),
    "cached property": (lambda number: 0, lambda block, x: block.cached),
    "cached method": (lambda number: 0, lambda block, x: block.method()),
    "late buffer": (lambda number: 0, lambda block, x: block.late(x)),
}


class Keeping(Block):
    def __init__(self, kind: str, number: int) -> None:
        super().__init__()
        make, self.gain = KINDS[kind]
        self.kind, self.number, self.kept = kind, number, make(number)

    def assigned(self, x: Tensor) -> float:
        self.kept = self.gain(self, float(x.detach().mean()))
        return self.kept

    def count(self, x: float) -> float:
        self.kept["n"] += x
        self.kept["own"] = self.fc
        assert self.kept["own"] is self.fc
        return self.kept["n"]

    def draw(self) -> float:
        return float(torch.rand(1, generator=self.kept))

    @functools.cached_property
    def cached(self) -> float:
        return value(self.number)

    @functools.lru_cache  # noqa: B019
    def method(self) -> float:
        return value(self.number)

    def late(self, x: float) -> float:
        if "seen" not in self._buffers:
            self.register_buffer("seen", torch.zeros(()))
        return float(self.get_buffer("seen").add_(x))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.assigned(x) if self.kind in ("float", "none") else self.gain(self, float(x.detach().mean()))
        return x + (1.0 + gain) * self.branch(x)


def build(kind: str) -> Net:
    net = Net(functools.partial(Keeping, kind))
    for module in (net.stem, net.norm, net.head):
        module.requires_grad_(False)
    return net


def train(kind: str, growing: bool = False) -> tuple[Tensor, Tensor]:
    """The output of the full network, and that of the network whose blocks were trained where they were held."""
    torch.manual_seed(0)
    oracle = build(kind)
    strategy = resist(2, 2, min_depth=0)
    if growing:
        strategy = switch(strategy, resist(2, 2, capacities=(2, 4)), at_round=2)
    job = Job(lambda: build(kind), strategy, chains="blocks", scale=1.0, example=False)
    optimizers = [torch.optim.SGD(worker.model.parameters(), lr=0.05) for worker in job.workers]
    optimizer = torch.optim.SGD(oracle.parameters(), lr=0.05)
    for step in range(6):
        # The oracle needs those of the other process too.
        for index in range(2):
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * step + index))
            runs: list[tuple[Any, torch.optim.Optimizer, Any]] = [(oracle, optimizer, job.plan.held(index)[0])]
            runs += [(w.model, o, None) for w, o in zip(job.workers, optimizers, strict=True) if w.index == index]
            outputs: list[Tensor] = []
            for net, own, held in runs:
                own.zero_grad()
                outputs.append(net(x) if held is None else net(x, list(held)))
                outputs[-1].square().mean().backward()
                own.step()
            for output in outputs[1:]:
                torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5)
        job.step(*optimizers)
    full, x = job.full_model(), torch.ones(2, WIDTH)
    with torch.no_grad():
        expected = oracle.eval()(x)
        return (expected if full is None else full(x)), expected


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("dict", "tensor", "late buffer") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in KINDS
    ],
)
def test_what_a_block_changes_goes_with_it(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        torch.testing.assert_close(*train(kind), rtol=1e-5, atol=1e-5)
        if kind in ("float", "dict", "late buffer"):
            torch.testing.assert_close(*train(kind, growing=True), rtol=1e-5, atol=1e-5)
    assert "does not go with its block" not in caplog.text


@pytest.mark.slow
def test_between_processes(pool: Pool) -> None:
    for kind in ("dict", "late buffer"):
        for found, expected in pool.run(2, train, kind):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("size", "reason"), [(1 << 19, "bytes, more than"), (0, "cannot be copied to another")])
def test_what_cannot_go_is_said_once(size: int, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    class Large(Block):
        def forward(self, x: Tensor) -> Tensor:
            self.map = torch.zeros(size) if size else (lambda: size)
            return super().forward(x)

    job = Job(lambda: Net(lambda number: Large()), resist(2, 1, min_depth=0), chains="blocks", scale=1.0, example=False)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for worker in job.workers:
                worker.model(torch.ones(2, WIDTH))
            job.synchronize()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith(f"map of the blocks of blocks:0-{BLOCKS - 1} changes in training and does not")
    assert reason in caplog.messages[0]


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.check_output, (["true"],)


@pytest.mark.parametrize("kept", [Harmful(), [len], subprocess.Popen], ids=lambda kept: type(kept).__name__)
def test_no_code_is_read_from_another_process(kept: object, caplog: pytest.LogCaptureFixture) -> None:
    """What another process could have been made to send is refused where it is read; our own is not sent."""
    block = Block()
    with pytest.raises(pickle.UnpicklingError, match="is not read from another process"):
        _Unpickler(io.BytesIO(pickle.dumps(kept)), block).load()
    job = Job(lambda: Net(lambda number: Block()), resist(2, 1, min_depth=0), chains="blocks", example=False)
    with caplog.at_level(logging.WARNING):
        for worker in job.workers:
            worker.model.blocks[0].kept = kept
        job.synchronize()
    assert "cannot be copied to another process (UnpicklingError)" in caplog.text


def test_gradient_hooks_of_parameters_are_refused_by_name() -> None:
    def hooked(number: int) -> nn.Module:
        block = Block()
        block.fc.weight.register_hook(lambda gradient: value(number) * gradient)
        return block

    with pytest.raises(UserError, match=r"parameter 'blocks\.0\.fc\.weight' has a gradient hook, which copies"):
        Job(lambda: Net(hooked), resist(2, 1, min_depth=0), chains="blocks")
