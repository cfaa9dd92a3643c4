"""The state of every optimizer goes with its block: the oracle of benchmarks/optimizers.py, and optimizers of users."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optimizers import STEPS, TIMM_NAMES, TORCH, WORKERS, Case, Net, difference, one, timm_optimizer, train_step
from pool import Pool
from resist import Capacities, Job, UserError
from resist.planning.strategy import Strategy, local_sgd, resist, switch
from resist.sync.local import Local

pytestmark = pytest.mark.slow

CLASSES = {name for name, value in vars(torch.optim).items() if isinstance(value, type)} - {"Optimizer"}


class ByHand(Optimizer):
    """An optimizer with one rule, applied to each parameter with a gradient."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group["lr"])

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        raise NotImplementedError


class RowWise(ByHand):
    """A second moment for each row, as in Adam-mini; numbers of Python; a list of tensors."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        if not state:
            rows = p.new_zeros(p.shape[:1])
            state |= {"step": 0, "scale": 1.0, "rows": rows, "past": [rows.clone(), None], "warm": True}
        state["step"] += 1
        state["scale"] = 0.9 * state["scale"] + 0.1 * float(grad.norm())
        dims = tuple(range(1, p.dim()))
        state["past"] = [state["rows"].clone(), state["past"][0]]
        state["rows"].lerp_(grad.square().mean(dims) if dims else grad.square(), 0.1)
        rate = (state["rows"] + state["past"][0]).sqrt().add(1e-3).reshape(-1, *[1] * len(dims))
        p.sub_(grad / rate.reshape(rate.shape if p.dim() else ()), alpha=lr / state["scale"] / state["step"] ** 0.5)


class Codes(ByHand):
    """Momentum in 8 bits with a scale, of the weight's shape but in integers."""

    def update(self, p: Tensor, grad: Tensor, state: dict[str, Any], lr: float) -> None:
        before = state["codes"].float() * state["absmax"] if state else torch.zeros_like(p)
        momentum = 0.9 * before + grad
        state["absmax"] = momentum.abs().max().clamp(min=1e-8) / 127
        state["codes"] = (momentum / state["absmax"]).round().to(torch.int8)
        p.sub_(momentum, alpha=lr)


USERS = [Case("row-wise", one(RowWise, lr=0.01)), Case("8-bit", one(Codes, lr=0.05))]


@pytest.mark.parametrize("case", [*TORCH, *USERS], ids=lambda case: case.name)
def test_all_state_goes_with_the_block(case: Case) -> None:
    apart, trained = difference(case)
    assert apart <= 1e-6
    assert trained > 1e-3


def test_every_optimizer_of_torch_is_tested() -> None:
    tested = {name for case in TORCH for name in case.name.replace(",", " ").replace("(", " ").split()}
    assert tested >= CLASSES


@pytest.mark.parametrize("name", TIMM_NAMES[:6])
def test_optimizers_of_timm(name: str) -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    assert difference(Case(name, timm_optimizer(name)))[0] <= 1e-6


RESIZED = switch(
    resist(3, 2, capacities=(3, 4, 2), optimizer_state="average", redraw_every=2),
    resist(3, 2, capacities=(5, 1, 3), redraw_every=2),
    at_round=2,
)
SHARED = {
    "average": resist(3, 2, capacities=(4, 3, 2), optimizer_state="average"),
    "keep": resist(3, 2, capacities=(4, 3, 2), optimizer_state="keep"),
    "local": local_sgd(3, 2, optimizer_state="average"),
    "resized": RESIZED,
}
SOME = {"Adafactor": one(torch.optim.Adafactor, lr=0.01), "row-wise": one(RowWise, lr=0.01)}


def run(optimizer: str, strategy: str, alone: bool = False) -> dict[str, Any]:
    """Weights, states and traffic after five rounds; worker 1 leaves out all steps of the first two."""
    job = Job(lambda: Net(False).double(), SHARED[strategy], scale=1.0, seed=1, transport=Local(3) if alone else None)
    optimizers = [SOME[optimizer](worker.model) for worker in job.workers]
    traffic = []
    for step in range(10):
        for worker, own in zip(job.workers, optimizers, strict=True):
            if worker.index != 1 or step >= 4:
                torch.set_default_dtype(torch.float64)
                train_step(worker.index, step, worker.model, own)
                torch.set_default_dtype(torch.float32)
        if job.step(*(o for own in optimizers for o in own)):
            taken = job.transport.take()
            traffic.append((taken["bytes"].get("state"), taken["messages"].get("state")))  # type: ignore[attr-defined]
    states = {}
    for worker, (own,) in zip(job.workers, optimizers, strict=True):
        for parameter, place in worker.subnet.parameter_places():
            name = worker.subnet.layout.full_name(place, job.plan.held(worker.index))
            states[worker.index, name] = dict(own.state.get(parameter, {}))
    return {"states": states, "traffic": traffic, "flats": {w.index: w.subnet.flat.clone() for w in job.workers}}


