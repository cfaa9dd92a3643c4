"""Saving and loading a job in one's own loop: what comes back goes on as if nothing had happened."""

import copy
import io
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from pool import Pool
from resist.errors import UserError
from resist.planning.strategy import Strategy, ddp, diloco, resist, switch
from saving import IN_FILES, OPTIMIZERS, STEPS, Loop, equal, network, warmed_up

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "optimizer", [pytest.param(name, marks=pytest.mark.nightly if name in IN_FILES else ()) for name in OPTIMIZERS]
)
@pytest.mark.parametrize("averaged", [pytest.param(False, marks=pytest.mark.nightly), True], ids=["", "averaged"])
def test_a_loaded_job_goes_on_bit_for_bit(optimizer: str, averaged: bool) -> None:
    """Two steps, saved, two steps, saved, four steps: as eight."""
    make = OPTIMIZERS[optimizer]
    undisturbed = Loop(warmed_up(), make, averaged).train(8)
    loop = Loop(warmed_up(), make, averaged).train(2)
    for steps in (2, 4):
        state, schedules = loop.job.state_dict(), [one.state_dict() for one in loop.schedules]
        before = loop.everything()
        torch.manual_seed(100 + steps)
        loop = Loop(warmed_up(), make, averaged).attached()
        loop.job.load_state_dict(copy.deepcopy(state))
        for one, saved in zip(loop.schedules, schedules, strict=True):
            one.load_state_dict(saved)
        assert equal(before, loop.everything())
        loop.train(steps)
    assert equal(undisturbed.everything(), loop.everything())


@pytest.mark.parametrize("policy", ["reset", "keep", "average"])
def test_with_each_policy(policy: str) -> None:
    first, loop = (
        Loop(warmed_up(policy=policy), scheduled=False).train(4),
        Loop(warmed_up(policy=policy), scheduled=False),
    )
    loop.attached().job.load_state_dict(first.job.state_dict())
    assert equal(first.train(4).everything(), loop.train(4).everything())


@pytest.mark.parametrize("strategy", [diloco(3, STEPS), switch(resist(3, STEPS), diloco(3, STEPS), at_round=2)])
@pytest.mark.parametrize("at", [2, 6])
def test_the_outer_momentum_comes_back(strategy: Strategy, at: int) -> None:
    first, loop = Loop(strategy, scheduled=False).train(at), Loop(strategy, scheduled=False)
    loop.attached().job.load_state_dict(first.job.state_dict())
    assert equal(first.train(4).everything(), loop.train(4).everything())


def lbfgs(model: nn.Module) -> list[Optimizer]:
    return [torch.optim.LBFGS(model.parameters(), lr=0.05, max_iter=2)]


def test_lbfgs_begins_anew_in_each_round() -> None:
    strategy = resist(3, STEPS, min_depth=3, optimizer_state="reset")
    first, loop = Loop(strategy, lbfgs, scheduled=False).train(4), Loop(strategy, lbfgs, scheduled=False)
    loop.attached().job.load_state_dict(first.job.state_dict())
    assert equal(first.train(4).everything(), loop.train(4).everything())


def test_the_form_is_that_of_torch_and_torch_saves_it() -> None:
    loop = Loop(warmed_up(), averaged=True).train(4)
    assert isinstance(loop.job, Stateful)
    file = io.BytesIO()
    torch.save(loop.job.state_dict(), file)
    file.seek(0)
    again = Loop(warmed_up(), averaged=True).attached()
    again.job.load_state_dict(torch.load(file, weights_only=True))
    assert equal(loop.everything(), again.everything()[:-3] + loop.everything()[-3:])
    state = loop.job.state_dict()
    assert state["weights"].keys() == state["average of weights"].keys()
    assert "blocks.3.gain" in state["weights"]


def test_an_earlier_state_brings_a_job_back() -> None:
    """In the same process, also to other capacities."""
    loop = Loop(warmed_up(), OPTIMIZERS["two"], scheduled=False)
    begin, expected = loop.job.state_dict(), None
    for _ in range(2):
        loop.train(8)
        expected = expected or loop.everything()
        assert equal(expected, loop.everything())
        loop.job.load_state_dict(begin)
        for one in loop.optimizers:
            assert not one.state


def test_traffic_after_loading_is_as_before() -> None:
    """`norm.weight` is not the tail of `blocks.3.norm.weight`: no state is invented."""
    loop = Loop(warmed_up()).train(4)
    loop.job.transport.take()
    again = Loop(warmed_up()).attached()
    again.job.load_state_dict(loop.job.state_dict())
    again.job.transport.take()
    assert loop.train(2).job.transport.take()["bytes"] == again.train(2).job.transport.take()["bytes"]
    for one in again.optimizers:
        assert all(set(state) == {"momentum_buffer"} for state in one.state.values())
    assert all(set(worker.state) == {"momentum_buffer"} for worker in again.job.workers)


