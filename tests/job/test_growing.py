"""Capacities by round and by chain in training: growth 2 -> 4 -> all blocks, and more workers than blocks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from oracle import train_resist
from pool import Pool
from resist import Capacities
from resist.errors import AgreedError, UserError
from resist.job import Job
from resist.models import PreActResNet
from resist.planning.strategy import OuterSGD, Strategy, resist
from resist.runs.checkpoint import Checkpoints, complete
from resist.runs.restore import restore
from resist.subnet.scaling import scales_of
from resist.sync.local import Local
from support import BLOCKS, adamw, batch, full_of, local_step, make, sgd, states, tiny, train, weights

pytestmark = pytest.mark.slow

STEPS = 2  # in a round
SIZES = (2, 2, 4, 4, 6, 6)  # blocks of each worker, by round
GROWING = Capacities(by_round={0: 2, 2: 4, 4: BLOCKS})


def growing(workers: int = 3, policy: str = "travel", outer: OuterSGD | None = None) -> Strategy:
    return resist(workers, STEPS, capacities=GROWING, optimizer_state=policy, outer=outer)


def still(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)


@pytest.mark.parametrize("capacities", [GROWING, (4,) * 8, Capacities(by_worker=(1, 2, 3), by_round={3: (6, 1, 5)})])
def test_growth_is_what_the_algorithm_says(capacities: Capacities | tuple[int, ...]) -> None:
    """Against the oracle; also eight workers for six blocks, and unequal ones that grow and shrink."""
    workers = len(capacities) if isinstance(capacities, tuple) else 3
    strategy = resist(workers, STEPS, capacities=capacities, optimizer_state="reset")
    job, optimizers = make(strategy, seed=4)
    start = weights(job)
    plans = [job.plan_of(round).plans[0].blocks for round in range(len(SIZES))]
    train(job, optimizers, STEPS * len(SIZES))
    full = tiny()
    full.load_state_dict(start, strict=False)
    expected = train_resist(full, plans, batch, local_steps=STEPS, lr=0.05, momentum=0.9, weight_decay=1e-3)
    found = weights(job)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=name)


def test_rounds_steps_and_scales_follow() -> None:
    job, optimizers = make(growing())
    ended: list[bool] = []
    for round, size in enumerate(SIZES):
        assert [worker.subnet.capacities for worker in job.workers] == [(size,)] * 3
        assert job.plan.plans[0].capacities == (size,) * 3
        for step in range(STEPS):
            assert job.steps_left == STEPS - step
            local_step(job, optimizers)
            ended.append(job.step(*optimizers))
        assert job.round == round + 1
        # The weights are those of the round that has ended, and so is the scale.
        assert job.scales == [size / BLOCKS]
        assert set(scales_of(full_of(job)).values()) == ({size / BLOCKS} if size < BLOCKS else set())
    assert ended == [False, True] * len(SIZES)


@pytest.mark.parametrize("outer", [None, OuterSGD()])
def test_weights_are_conserved(outer: OuterSGD | None) -> None:
    """Without learning the full network stays as it is, bit for bit."""
    job, optimizers = make(growing(4, outer=outer), still, batchnorm="batch")
    before = weights(job)
    for _ in SIZES:
        train(job, optimizers, STEPS)
        after = weights(job)
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("optimizer", "name"), [(sgd, "momentum_buffer"), (adamw, "exp_avg_sq")])
def test_momentum_travels(optimizer: Callable[[nn.Module], Optimizer], name: str) -> None:
    job, optimizers = make(growing(), optimizer)
    for round in range(len(SIZES)):
        train(job, optimizers, 1)
        local_step(job, optimizers)
        before = states(job, optimizers, name)
        job.step(*optimizers)
        if SIZES[round] == BLOCKS:  # local SGD: no block moves, and the state of each worker stays
            continue
        for after in states(job, optimizers, name):
            for key, value in after.items():
                if key.startswith("layer3.") and not key.startswith("layer3.0."):
                    mean = torch.stack([held[key] for held in before if key in held]).mean(0)
                    torch.testing.assert_close(value, mean, rtol=1e-12, atol=1e-15, msg=key)
    assert all(len(o.state) == len(list(w.model.parameters())) for o, w in zip(optimizers, job.workers, strict=True))


def ends(processes: bool) -> tuple[dict[str, Tensor] | None, list[dict[str, Tensor]]]:
    """The full network and the momenta of a growing job of four workers, in these processes or in this one alone."""
    job, optimizers = make(growing(4), seed=3, transport=None if processes else Local(4))
    train(job, optimizers, STEPS * len(SIZES) - 1)  # the last round is short
    full = job.full_model()
    own = states(job, optimizers, "momentum_buffer")
    return None if full is None else {name: p.detach() for name, p in full.named_parameters()}, own


def test_two_processes_grow_as_one(pool: Pool) -> None:
    alone, momenta = ends(processes=False)
    results = pool.run(2, ends, True)
    full = results[0][0]
    assert alone is not None
    for name, value in alone.items():
        torch.testing.assert_close(full[name], value, rtol=0, atol=1e-12)
    for ours, expected in zip([state for _, own in results for state in own], momenta, strict=True):
        assert ours.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-10)


def everything(job: Job) -> list[Tensor]:
    states = {worker.index: [t for _, v in sorted(worker.state.items()) for t in v.values()] for worker in job.workers}
    return [t for worker in job.workers for t in (worker.subnet.flat, *states[worker.index])]


def continued(at: int, folder: Path, outer: OuterSGD | None = None) -> bool:
    """Whether a job that is saved after `at` rounds and restored ends where the undisturbed one does."""
    job, optimizers = make(growing(4, outer=outer))
    train(job, optimizers, at * STEPS)
    checkpoints = Checkpoints(folder, job.transport)
    checkpoints.begin(job, tuple(optimizers), {})
    checkpoints.finish()
    train(job, optimizers, (len(SIZES) - at) * STEPS)
    job.transport.all_gather_text("")
    again, others = make(growing(4, outer=outer), resume_at=(at, at * STEPS))
    assert again.workers[0].subnet.capacities == (SIZES[at],)
    restore(again, tuple(others), complete(folder)[0])
    train(again, others, (len(SIZES) - at) * STEPS)
    return all(torch.equal(a, b) for a, b in zip(everything(job), everything(again), strict=True))


@pytest.mark.parametrize("at", [1, 2, 3, 5])  # 2: the checkpoint is the first one with the new capacities
def test_a_growing_job_is_resumed_bit_for_bit(at: int, tmp_path: Path) -> None:
    assert continued(at, tmp_path)


def test_the_outer_momentum_grows_and_is_resumed(tmp_path: Path) -> None:
    assert continued(3, tmp_path, OuterSGD())


@pytest.mark.parametrize("capacities", [GROWING, Capacities(by_worker=(1, 5, 2), by_round={2: 4})])
def test_a_new_job_takes_the_state_of_one_that_has_grown(capacities: Capacities) -> None:
    """Its sub-networks have the size of round 0 until then."""
    strategy = resist(3, STEPS, capacities=capacities)
    job, optimizers = make(strategy)
    train(job, optimizers, 3 * STEPS)
    again, others = make(strategy)
    again.attach(*others)
    again.load_state_dict(job.state_dict())
    assert (again.round, again.plan) == (3, job.plan)
    assert [w.subnet.capacities for w in again.workers] == [w.subnet.capacities for w in job.workers]
    for each, own in ((job, optimizers), (again, others)):
        train(each, own, 2 * STEPS)
    assert all(torch.equal(a, b) for a, b in zip(everything(job), everything(again), strict=True))


def test_processes_resume_after_growth(pool: Pool, tmp_path: Path) -> None:
    assert all(pool.run(2, continued, 2, tmp_path))


def two_chains() -> PreActResNet:
    """Chains of three and of twelve blocks."""
    return PreActResNet((1, 4, 13, 1), 5, width=4).double()


CHAINS = ("layer2:1-3", "layer3:1-12")


@pytest.mark.parametrize(
    ("capacities", "sizes", "scales"),
    [
        ((8, 4), [(3, 8), (3, 4)], [1.0, 0.5]),
        ({"layer2": 2, "layer3": (8, 4)}, [(2, 8), (2, 4)], [2 / 3, 0.5]),
        ({"layer2:1-3": (1, 2)}, [(1, 6), (2, 6)], [0.5, 0.5]),
    ],
)
def test_chains_have_their_own_capacities(capacities, sizes, scales: list[float]) -> None:
    job = Job(two_chains, resist(2, STEPS, capacities=capacities), chains=CHAINS, batchnorm="batch")
    assert [worker.subnet.capacities for worker in job.workers] == sizes
    assert job.scales == pytest.approx(scales)
    optimizers = [still(worker.model) for worker in job.workers]
    before = weights(job)
    train(job, optimizers, 3 * STEPS)
    after = weights(job)
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = scales_of(full_of(job))
    assert found.get("layer2.1", 1.0) == pytest.approx(scales[0])
    assert found["layer3.12"] == pytest.approx(scales[1])


def differ(growth: dict[int, int], other: dict[int, int]) -> str:
    own = (growth, other)[int(torch.distributed.get_rank())]
    try:
        make(resist(2, STEPS, capacities=Capacities(by_round=own)))
    except AgreedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("other", [{0: 3}, {0: 3, 5: 5}, {0: 3, 4: 6}])
def test_processes_agree_on_later_capacities(pool: Pool, other: dict[int, int]) -> None:
    """They are equal in round 0."""
    for text in pool.run(2, differ, {0: 3, 4: 5}, other):
        assert text.startswith("process 1 was started with `capacities=")


def test_capacities_changed_in_training_are_those_of_a_job_that_knew_them() -> None:
    """Bit for bit; from the round after the one in which they are changed."""
    first, later = (3, 3), (5, 2)
    known, optimizers = make(resist(2, STEPS, capacities=Capacities(by_worker=first, by_round={2: later})))
    train(known, optimizers, 4 * STEPS)
    job, optimizers = make(resist(2, STEPS, capacities=first))
    train(job, optimizers, STEPS)
    local_step(job, optimizers)
    job.step(*optimizers)
    job.change_capacities(later)
    assert job.plan.capacities(0) == (3,)
    local_step(job, optimizers)
    job.step(*optimizers)
    assert job.plan.capacities(0) == (5,)
    train(job, optimizers, 2 * STEPS)
    expected, found = weights(known), weights(job)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    before = job.strategy
    for wrong, message in (
        ((1, 1), "hold 2 of the 6 blocks"),
        ((6, 6, 6), "3 values for `workers=2`"),
        (0, "less than 1"),
    ):
        with pytest.raises(UserError, match=message):
            job.change_capacities(wrong)
        assert job.strategy is before


def test_capacities_that_do_not_fit_a_later_round_are_refused_at_once() -> None:
    with pytest.raises(UserError, match="hold 4 of the 6 blocks of chain layer3:1-6 after 9 rounds"):
        make(resist(2, STEPS, capacities=Capacities(by_round={9: 2})))
    with pytest.raises(UserError, match="capacities of chain 'layer4', which is not partitioned"):
        make(resist(2, STEPS, warmup_rounds=3, capacities={"layer4": 2}))
