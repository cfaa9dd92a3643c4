"""Common recipes around the loop: schedulers that set momentum, plateaus, checkpointed activations, wrappers."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from resist import Job, UserError
from resist.planning.strategy import local_sgd, resist, switch
from support import batch, floats, make, sgd, tiny, weights

pytestmark = pytest.mark.slow

RESIZED = switch(resist(3, 2, capacities=(3, 4, 2)), resist(3, 2, capacities=(5, 1, 3)), at_round=1)


def go(
    job: Job, optimizers: Sequence[Optimizer], steps: int, after: Callable[[int, Tensor], None] | None = None
) -> None:
    for step in range(steps):
        for number, (worker, optimizer) in enumerate(zip(job.workers, optimizers, strict=True)):
            images, labels = batch(worker.index, step)
            optimizer.zero_grad()
            loss = F.cross_entropy(worker.model(images), labels)
            loss.backward()
            optimizer.step()
            if after is not None:
                after(number, loss.detach())
        job.step(*optimizers)


def test_one_cycle_sets_rate_and_momentum_of_all_groups() -> None:
    """Also of parameters that come later: they are in the same groups."""
    job, optimizers = make(RESIZED, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01))
    cycles = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=8) for o in optimizers]
    go(job, optimizers, 6, lambda number, loss: cycles[number].step())
    for worker, optimizer, cycle in zip(job.workers, optimizers, cycles, strict=True):
        (group,) = optimizer.param_groups
        assert {id(p) for p in group["params"]} == {id(p) for p in worker.model.parameters()}
        assert [group["lr"]] == cycle.get_last_lr()
        assert group["betas"][0] != 0.9
    assert all(value.isfinite().all() for value in weights(job).values())


def test_a_plateau_lowers_the_rate() -> None:
    job, optimizers = make(RESIZED)
    plateaus = [
        torch.optim.lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=10.0) for o in optimizers
    ]
    go(job, optimizers, 6, lambda number, loss: plateaus[number].step(loss))
    assert [o.param_groups[0]["lr"] for o in optimizers] == [0.05 * 0.5**6] * 3


def checkpointed() -> nn.Module:
    """Blocks that compute their activations again in the backward pass."""
    model = tiny()
    for number, block in enumerate(model.layer3):
        model.layer3[number] = checkpoint_wrapper(block)
    return model


def test_checkpointed_activations_change_nothing() -> None:
    """Of wrapped blocks, and of a function around a call, with running statistics updated twice for each step."""
    plain, first = make(RESIZED)
    go(plain, first, 6)
    expected = {name: value for name, value in weights(plain).items() if "running" not in name}
    job = Job(checkpointed, RESIZED, batchnorm="average")
    optimizers = [sgd(worker.model) for worker in job.workers]
    go(job, optimizers, 6)
    found = {name.replace("_checkpoint_wrapped_module.", ""): v for name, v in floats(full_of(job)).items()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    job, optimizers = make(RESIZED)
    for worker in job.workers:
        section = worker.model.get_submodule("layer3")
        section.forward = lambda x, s=section: through(s, x)  # type: ignore[method-assign]
    go(job, optimizers, 6)
    for name, value in expected.items():
        found_value = floats(job.workers[0].model).get(name)
        if found_value is not None and not name.startswith("layer3"):
            torch.testing.assert_close(found_value, value, rtol=1e-9, atol=1e-9)


def through(section: nn.Module, x: Tensor) -> Tensor:
    for block in section.children():
        x = checkpoint(block, x, use_reentrant=False)
    return x


def full_of(job: Job) -> nn.Module:
    full = job.full_model()
    assert full is not None
    return full


def test_blocks_that_are_wrapped_after_construction_are_named() -> None:
    job, optimizers = make(resist(2, 1))
    section = job.workers[0].model.get_submodule("layer3")
    section.add_module("1", checkpoint_wrapper(section.get_submodule("1")))
    with pytest.raises(UserError, match=r"_checkpoint_wrapped_module.*was moved .* change layers in build_model"):
        job.step(*optimizers)


class Wrapper(Optimizer):
    """As Accelerate's: an optimizer with the groups and the state of another one."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class SlowWeights(Wrapper):
    """A wrapper with state of its own for each parameter."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.own = {}

    @property
    def state(self) -> Any:
        return self.own

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            self.own |= {p: {"slow": p.detach().clone()} for p in group["params"]}


@pytest.mark.parametrize("policy", ["travel", "keep", "reset"])
def test_a_wrapped_optimizer_is_the_one_in_it(policy: str) -> None:
    strategy = switch(
        resist(2, 2, capacities=(3, 4), optimizer_state=policy), local_sgd(2, 2, optimizer_state=policy), at_round=2
    )
    found = []
    for wrap in (Wrapper, lambda optimizer: optimizer):
        job, optimizers = make(strategy, lambda model, w=wrap: w(torch.optim.Adagrad(model.parameters(), lr=0.01)))
        go(job, optimizers, 6)
        found.append(weights(job))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_wrapper_with_state_of_its_own_is_named() -> None:
    job, optimizers = make(resist(2, 5), lambda model: SlowWeights(sgd(model)))
    with pytest.raises(UserError, match="SlowWeights keeps state of its own beside that of SGD, which it wraps"):
        go(job, optimizers, 1)


def test_accelerate_in_one_process() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    found = []
    for prepare in (accelerator.prepare, lambda optimizer: optimizer):
        job, optimizers = make(RESIZED, lambda model, p=prepare: p(torch.optim.AdamW(model.parameters(), lr=0.01)))
        go(job, optimizers, 6)
        found.append(weights(job))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