def test_in_the_middle_of_a_round_it_is_refused() -> None:
    loop = Loop(warmed_up()).train(3)
    with pytest.raises(UserError, match=r"1 of 2 steps of round 2 are done, and a job is saved between two rounds"):
        loop.job.state_dict()
    loop.job.finish()
    loop.job.state_dict()


@pytest.mark.parametrize(
    ("optimizer", "workers"),
    [  # by day each of both once
        pytest.param(optimizer, workers, marks=() if place == number else pytest.mark.nightly)
        for place, optimizer in enumerate(("adamw", "two", "adagrad"))
        for number, workers in enumerate((1, 2, 5))
    ],
)
def test_another_number_of_workers_takes_over_the_network(workers: int, optimizer: str) -> None:
    loop = Loop(warmed_up(), OPTIMIZERS[optimizer], averaged=True).train(6)
    state = loop.job.state_dict()
    again = Loop(resist(workers, STEPS, min_depth=3), OPTIMIZERS[optimizer], averaged=True).attached()
    again.job.load_state_dict(state)
    assert (again.job.round, again.job.step_index) == (3, 6 * 3 // workers)
    for averaged in (False, True):
        one, two = loop.job.full_model(averaged=averaged), again.job.full_model(averaged=averaged)
        assert one is not None
        assert two is not None
        mine, theirs = one.state_dict(), two.state_dict()
        for name, value in mine.items():
            if value.is_floating_point():
                assert torch.equal(value, theirs[name]), name
    assert all(optimizer == "adagrad" or not one.state for one in again.optimizers)
    assert [group["lr"] for group in again.optimizers[0].param_groups] == [
        group["lr"] for group in loop.optimizers[0].param_groups
    ]
    assert [int(average.n_averaged) for average in again.averages] == [6] * workers
    again.train(2)


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    loop = Loop(warmed_up(), averaged=True).train(4)
    state = loop.job.state_dict()

    def refused(message: str, wrong: dict, made: Loop | None = None) -> None:
        into = made or Loop(warmed_up(), averaged=True).attached()
        before = copy.deepcopy(into.everything())
        with pytest.raises(UserError, match=message) as caught:
            into.job.load_state_dict(wrong)
        assert "\n" not in str(caught.value)
        assert equal(before, into.everything())

    weights = state["weights"]
    more = {**weights, "blocks.3.other": torch.zeros(1)}
    refused(
        r"the state has a tensor 'blocks.3.other' \(weights\) that this network has not", {**state, "weights": more}
    )
    less = {name: value for name, value in weights.items() if name != "blocks.3.gain"}
    refused(r"the state has no tensor 'blocks.3.gain' of the shape \(\)", {**state, "weights": less})
    refused("has no tensor 'head.bias'", {**state, "weights": {**weights, "head.bias": torch.zeros(3)}})
    refused("has averages of the weights; give theirs to job.follow", state, Loop(warmed_up()).attached())
    refused("has no averages", Loop(warmed_up()).train(2).job.state_dict())
    refused("'weights'|'about'|none of a job", {})
    refused("none of a job", {"a": 1})
    refused("an entry 'more' that is none", {**state, "more": 1})
    refused("nothing of worker 1", {**state, "workers": {"0": state["workers"]["0"]}})
    refused("damaged", {**state, "workers": {name: value[:99] for name, value in state["workers"].items()}})
    refused(
        "has 1 optimizers of worker 0, this job 0; give them to job.attach", state, Loop(warmed_up(), averaged=True)
    )
    two = Loop(warmed_up(), OPTIMIZERS["two"], averaged=True).attached()
    refused("has 1 optimizers of worker 0, this job 2", state, two)
    adam = Loop(warmed_up(), OPTIMIZERS["adam"], averaged=True).attached()
    refused("optimizer 0 of worker 0 is SGD in the state, and Adam here", state, adam)

    def but_the_head(model: nn.Module) -> list[Optimizer]:
        return [torch.optim.SGD([p for n, p in model.named_parameters() if "head" not in n], lr=0.05, momentum=0.9)]

    partial = Loop(warmed_up(), but_the_head, averaged=True).attached()
    refused("group 0, is another one in the state: it trains 'head.bias' only there", state, partial)


def test_what_an_optimizer_keeps_and_cannot_be_saved_is_refused_by_name() -> None:
    loop = Loop(warmed_up()).train(2)
    parameter = next(iter(loop.optimizers[1].state))
    loop.optimizers[1].state[parameter]["hook"] = lambda: None
    with pytest.raises(UserError, match=r"0 of worker 1: state of 'conv.weight'\['hook'\] is a builtins.function"):
        loop.job.state_dict()


def save_and_load(folder: Path, workers: int) -> bool:
    """With the library of torch itself: saved, loaded into a new job, and trained on."""
    loop = Loop(warmed_up(workers), OPTIMIZERS["two"], averaged=True, scheduled=False).train(4)
    again = Loop(warmed_up(workers), OPTIMIZERS["two"], averaged=True, scheduled=False).attached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save({"job": loop.job}, checkpoint_id=folder)
        dcp.load({"job": again.job}, checkpoint_id=folder)
    good = equal(loop.everything(), again.everything())
    return good and equal(loop.train(4).everything(), again.train(4).everything())


def test_the_library_of_torch_saves_and_loads_it(tmp_path: Path) -> None:
    assert save_and_load(tmp_path, 3)


def test_the_library_of_torch_in_two_processes(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(2, save_and_load, tmp_path, 3) == [True, True]


def save_and_load_ddp() -> bool:
    """Its models are wrapped, and have names of their own."""
    loop = Loop(ddp(2, STEPS), scheduled=False).train(4)
    again = Loop(ddp(2, STEPS), scheduled=False).attached()
    again.job.load_state_dict(loop.job.state_dict())
    good = equal(loop.everything(), again.everything())
    return good and again.train(2).job.step_index == 6


def test_a_job_of_ddp_comes_back(pool: Pool) -> None:
    assert pool.run(2, save_and_load_ddp) == [True, True]


def load_elsewhere(folder: Path, workers: int) -> dict[str, torch.Tensor] | None:
    loop = Loop(resist(workers, STEPS, min_depth=3), averaged=True).attached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load({"job": loop.job}, checkpoint_id=folder, planner=planner)
    full = loop.job.full_model()
    return None if full is None else {name: t.clone() for name, t in full.state_dict().items()}


@pytest.mark.parametrize("workers", [2, 5])
def test_it_loads_with_other_workers_in_other_processes(pool: Pool, tmp_path: Path, workers: int) -> None:
    loop = Loop(warmed_up(), averaged=True).train(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"job": loop.job}, checkpoint_id=tmp_path)
    full = loop.job.full_model()
    assert full is not None
    found = pool.run(2, load_elsewhere, tmp_path, workers)[0]
    for name, value in full.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, found[name]), name


