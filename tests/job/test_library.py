"""`Job` in the loop of a user, with the usual techniques, compared with the same loop by hand."""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from plain_loop import Plain
from resist.job import Job
from resist.planning.schedule import schedule
from resist.planning.strategy import Strategy, resist, switch
from resist.subnet.seeded import build_seeded
from support import batch, floats, make, sgd, slight, tiny, train_step, weights

pytestmark = pytest.mark.slow

Step = Callable[[int, int, nn.Module, Optimizer], None]


class Lion(Optimizer):
    """Lion (Chen et al., 2023), as users write it for themselves."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    p.sub_(torch.sign(average.lerp(p.grad, 0.1)), alpha=group["lr"])
                    average.lerp_(p.grad, 0.01)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": sgd,
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=0.01),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.01),
    "lion": lambda model: Lion(model.parameters(), lr=0.01),
}
UNEQUAL = resist(3, 2, capacities=(4, 3, 2))
RESIZED = switch(resist(3, 2, capacities=(3, 4, 2)), resist(3, 2, capacities=(5, 1, 3)), at_round=1)


def ordinary(worker: int, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    train_step(worker, model, optimizer, step)


def by_hand(
    strategy: Strategy,
    rounds: int,
    optimizer: Callable[[nn.Module], Optimizer],
    step: Step,
    build: Callable[[], nn.Module] = tiny,
    decay: float | None = None,
) -> Plain:
    """The expected result of a job with this strategy: weights, and averages of them over time."""
    job = Job(build, strategy, batchnorm="average")
    plain = Plain(build_seeded(build, 0), optimizer, step, decay)
    for round in range(rounds):
        (plan,), steps = job.plan_of(round).plans, strategy.at(round).local_steps
        sizes = job.workers[0].subnet.block_bytes
        owners = schedule(job.plan_of(round), job.plan_of(round + 1), sizes).owners
        plain.round(plan.blocks, range(round * steps, (round + 1) * steps), {key[1]: w for key, w in owners.items()})
    return plain


def go(job: Job, optimizers: Sequence[Optimizer], steps: int, step: Step) -> None:
    for _ in range(steps):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            step(worker.index, job.step_index, worker.model, optimizer)
        job.step(*optimizers)


def check(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("optimizer", "strategy"),
    [(name, RESIZED) for name in OPTIMIZERS] + [("sgd", UNEQUAL), ("adamw", UNEQUAL)],
    ids=[*OPTIMIZERS, "sgd, unequal", "adamw, unequal"],
)
def test_optimizers_whose_state_travels(optimizer: str, strategy: Strategy) -> None:
    """Three rounds, blocks shared by some; with capacities that change, parameters come and go."""
    job, optimizers = make(strategy, OPTIMIZERS[optimizer])
    go(job, optimizers, 6, ordinary)
    check(weights(job), by_hand(strategy, 3, OPTIMIZERS[optimizer], ordinary).weights)


def accumulated(worker: int, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    """Two batches to a step. Gradients are set to zero after it, as others do."""
    for part in range(2):
        images, labels = batch(worker, 100 * part + step)
        (F.cross_entropy(model(images), labels) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def clipped(worker: int, step: int, model: nn.Module, optimizer: Optimizer) -> None:
    images, labels = batch(worker, step)
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 0.1
    optimizer.step()


@pytest.mark.parametrize("step", [accumulated, clipped])
def test_steps_of_another_kind(step: Step) -> None:
    job, optimizers = make(RESIZED)
    go(job, optimizers, 6, step)
    check(weights(job), by_hand(RESIZED, 3, sgd, step).weights)


def test_learning_rate_schedulers() -> None:
    """They change the groups of an optimizer, and those stay, even where parameters come and go."""

    def scheduled(worker: int, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * 0.5**step
        train_step(worker, model, optimizer, step)

    job, optimizers = make(RESIZED)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in optimizers]
    for _ in range(6):
        go(job, optimizers, 1, ordinary)
        for scheduler in schedulers:
            scheduler.step()
    check(weights(job), by_hand(RESIZED, 3, sgd, scheduled).weights)


def test_parameter_groups() -> None:
    """No decay for norms and biases, another rate for the head; after a change of capacities too."""

    def grouped(model: nn.Module) -> Optimizer:
        named = dict(model.named_parameters())
        plain = [p for name, p in named.items() if p.dim() == 1]
        head = [named["head.weight"]]
        rest = [p for name, p in named.items() if p.dim() > 1 and name != "head.weight"]
        groups = [{"params": rest}, {"params": plain, "weight_decay": 0.0}, {"params": head, "lr": 0.2}]
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.5)

    job, optimizers = make(RESIZED, grouped)
    go(job, optimizers, 6, ordinary)
    check(weights(job), by_hand(RESIZED, 3, grouped, ordinary).weights)


def frozen() -> nn.Module:
    """The stem, and the norms of every block of the chain."""
    model = tiny()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("stem") and not (name.startswith("layer3") and "norm" in name))
    return model


def test_frozen_parameters() -> None:
    """They keep their bits, for the optimizer passes over them, and the rest trains as by hand."""
    job = Job(frozen, RESIZED, batchnorm="average")
    optimizers = [OPTIMIZERS["adamw"](worker.model) for worker in job.workers]
    go(job, optimizers, 6, ordinary)
    found, start = weights(job), build_seeded(frozen, 0)
    check(found, by_hand(RESIZED, 3, OPTIMIZERS["adamw"], ordinary, frozen).weights)
    for name, parameter in start.named_parameters():
        assert torch.equal(found[name], parameter) != parameter.requires_grad, name
    full = job.full_model()
    assert full is not None
    assert [p.requires_grad for p in full.parameters()] == [p.requires_grad for p in start.parameters()]


def test_some_blocks_frozen() -> None:
    """A chain ends where its blocks are frozen: the others are dealt out, and the frozen ones are shared."""

    def half() -> nn.Module:
        model = tiny()
        for block in range(1, 3):
            model.layer3[block].requires_grad_(False)
        return model

    job = Job(half, resist(2, 1, min_depth=0), batchnorm="average")
    assert [chain.name for chain in job.chains] == ["layer3:3-6"]
    optimizers = [sgd(worker.model) for worker in job.workers]
    go(job, optimizers, 3, ordinary)
    found = weights(job)
    for name, value in build_seeded(half, 0).named_parameters():
        assert torch.equal(found[name], value) != value.requires_grad, name


def test_unfreezing_later() -> None:
    """Gradual unfreezing: the parameters join the optimizer when they are trained."""
    job = Job(frozen, UNEQUAL, batchnorm="average")
    optimizers = [sgd(worker.model) for worker in job.workers]
    go(job, optimizers, 2, ordinary)
    for worker in job.workers:
        worker.model.requires_grad_(True)
    before = weights(job)
    go(job, optimizers, 2, ordinary)
    assert all(not torch.equal(value, before[name]) for name, value in weights(job).items())


def test_autocast() -> None:
    """bfloat16 within the step, the weights in single precision: the same bits as by hand, with S = 2 and no block
    held twice, so that no mean depends on an order."""

    def low(worker: int, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        images, labels = batch(worker, step)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images.float())
            loss = F.cross_entropy(logits, labels)
        assert logits.dtype == torch.bfloat16
        loss.backward()
        optimizer.step()

    def single() -> nn.Module:
        return tiny().float()

    strategy = resist(2, 2, min_depth=0)
    job = Job(single, strategy, batchnorm="average")
    optimizers = [sgd(worker.model) for worker in job.workers]
    go(job, optimizers, 6, low)
    found = weights(job)
    for name, value in by_hand(strategy, 3, sgd, low, single).weights.items():
        assert value.dtype == torch.float32
        assert torch.equal(found[name], value), name


class Scaled:
    """A step with a GradScaler for each worker; gradients of (worker, step) in `broken` overflow."""

    def __init__(self, broken: set[tuple[int, int]]) -> None:
        self.broken, self.scalers = broken, {}
        self.skipped: list[tuple[int, int]] = []

    def __call__(self, worker: int, step: int, model: nn.Module, optimizer: Optimizer) -> None:
        scaler = self.scalers.setdefault(worker, torch.amp.GradScaler("cpu", init_scale=8.0))
        images, labels = batch(worker, step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        scaler.scale(loss * (float("inf") if (worker, step) in self.broken else 1)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        self.skipped += [(worker, step)] if scaler.get_scale() < before else []


BROKEN = {
    "first of a round": {(1, 2)},
    "last of a round": {(1, 1), (0, 3)},
    "a whole round": {(1, 0), (1, 1)},
    "everyone's first round": {(worker, step) for worker in range(3) for step in range(2)},
}


@pytest.mark.parametrize(
    ("optimizer", "when", "policy"),
    [("adamw", when, "travel") for when in BROKEN]
    + [("adamw", when, p) for when in list(BROKEN)[2:] for p in ("reset", "keep", "average")]
    + [pytest.param("sgd", when, "travel", marks=pytest.mark.nightly) for when in BROKEN],
)
def test_a_skipped_step_skips_no_synchronization(optimizer: str, when: str, policy: str) -> None:
    """Rounds end at the same calls as without, and the weights are those of the loop by hand."""
    strategy = resist(3, 2, capacities=(4, 3, 2), optimizer_state=policy)
    job, optimizers = make(strategy, OPTIMIZERS[optimizer])
    broken = BROKEN[when]
    ours, theirs = Scaled(broken), Scaled(broken)
    ends = []
    for step in range(6):
        for worker, one in zip(job.workers, optimizers, strict=True):
            ours(worker.index, step, worker.model, one)
        ends += [step] if job.step(*optimizers) else []
    assert ends == [1, 3, 5]
    assert ours.skipped == sorted(broken, key=lambda key: (key[1], key[0]))
    assert (job.round, job.step_index) == (3, 6)
    if policy == "travel":
        check(weights(job), by_hand(strategy, 3, OPTIMIZERS[optimizer], theirs).weights)
    assert all(bool(value.isfinite().all()) for value in weights(job).values())


def test_compiled_autocast_and_clipping_make_no_new_graph() -> None:
    """From round to round nothing is compiled again; a change of capacities compiles once for each new depth."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    strategy = switch(resist(2, 1, capacities=(3, 4)), resist(2, 1, capacities=(5, 2)), at_round=4)
    job, optimizers = make(strategy, network=slight)
    compiled = [torch.compile(worker.model, backend="eager") for worker in job.workers]
    graphs = []
    for step in range(8):
        for worker, (model, optimizer) in enumerate(zip(compiled, optimizers, strict=True)):
            with torch.autocast("cpu", torch.bfloat16):
                clipped(worker, step, model, optimizer)
        job.step(*optimizers)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[:4] == [graphs[0]] * 4, graphs
    assert graphs[4:] == [graphs[4]] * 4, graphs
    assert graphs[4] == 2 * graphs[0], graphs
    plain, plain_optimizers = make(strategy, network=slight)
    for step in range(8):
        for worker, optimizer in zip(plain.workers, plain_optimizers, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                clipped(worker.index, step, worker.model, optimizer)
        plain.step(*plain_optimizers)
    check(weights(job), weights(plain))
    assert floats(job.workers[0].model).keys() == floats(plain.workers[0].model).keys()
