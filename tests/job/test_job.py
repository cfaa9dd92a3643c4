"""Job: plain SGD for one worker, local SGD where everyone holds all, and nothing lost in between."""

import copy
import inspect
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from resist.blocks.chains import choose_chains
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import Strategy, local_sgd, resist, switch
from resist.subnet.seeded import build_seeded
from resist.sync.local import Local
from support import (
    BLOCKS,
    adamw,
    batch,
    floats,
    full_of,
    local_step,
    make,
    preact,
    sgd,
    slight,
    tiny,
    train,
    train_step,
    weights,
)

OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "plain": lambda model: torch.optim.SGD(model.parameters(), lr=0.05),
    "momentum": lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "decay": sgd,
    "nesterov": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3
    ),
    "adamw": adamw,
}


@pytest.mark.parametrize(
    ("optimizer", "policy"),
    [
        ("decay", "travel"),
        *(pytest.param(name, "travel", marks=pytest.mark.slow) for name in OPTIMIZERS if name != "decay"),
        *(
            pytest.param(name, policy, marks=pytest.mark.slow)
            for name in ("momentum", "adamw")
            for policy in ("keep", "average")
        ),
    ],
)
def test_one_worker_is_plain_sgd(optimizer: str, policy: str) -> None:
    """Bit for bit, over several rounds, in single precision as in use."""

    def single() -> nn.Module:
        return tiny().float()

    plain = build_seeded(single, 3).train()
    theirs = OPTIMIZERS[optimizer](plain)
    job = Job(single, resist(1, 3, optimizer_state=policy), seed=3, batchnorm="average")
    ours = OPTIMIZERS[optimizer](job.model)
    for step in range(8):
        images, labels = batch(0, step)
        for model, one in ((plain, theirs), (job.model, ours)):
            one.zero_grad()
            F.cross_entropy(model(images.float()), labels).backward()
            one.step()
        job.step(ours)
    found = weights(job)
    assert all(torch.equal(value, found[name]) for name, value in floats(plain).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [local_sgd(3, 2, optimizer_state="keep"), resist(3, 2, min_depth=BLOCKS, optimizer_state="keep")],
    ids=["local_sgd", "resist"],
)
def test_everyone_holding_all_is_local_sgd(strategy: Strategy) -> None:
    """A hand-written local SGD, to 1e-12; and all workers have the same bits after a synchronization."""
    nets = [build_seeded(tiny, 0) for _ in range(3)]
    theirs = [sgd(net) for net in nets]
    job, ours = make(strategy)
    for step in range(8):
        for worker, (net, one) in enumerate(zip(nets, theirs, strict=True)):
            train_step(worker, net, one, step)
        if step % 2 == 1:
            states = [floats(net) for net in nets]
            mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
            for net in nets:
                net.load_state_dict(mean, strict=False)
    train(job, ours, 8)
    for worker in job.workers:
        found = floats(worker.model)
        for name, value in floats(nets[0]).items():
            torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
        assert torch.equal(worker.subnet.flat, job.workers[0].subnet.flat)


def test_the_shared_part_is_the_same_everywhere_after_a_synchronization() -> None:
    job, optimizers = make(resist(4, 3))
    train(job, optimizers, 6)
    assert all(torch.equal(worker.subnet.shared, job.workers[0].subnet.shared) for worker in job.workers)


def test_the_last_short_round_is_averaged() -> None:
    """7 steps in rounds of 3, then in rounds that end where an epoch does: the seventh step counts."""
    job, optimizers = make(resist(2, 3))
    train(job, optimizers, 7)
    assert (job.step_index, job.round, job.steps_left) == (7, 2, 2)
    one, optimizers_ = make(resist(2, 3))
    train(one, optimizers_, 6)
    without = weights(one)
    for worker in one.workers:  # one more step, averaged by hand: the shared part is the mean
        train_step(worker.index, worker.model, optimizers_[worker.index], 6)
    shared = torch.stack([worker.subnet.shared for worker in one.workers]).mean(0)
    found = weights(job)
    assert (job.round, job.steps_left) == (3, 3)
    torch.testing.assert_close(job.workers[0].subnet.shared, shared, rtol=1e-12, atol=1e-12)
    assert all(not torch.equal(found[name], without[name]) for name in found)
    job.finish()
    assert job.round == 3  # nothing is open, so nothing is done
    assert all(torch.equal(value, found[name]) for name, value in weights(job).items())