@pytest.mark.parametrize(
    ("strategy", "optimizer", "processes"),
    [  # by day each strategy with one optimizer, and each optimizer with each number of processes
        pytest.param(strategy, optimizer, processes, marks=() if place == 2 * number + turn else pytest.mark.nightly)
        for place, strategy in enumerate(SHARED)
        for number, optimizer in enumerate(SOME)
        for turn, processes in enumerate((2, 3))
    ],
)
def test_the_number_of_processes_does_not_matter(pool: Pool, optimizer: str, strategy: str, processes: int) -> None:
    """1, 2 and 3 processes: equal weights, states of every kind and traffic."""
    alone, results = run(optimizer, strategy, alone=True), pool.run(processes, run, optimizer, strategy)
    assert all(result["traffic"] == alone["traffic"] for result in results)
    flats = {worker: flat for result in results for worker, flat in result["flats"].items()}
    states = {key: state for result in results for key, state in result["states"].items()}
    for worker, flat in alone["flats"].items():
        torch.testing.assert_close(flats[worker], flat, rtol=1e-10, atol=1e-10)
    assert states.keys() == alone["states"].keys()
    for key, state in alone["states"].items():
        assert {k: type(v) for k, v in states[key].items()} == {k: type(v) for k, v in state.items()}, key
        for name, value in state.items():
            torch.testing.assert_close(states[key][name], value, rtol=1e-9, atol=1e-9)


def block_states(job: Job, optimizers: list[Any]) -> list[dict[int, Any]]:
    """Worker -> block -> state of its matrix."""
    found = []
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        (held,) = job.plan.held(worker.index)
        children = worker.model.get_submodule("blocks").children()
        found.append(
            {b: optimizer.state.get(c.get_submodule("fc").weight) for b, c in zip(held, children, strict=True)}
        )
    return found


def make(strategy: Strategy, optimizer: Any, **options: Any) -> tuple[Job, list[Optimizer]]:
    job = Job(lambda: Net(False), strategy, scale=1.0, **options)
    return job, [optimizer(worker.model.parameters()) for worker in job.workers]


def go(job: Job, optimizers: list[Optimizer], steps: int) -> None:
    for _ in range(steps):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            train_step(worker.index, job.step_index, worker.model, [optimizer])
        job.step(*optimizers)


@pytest.mark.parametrize("policy", ["keep", "reset"])
def test_steps_after_an_exchange_are_no_larger_than_the_rate(policy: str) -> None:
    """Adam's bias correction starts over where its moments do: with `keep`, steps were 3 to 5 times the rate.

    Over the first five steps of blocks that have just arrived, when Adam has made 100 steps and more.
    """
    rate, length, largest = 1e-3, 10, 0.0
    job, optimizers = make(
        resist(4, length, min_depth=0, optimizer_state=policy),
        lambda parameters: torch.optim.Adam(parameters, lr=rate),
    )
    for step in range(18 * length):
        measured: list[tuple[nn.Parameter, Tensor]] = []
        for worker in job.workers if step >= 100 and step % length < 5 else ():
            before, (held,) = job.plan_of(job.round - 1).held(worker.index)[0], job.plan.held(worker.index)
            for block, module in zip(held, worker.model.get_submodule("blocks").children(), strict=True):
                measured += [(p, p.detach().clone()) for p in module.parameters() if block not in before]
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            train_step(worker.index, step, worker.model, [optimizer])
        largest = max([largest, *(float((p.detach() - value).abs().max()) / rate for p, value in measured)])
        job.step(*optimizers)
    assert 0.5 < largest <= 1.1


def test_a_dropped_round_leaves_no_step_count() -> None:
    job, optimizers = make(
        resist(2, 2, min_depth=0), lambda parameters: torch.optim.Adam(parameters, lr=1e-3), on_nonfinite="drop"
    )
    go(job, optimizers, 3)
    train_step(0, 3, job.workers[0].model, optimizers[:1])
    train_step(1, 3, job.workers[1].model, optimizers[1:])
    own = set(job.plan.held(1)[0])
    job.step(*optimizers, nonfinite={1: "a loss of nan"})
    assert not any(optimizers[1].state[p] for p in job.workers[1].subnet.model.get_submodule("head").parameters())
    for states in block_states(job, optimizers):
        for block, state in states.items():
            assert (state is None) == (block in own), block


