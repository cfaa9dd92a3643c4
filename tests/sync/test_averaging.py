"""Means over holders, and the policies for the optimizer's state at a synchronization."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from resist.job import Job
from resist.planning.strategy import local_sgd, resist, switch
from resist.sync.averaging import mean_into
from support import adamw, local_step, make, sgd, states, train, train_step

pytestmark = pytest.mark.slow


@given(st.integers(1, 9), st.integers(0, 10**6))
def test_mean(copies: int, seed: int) -> None:
    values = torch.randn(copies, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    first = values[0].clone()
    mean_into(first, list(values[1:]))
    torch.testing.assert_close(first, values.mean(0), rtol=1e-13, atol=1e-13)


@given(st.integers(1, 9), st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_the_mean_of_equal_copies_is_the_copy(copies: int, values: list[float]) -> None:
    first = torch.tensor(values)
    mean_into(first, [torch.tensor(values) for _ in range(copies - 1)])
    assert torch.equal(first, torch.tensor(values))


def is_shared(name: str) -> bool:
    return not name.startswith("layer3.") or name.startswith("layer3.0.")


def mean_over_holders(held: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([tensors[name] for tensors in held if name in tensors]).mean(0)


def stays(job: Job, worker: int, name: str) -> bool:
    """The worker holds the block of this tensor in the new round too."""
    return is_shared(name) or int(name.split(".")[1]) - 1 in job.plan.held(worker)[0]


@pytest.mark.parametrize("policy", ["keep", "travel", "average"])
@pytest.mark.parametrize(
    ("optimizer", "names", "capacities"),
    [
        (sgd, ["momentum_buffer"], (2, 2, 2)),
        (sgd, ["momentum_buffer"], (4, 3, 3)),
        (adamw, ["exp_avg", "exp_avg_sq"], (4, 3, 3)),
    ],
)
def test_state_at_a_synchronization(optimizer, names: list[str], policy: str, capacities: tuple[int, ...]) -> None:
    """Two rounds: the state is a tensor of the optimizer in the first one, and a view of a flat tensor from then on."""
    job, optimizers = make(resist(3, 2, capacities=capacities, optimizer_state=policy), optimizer)
    for _ in range(2):
        local_step(job, optimizers)
        job.step(*optimizers)
        local_step(job, optimizers)
        before = {state_name: states(job, optimizers, state_name) for state_name in names}
        assert job.step(*optimizers)
        for state_name in names:
            for worker, after in enumerate(states(job, optimizers, state_name)):
                if policy == "keep":  # the optimizer starts over on blocks that arrive
                    assert after.keys() == {n for n in before[state_name][worker] if stays(job, worker, n)}
                else:
                    assert len(after) == len(list(job.workers[worker].model.parameters()))
                for name, value in after.items():
                    kept = before[state_name][worker].get(name)
                    if policy == "average" or (policy == "travel" and not is_shared(name)):
                        expected = mean_over_holders(before[state_name], name)
                    else:
                        assert kept is not None
                        expected = kept
                    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-15, msg=f"{state_name} of {name}")
    train(job, optimizers, 1)


def test_reset_forgets() -> None:
    job, optimizers = make(resist(2, 1, optimizer_state="reset"))
    train(job, optimizers, 1)
    assert all(not optimizer.state for optimizer in optimizers)


def test_adams_step_count_stays() -> None:
    job, optimizers = make(resist(2, 1, optimizer_state="travel"), adamw)
    train(job, optimizers, 3)
    for optimizer in optimizers:
        assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("policy", ["reset", "keep", "travel", "average"])
@pytest.mark.parametrize("optimizer", [sgd, adamw])
def test_a_change_of_capacities_keeps_the_optimizer_going(optimizer, policy: str) -> None:
    """local SGD for 2 rounds, ResIST for 2, and local SGD again: the sub-networks shrink and grow."""
    everyone, parts = local_sgd(2, 2, optimizer_state=policy), resist(2, 2, capacities=(4, 3), optimizer_state=policy)
    job, optimizers = make(switch(switch(everyone, parts, at_round=2), everyone, at_round=4), optimizer)
    state_name = "momentum_buffer" if optimizer is sgd else "exp_avg"
    kept = [dict(worker.model.named_parameters()) for worker in job.workers]
    for round, capacity in enumerate([(6, 6), (6, 6), (4, 3), (4, 3), (6, 6), (6, 6)]):
        assert tuple(worker.subnet.capacities[0] for worker in job.workers) == capacity, round
        for worker, optimizer_, old in zip(job.workers, optimizers, kept, strict=True):
            now = dict(worker.model.named_parameters())
            in_optimizer = [parameter for group in optimizer_.param_groups for parameter in group["params"]]
            assert len(in_optimizer) == len(now)
            assert {id(p) for p in in_optimizer} == {id(p) for p in now.values()}
            assert set(optimizer_.state) <= set(in_optimizer)
            assert all(old[name] is now[name] for name in old if is_shared(name) or int(name.split(".")[1]) <= 3)
            before = [p.detach().clone() for p in now.values()]
            train_step(worker.index, worker.model, optimizer_, 50 + round)
            assert all(not torch.equal(a, b) for a, b in zip(before, now.values(), strict=True))
        job.step(*optimizers)
        local_step(job, optimizers)
        momenta = states(job, optimizers, state_name)
        job.step(*optimizers)
        if policy == "average" or (policy == "travel" and round in (1, 2, 3)):
            check_moved(job, momenta, states(job, optimizers, state_name))
    assert job.round == 6


def check_moved(job: Job, before: list[dict[str, Tensor]], after: list[dict[str, Tensor]]) -> None:
    for tensors in after:
        for name, value in tensors.items():
            if not is_shared(name):
                torch.testing.assert_close(value, mean_over_holders(before, name), rtol=1e-12, atol=1e-15)


def test_parameter_groups_keep_their_members() -> None:
    """New blocks join the groups of their counterparts, with the groups' options."""
    job, _ = make(switch(resist(2, 1, capacities=(3, 3)), local_sgd(2, 1), at_round=1))
    optimizers = []
    for worker in job.workers:
        norms = [p for name, p in worker.model.named_parameters() if "norm" in name]
        others = [p for name, p in worker.model.named_parameters() if "norm" not in name]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": others, "weight_decay": 0.1}]
        optimizers.append(torch.optim.SGD(groups, lr=0.01, momentum=0.9))
    train(job, optimizers, 2)
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in worker.model.named_parameters():
            assert decay[id(parameter)] == (0.0 if "norm" in name else 0.1), name