def test_rounds_take_their_strategys_steps() -> None:
    job, optimizers = make(switch(local_sgd(2, 1), resist(2, 3), at_round=2))
    ends = []
    for step in range(9):
        local_step(job, optimizers)
        ends += [step] if job.step(*optimizers) else []
    assert ends == [0, 1, 4, 7]


def test_global_random_state_is_untouched() -> None:
    def state() -> list[object]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]  # type: ignore[index]

    torch.manual_seed(5)
    before = state()
    job, optimizers = make(resist(3, 1, capacities=(4, 3, 2)))
    train(job, optimizers, 3)
    job.full_model()
    assert state() == before


def test_seeds() -> None:
    start = [weights(make(resist(2), seed=seed)[0]) for seed in (0, 0, 1)]
    assert all(torch.equal(start[0][name], value) for name, value in start[1].items())
    assert not torch.equal(start[0]["head.weight"], start[2]["head.weight"])
    assert make(resist(2), seed=0)[0].plan != make(resist(2), seed=1)[0].plan


@pytest.mark.parametrize(
    ("scale", "strategy", "expected"),
    [
        ("inclusion", resist(2, min_depth=0), 3 / 6),
        ("inclusion", resist(3, capacities=(5, 2, 2)), 3 / 6),
        ("1/S", resist(3, capacities=(5, 2, 2)), 1 / 3),
        ("1/S", local_sgd(3), 1),
        ("inclusion", local_sgd(3), 1),
        (0.7, resist(3), 0.7),
        ("1/S", resist(1), 1),
    ],
)
def test_scale(scale: str | float, strategy: Strategy, expected: float) -> None:
    """The full model's logits are those of a network whose branches are multiplied by hand."""
    job, _ = make(strategy, scale=scale)
    full, plain = full_of(job), preact(build_seeded(tiny, 0).eval())
    assert not full.training
    images, _ = batch(0, 0)
    x = plain.layer3[0](plain.layer2(plain.layer1(plain.stem(images))))
    for block in plain.layer3[1:]:
        x = x + expected * (block(x) - x)
    torch.testing.assert_close(full(images), plain.head(plain.layer4(x).mean(dim=(2, 3))), rtol=1e-12, atol=1e-12)


def test_the_scale_is_that_of_the_round_that_trained_the_weights() -> None:
    job, optimizers = make(switch(local_sgd(2, 1), resist(2, 1, capacities=(3, 3)), at_round=1))
    hooks = []
    for _ in range(3):
        full = full_of(job)
        hooks.append(len(full.layer3[1]._forward_hooks))
        train(job, optimizers, 1)
    assert hooks == [0, 0, 1]


def test_batchnorm_policies() -> None:
    batches = [batch(9, step) for step in range(3)]
    averaged, _ = make(resist(2, 1), batchnorm="average")
    again, _ = make(resist(2, 1), batchnorm="recalibrate")
    none, optimizers = make(resist(2, 1), batchnorm="batch")
    train(none, optimizers, 2)
    nets = [preact(averaged.full_model()), preact(again.full_model(batches)), preact(none.full_model())]
    assert torch.equal(nets[0].get_buffer("layer2.0.norm1.running_var"), torch.ones(4, dtype=torch.float64))
    means = torch.stack([nets[1].stem(images).mean((0, 2, 3)) for images, _ in batches]).mean(0)
    torch.testing.assert_close(nets[1].get_buffer("layer1.0.norm1.running_mean"), means.detach())
    assert not dict(nets[2].named_buffers())
    assert not nets[1].training
    with pytest.raises(UserError, match=r"call full_model\(batches\), or give Job batchnorm='average'"):
        again.full_model()


def test_a_network_without_batchnorm_needs_no_batches() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.linear(x)

    job = Job(lambda: nn.Sequential(*(Block() for _ in range(3))), resist(3, min_depth=0))
    full = job.full_model()
    assert full is not None
    assert full(torch.randn(2, 4)).shape == (2, 4)


def test_the_full_model_is_a_copy() -> None:
    job, optimizers = make(resist(2, 2))
    full = job.full_model()
    assert full is not None
    before = floats(full)
    train(job, optimizers, 4)
    assert all(torch.equal(value, before[name]) for name, value in floats(full).items())
    assert copy.deepcopy(full).state_dict().keys() == build_seeded(tiny, 0).state_dict().keys()