def test_state_arrives_where_there_is_none_and_goes_where_there_is_none() -> None:
    """Worker 1 has made no step: what it held starts over elsewhere, and what it gets brings its state along."""
    job, optimizers = make(resist(2, 2, min_depth=0), lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    own = set(job.plan.held(0)[0])
    for step in range(2):
        train_step(0, step, job.workers[0].model, optimizers[:1])
        job.step(*optimizers)
    assert own != set(job.plan.held(0)[0])
    for states in block_states(job, optimizers):
        for block, state in states.items():
            assert (state is not None) == (block in own)
            assert state is None or (float(state["step"]) == 2 and state["exp_avg"].abs().max() > 0)
    go(job, optimizers, 1)
    for states in block_states(job, optimizers):
        assert {block: float(state["step"]) for block, state in states.items()} == {
            block: 3.0 if block in own else 1.0 for block in states
        }


def test_a_mean_is_over_those_that_have_a_state() -> None:
    """Not over zeros of those that have none."""
    job, optimizers = make(
        local_sgd(2, 1, optimizer_state="average"), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)
    )
    train_step(0, 0, job.workers[0].model, optimizers[:1])
    before = optimizers[0].state[job.workers[0].model.get_parameter("head.weight")]["momentum_buffer"].clone()
    job.step(*optimizers)
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        found = optimizer.state[worker.model.get_parameter("head.weight")]["momentum_buffer"]
        torch.testing.assert_close(found, before)


@pytest.mark.parametrize("policy", ["reset", "keep"])
def test_an_optimizer_that_is_made_with_its_state(policy: str) -> None:
    """Adagrad has no state to begin with but that of its constructor."""
    first, second = (resist(2, 2, capacities=c, optimizer_state=policy) for c in ((3, 4), (5, 2)))
    strategy = switch(first, second, at_round=2)
    job, optimizers = make(
        strategy, lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, initial_accumulator_value=0.25)
    )
    go(job, optimizers, 4)
    for states in block_states(job, optimizers):
        assert any(float(state["step"]) == 0 and bool((state["sum"] == 0.25).all()) for state in states.values())
    go(job, optimizers, 4)