class Grown(nn.Module):
    """A block with a cache that grows, a causal mask, a buffer that is assigned, and one that comes later."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.cache, self.mask = nn.Buffer(torch.zeros(0, 8)), nn.Buffer(torch.full((8,), float("-inf")))
        self.mean, self.late = nn.Buffer(torch.zeros(8)), nn.Buffer(None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.cache = torch.cat([self.cache, x.detach().mean(0, keepdim=True)])[-6:]
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.late = torch.ones(3) if self.late is None else self.late + 1
        return x + self.fc((x + self.mean + self.cache.sum(0)).relu())


def growing() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Sequential(*[Grown() for _ in range(6)]), nn.Linear(8, 5))


def test_buffers_of_any_kind_come_back() -> None:
    first = Loop(warmed_up(), build=growing, scheduled=False).train(4)
    loop = Loop(warmed_up(), build=growing, scheduled=False)
    loop.attached().job.load_state_dict(first.job.state_dict())
    assert equal(first.everything(), loop.everything())
    assert equal(first.train(4).everything(), loop.train(4).everything())


def frozen() -> nn.Module:
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "head" in name)
    return model


def test_what_is_frozen_stays_unsent_after_loading() -> None:
    first = Loop(warmed_up(), build=frozen, scheduled=False).train(4)
    loop = Loop(warmed_up(), build=frozen, scheduled=False)
    loop.attached().job.load_state_dict(first.job.state_dict())
    for one in (first, loop):
        one.job.transport.take()
        one.train(2)
    assert first.job.transport.take()["bytes"] == loop.job.transport.take()["bytes"]
    assert equal(first.everything(), loop.everything())


class Half(nn.Module):
    """One half of a block of two: with and without a norm, which has names and buffers of its own."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=None) if norm else nn.Identity()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc(self.norm(x).relu())


def alternating() -> nn.Module:
    halves = [Half(norm) for _ in range(6) for norm in (True, False)]
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Sequential(*halves), nn.Linear(8, 5))


def test_blocks_of_two_children_one_without_buffers_come_back(tmp_path: Path) -> None:
    first = Loop(warmed_up(), build=alternating, averaged=True, scheduled=False).train(4)
    assert first.job.chains[0].num_blocks == 6
    loop = Loop(warmed_up(), build=alternating, averaged=True, scheduled=False).attached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"job": first.job}, checkpoint_id=tmp_path)
        dcp.load({"job": loop.job}, checkpoint_id=tmp_path)
    assert equal(first.everything(), loop.everything())
    assert equal(first.train(4).everything(), loop.train(4).everything())
