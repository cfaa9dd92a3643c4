"""Bytes: what is predicted is what a job counts."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest
import torch
from cost_cases import SIZES, SMALL, TINY
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resist.cost import predict
from resist.cost.states import BuildOptimizer, StateMeter
from resist.cost.traffic import round_traffic
from resist.job import Job
from resist.planning.methods import build_strategy
from resist.planning.schedule import schedule
from resist.planning.strategy import OuterSGD, Strategy, ddp, local_sgd, resist
from resist.planning.wire import Wire
from resist.sync.optimizer_state import OPTIMIZER_STATES
from support import BLOCKS, local_step, make, tiny

pytestmark = pytest.mark.slow

OPTIMIZERS: dict[str, BuildOptimizer] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "asgd": torch.optim.ASGD,
}


def follow(job: Job, optimizers: Sequence[Optimizer], build_optimizer: BuildOptimizer, rounds: int) -> None:
    """Train some rounds; compare the bytes of each with `round_traffic`, by traffic kind and by link."""
    strategy, workers = job.strategy, job.strategy.workers
    capacities = [job.plan.capacities(worker) for worker in range(workers)]
    state = StateMeter(build_optimizer).sizes(TINY, job.chains, capacities)
    averages = bool(job.workers[0].average)
    job.transport.take()
    for number in range(rounds):
        expected = round_traffic(
            SIZES, job.plan_of(number), job.plan_of(number + 1),
            strategy=strategy, state=state, average=averages,
        )  # fmt: skip
        while True:
            local_step(job, optimizers)
            if job.step(*optimizers):
                break
        booked, by_way = +job.transport.bytes, Counter[tuple[str, int]]()
        for (source, target), num_bytes in job.transport.pairs.items():
            by_way["out", source] += num_bytes
            by_way["in", target] += num_bytes
        assert booked == +Counter(expected.bytes)
        assert by_way == Counter(expected.average) + Counter(expected.hand_over)
        means = sum(booked.values()) - sum(job.transport.pairs.values())
        assert means == workers * expected.ring_bytes
        job.transport.take()


@st.composite
def shares(draw: st.DrawFn) -> list[int]:
    """Capacities that hold the chain of `tiny`, any number of workers, often unequal, often with blocks shared."""
    capacities = draw(st.lists(st.integers(1, BLOCKS), min_size=1, max_size=4))
    missing = BLOCKS - sum(capacities)
    while missing > 0:
        lowest = capacities.index(min(capacities))
        added = min(missing, BLOCKS - capacities[lowest])
        capacities[lowest] += added
        missing -= added
    return capacities


@given(
    shares(),
    st.sampled_from(OPTIMIZER_STATES),
    st.booleans(),
    st.sampled_from([None, OuterSGD()]),
    st.sampled_from([1, 2]),
)
@settings(max_examples=settings().max_examples // 6)
def test_bytes_are_those_of_the_ledger(
    capacities: list[int], policy: str, adam: bool, outer: OuterSGD | None, redraw_every: int
) -> None:
    workers = len(capacities)
    strategy = resist(workers, 1, capacities=capacities, optimizer_state=policy, outer=outer, redraw_every=redraw_every)
    build_optimizer = OPTIMIZERS["adamw" if adam else "sgd"]
    job, optimizers = make(strategy, lambda model: build_optimizer(model.parameters()))
    follow(job, optimizers, build_optimizer, rounds=1 + redraw_every)


@pytest.mark.parametrize("policy", OPTIMIZER_STATES)
def test_bytes_of_local_sgd_are_those_of_the_ledger(policy: str) -> None:
    job, optimizers = make(local_sgd(3, 2, optimizer_state=policy))
    follow(job, optimizers, OPTIMIZERS["sgd"], rounds=2)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "sgd"])
@pytest.mark.parametrize("strategy", [resist, local_sgd])
@pytest.mark.parametrize("policy", ["travel", "average"])
def test_state_of_any_form_is_counted(name: str, strategy: Callable[..., Strategy], policy: str) -> None:
    """Moments, step counts, factors of another shape, and an average of the weights besides."""
    build_optimizer = OPTIMIZERS[name]
    job, optimizers = make(strategy(3, 1, optimizer_state=policy), lambda model: build_optimizer(model.parameters()))
    if name == "adamw":
        job.follow(*(AveragedModel(worker.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for worker in job.workers))
    follow(job, optimizers, build_optimizer, rounds=2)


@pytest.mark.parametrize(
    ("name", "policy", "outer", "redraw_every"),
    [
        *(("resist", policy, None, 1) for policy in OPTIMIZER_STATES),
        *(("resist", policy, OuterSGD(), 3) for policy in OPTIMIZER_STATES),
        ("local_sgd", "average", None, 1),
        ("local_sgd", "travel", OuterSGD(), 1),
        ("diloco", "travel", None, 1),
    ],
)
def test_a_report_is_the_mean_of_what_the_ledger_books(
    name: str, policy: str, outer: OuterSGD | None, redraw_every: int
) -> None:
    strategy = build_strategy(name, 3, 1, optimizer_state=policy, outer=outer, redraw_every=redraw_every)
    report = predict(tiny, [strategy], **SMALL)
    job, optimizers = make(strategy)
    job.transport.take()
    for _ in range(report.rounds):
        local_step(job, optimizers)
        job.step(*optimizers)
    traffic = report.rows[0].traffic
    predicted = {name: report.rounds * num_bytes for name, num_bytes in traffic.bytes.items() if num_bytes}
    assert predicted == +job.transport.bytes


def test_ddp_sends_all_gradients_in_every_step() -> None:
    report = predict(tiny, [ddp(4, 5)], **SMALL)
    traffic, model = report.rows[0].traffic, tiny()
    gradients = sum(p.numel() * 8 for p in model.parameters())
    buffers = sum(b.numel() * 8 for b in model.buffers() if b.is_floating_point())
    assert traffic.bytes == {"gradients": 5 * 2 * 3 * gradients, "buffers": 5 * 3 * buffers}
    assert traffic.paper_bytes == 5 * 2 * 4 * gradients


def test_replicas_are_predicted_as_they_are_sent_and_held() -> None:
    """As the transport counts them. A worker also holds the weights that began the round, once."""
    strategies = [resist(3, 1, min_depth=0), local_sgd(3, 1)]
    ours, everything = predict(tiny, strategies, replicate=True, **SMALL).rows
    (outer,) = predict(tiny, [resist(3, 1, min_depth=0, outer=OuterSGD())], replicate=True, **SMALL).rows
    job, optimizers = make(resist(3, 1, min_depth=0), replicate=True)
    sent, kept = 0, [0, 0, 0]
    for number in range(4):
        made = schedule(job.plan_of(number), job.plan_of(number + 1), SIZES.block_bytes(Wire()), replicate=True)
        blocks = Counter(made.keepers.values())
        kept = [max(most, blocks[worker] * SIZES.blocks[0].num_bytes) for worker, most in enumerate(kept)]
        local_step(job, optimizers)
        job.step(*optimizers)
        sent += job.transport.bytes["replica"]
        job.transport.take()
    assert 4 * ours.traffic.bytes["replica"] == pytest.approx(sent)
    start = job.workers[0].anchor
    assert start is not None
    assert ours.networks[0].memory.weights == pytest.approx(sum(t.nbytes for t in start.values()), rel=0.01)
    assert [network.memory.replicas - network.memory.weights for network in ours.networks] == kept
    assert [network.memory.replicas for network in outer.networks] == kept
    assert everything.traffic.bytes["replica"] == 0
    assert everything.networks[0].memory.replicas == everything.networks[0].memory.weights