class Remembers(Optimizer):
    """Keeps an object for each parameter."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in (p for group in self.param_groups for p in group["params"]):
            state = self.state[p]
            state.setdefault("object", object())
            state["count"] = state.get("count", 0) + 1


def test_state_that_cannot_move_begins_anew_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    job, optimizers = make(resist(2, 1, min_depth=0), Remembers)
    held = [set(job.plan.held(worker)[0]) for worker in range(2)]
    with caplog.at_level(logging.WARNING, logger="resist"):
        go(job, optimizers, 3)
    assert [r.getMessage() for r in caplog.records if "cannot move" in r.getMessage()] == [
        "the state 'object' of Remembers (object) cannot move with its block: the optimizer starts over on blocks that "
        "arrive"
    ]
    go(job, optimizers, 1)
    rounds = [[set(job.plan_of(round).held(worker)[0]) for round in range(5)] for worker in range(2)]
    for worker, states in enumerate(block_states(job, optimizers)):
        for block, state in states.items():
            stays = next(n for n in range(5) if n == 4 or block not in rounds[worker][3 - n])
            assert (state["count"] if state else 0) == stays, (worker, block)
    assert held != [rounds[worker][4] for worker in range(2)]


class Outside(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.moments = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:
        """Do nothing."""


class OneHistory(Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        parameters = self.param_groups[0]["params"]
        self.state[parameters[0]]["past"] = [torch.zeros(sum(p.numel() for p in parameters))]


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (torch.optim.LBFGS, r"LBFGS keeps one history over all parameters, .*`optimizer_state='reset'`$"),
        (OneHistory, r"OneHistory keeps one history over all parameters, .*`optimizer_state='reset'`$"),
        (Outside, r"Outside keeps tensors in its attribute 'moments', where they cannot go with the blocks; keep them"),
    ],
)
def test_optimizers_that_are_refused_at_the_first_step(optimizer: Any, message: str) -> None:
    job, optimizers = make(resist(2, 5), optimizer)
    with pytest.raises(UserError, match=message) as raised:
        go(job, optimizers, 1)
    assert "\n" not in str(raised.value)


def test_l_bfgs_with_reset_and_other_capacities() -> None:
    """Its list of parameters is that of its group; with one worker its history stays, as without the package."""
    first, second = (resist(2, 2, capacities=c, optimizer_state="reset") for c in ((3, 4), (5, 2)))
    job, optimizers = make(switch(first, second, at_round=1), lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2))
    go(job, optimizers, 6)
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        assert isinstance(optimizer, torch.optim.LBFGS)
        assert {id(p) for p in optimizer._params} == {id(p) for p in worker.model.parameters()}
        assert optimizer._numel() == sum(p.numel() for p in worker.model.parameters())
    job, optimizers = make(resist(1, 2), lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=2))
    go(job, optimizers, 4)


def by_slot(model: nn.Module) -> list[Optimizer]:
    """The first block has an optimizer of its own; the others have groups of their own."""
    first, *blocks = model.get_submodule("blocks").children()
    rest = [*model.get_submodule("stem").parameters(), *model.get_submodule("head").parameters()]
    rest += model.get_submodule("norm").parameters()
    groups = [{"params": list(block.parameters()), "lr": 0.01 * n} for n, block in enumerate(blocks, start=1)]
    return [torch.optim.SGD(first.parameters(), lr=0.1), torch.optim.SGD([{"params": rest}, *groups], lr=0.1)]


def test_a_new_slot_joins_the_group_of_the_last_one_only() -> None:
    """Whatever optimizers and groups its counterparts are in; loading expects the same."""
    strategy = resist(2, 2, capacities=Capacities(by_round={0: 3, 1: 4, 2: 5}))
    job, again = (Job(lambda: Net(False), strategy, scale=1.0, example=False) for _ in range(2))
    owned = [[by_slot(worker.model) for worker in one.workers] for one in (job, again)]
    for step in range(4):
        for worker, own in zip(job.workers, owned[0], strict=True):
            train_step(worker.index, step, worker.model, own)
        job.step(*(optimizer for own in owned[0] for optimizer in own))
    again.attach(*(optimizer for own in owned[1] for optimizer in own))
    again.load_state_dict(job.state_dict())
    for worker, own in zip((*job.workers, *again.workers), (*owned[0], *owned[1]), strict=True):
        groups = [group["params"] for optimizer in own for group in optimizer.param_groups]
        trained = [id(parameter) for group in groups for parameter in group]
        assert sorted(trained) == sorted(map(id, worker.model.parameters()))
        assert [len(group) for group in groups] == [5, 6, 5, 3 * 5]


def test_parameters_outside_of_the_network_are_named(caplog: pytest.LogCaptureFixture) -> None:
    job, _ = make(resist(2, 1, min_depth=0), torch.optim.SGD)
    outside = nn.Parameter(torch.zeros(()))
    optimizers = [torch.optim.SGD([*worker.model.parameters(), outside], lr=0.1) for worker in job.workers[:1]]
    optimizers += [torch.optim.SGD(job.workers[1].model.parameters(), lr=0.1)]
    with caplog.at_level(logging.WARNING, logger="resist"):
        job.attach(*optimizers)
    assert [r.getMessage() for r in caplog.records if "outside" in r.getMessage()] == [
        "optimizer 0 trains 1 parameter outside of the network: each worker trains its own, and it is neither averaged "
        "nor saved; move it into the module that build_model returns"
    ]


def test_equal_counts_send_nothing_and_a_factor_is_sent_once() -> None:
    """Adam sends its two moments as before; Adafactor a row and a column for each matrix, not a copy of the weights."""
    sent = {}
    for name, optimizer in (("adam", torch.optim.Adam), ("factor", torch.optim.Adafactor)):
        job, optimizers = make(resist(WORKERS, STEPS, min_depth=0), lambda p, o=optimizer: o(p, lr=0.01))
        go(job, optimizers, STEPS)
        taken = job.transport.take()
        sent[name] = taken["bytes"].get("state", 0), taken["bytes"]["blocks"], taken["messages"]  # type: ignore[index,union-attr]
    adam, blocks, messages = sent["adam"]
    assert (adam, messages["state"]) == (2 * blocks, 2 * messages["blocks"])
    factor, blocks, messages = sent["factor"]
    assert 0 < factor < 1.2 * blocks
    assert messages["state"] == messages["blocks"]


def test_no_block_is_frozen_out() -> None:
    """Parameters without a gradient have no state, in any slot."""

    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__(False)
            for block in self.blocks:
                assert isinstance(block, nn.Module)
                block.get_submodule("norm").requires_grad_(False)

    job = Job(Frozen, resist(2, 1, min_depth=0), scale=1.0)
    optimizers = [torch.optim.Adam(worker.model.parameters()) for worker in job.workers]
    go(job, list(optimizers), 4)
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        assert all((p in optimizer.state) == p.requires_grad for p in worker.model.parameters())