def test_a_loop_with_one_worker() -> None:
    job = Job(tiny, resist(workers=1, local_steps=5), batchnorm="average")
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.03, momentum=0.9)
    images, labels = batch(0, 0)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(job.model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        job.step(optimizer)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert job.round == 4


@pytest.mark.slow
def test_the_recipe_of_the_docstring_runs() -> None:
    recipe = re.search(r"```python\n(.*?)```", inspect.getdoc(Job) or "", re.DOTALL)
    assert recipe is not None
    names: dict[str, Any] = {}
    exec(recipe[1], names)
    assert names["job"].round == 2
    assert isinstance(names["full"], nn.Module)


@pytest.mark.slow
def test_rounds_do_not_recompile() -> None:
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    job, optimizers = make(resist(2, 2, capacities=(3, 4)), network=slight)
    compiled = [torch.compile(worker.model, backend="aot_eager") for worker in job.workers]
    graphs = []
    for step in range(10):
        for worker, (model, optimizer) in enumerate(zip(compiled, optimizers, strict=True)):
            train_step(worker, model, optimizer, step)
        graphs.append(counters["stats"]["unique_graphs"])
        job.step(*optimizers)
    plain, plain_optimizers = make(resist(2, 2, capacities=(3, 4)), network=slight)
    train(plain, plain_optimizers, 10)
    assert job.round == 5
    assert len({job.plan_of(round) for round in range(5)}) == 5
    assert graphs[0] > 0
    assert len(set(graphs)) == 1, graphs
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(job)[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make_job", "message"),
    [
        (lambda: make(resist(2), scale="2/S"), r"`scale='2/S'` is not inclusion, 1/S, or a number above 0"),
        (lambda: make(resist(2), scale=float("nan")), r"`scale=nan` is not inclusion, 1/S, or a number above 0"),
        (lambda: make(resist(2), scale=-1), r"`scale=-1` is not inclusion"),
        (
            lambda: make(resist(2), on_nonfinite="drop")[0].synchronize({2: "a loss of nan"}),
            r"nonfinite has worker 2, and this process hosts \[0, 1\]; name only those",
        ),
        (lambda: make(resist(2), batchnorm="sync"), r"`batchnorm='sync'` is not one of recalibrate, average, batch"),
        (
            lambda: make(resist(2, optimizer_state="lose")),
            r"`optimizer_state='lose'` is not one of reset, keep, travel",
        ),
        (
            lambda: make(switch(resist(2), resist(2, optimizer_state="lose"), at_round=1)),
            r"`optimizer_state='lose'` is not one of",
        ),
        (lambda: make(resist(2, min_depth=7)), r"`min_depth=7` exceeds the 6 blocks of chain layer3:1-6"),
        (
            lambda: make(switch(local_sgd(2), resist(2, min_depth=7), at_round=4)),
            r"`min_depth=7` exceeds the 6 blocks of chain layer3",
        ),
        (lambda: make(resist(2), chains=("layer9",)), r"'layer9' has no run"),
        (lambda: make(resist(2), transport=Local(3)), r"a transport for 3 workers, a strategy for 2; match them"),
        (lambda: make(resist(2))[0].step(), r"0 optimizers for 2 hosted workers; pass one for each"),
        (lambda: make(resist(2))[0].model, r"this process hosts 2 workers; loop over job.workers, or start"),
        (lambda: make(resist(2))[0].full_model(on=2), r"on=2 is outside 0 to 1, the workers"),
    ],
)
def test_refusals(make_job: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make_job()
    assert "\n" not in str(raised.value)


def test_several_chains_are_partitioned_each_on_its_own() -> None:
    def two() -> nn.Module:
        return build_seeded(lambda: _two_chains(), 0)

    job = Job(two, resist(2, 1, min_depth=0), chains=("layer3", "layer2"), batchnorm="average")
    assert [worker.subnet.capacities for worker in job.workers] == [(2, 2), (2, 2)]
    assert len(choose_chains(two(), ("layer3", "layer2"))) == 2
    start = weights(job)
    optimizers = [sgd(worker.model) for worker in job.workers]
    train(job, optimizers, 3)
    assert all(not torch.equal(value, start[name]) for name, value in weights(job).items())


def _two_chains() -> nn.Module:
    from resist.models import PreActResNet

    return PreActResNet((1, 4, 5, 1), 5, width=4).double()
