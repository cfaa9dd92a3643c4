"""Mistakes of new users, and their messages: at the first step at the latest, before work is lost."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import resist
from pool import Pool
from resist import Job, UserError
from support import make, sgd, tiny, train, weights

TWO = resist.resist(2, 1)


def one() -> Job:
    return Job(tiny, resist.resist(1, 1), batchnorm="average")


def step_with(change: Callable[[nn.Module], object]) -> None:
    """Take the first step of a loop after a change to the model."""
    job = one()
    changed = change(job.model)
    job.step(sgd(changed if isinstance(changed, nn.Module) else job.model))


def put(model: nn.Module, name: str) -> None:
    model.add_module(name, nn.Linear(16, 3).double())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Job(tiny(), TWO), r"Job was given a PreActResNet; give it the function that builds one, as in"),
        (lambda: Job(lambda: None, TWO), r"build_model\(\) returned a NoneType; it has to return the network"),  # type: ignore[arg-type,return-value]
        (
            lambda: Job(lambda: nn.Sequential(nn.LazyLinear(2)), TWO),
            r"parameter '0.weight' has no shape yet; run a batch through the network in build_model",
        ),
        (lambda: Job(tiny, resist.resist), r"is not a Strategy; give one, as in resist.resist\(workers=4\)"),  # type: ignore[arg-type]
        (lambda: resist.resist("4"), r"`workers='4'` is not a whole number"),  # type: ignore[arg-type]
        (lambda: resist.local_sgd(2, 2.5), r"`local_steps=2.5` is not a whole number"),  # type: ignore[arg-type]
        (lambda: Job(tiny, TWO, chains="layer9"), r"chain 'layer9': 'layer9' has no run .*; found: layer3:1-6"),
        (lambda: make(TWO)[0].step(*map(sgd, (tiny(), tiny()))), r"optimizer 0 has no parameter of the job's network"),
        (lambda: one().step(sgd(tiny())), r"make it from the parameters of job.model"),
        (lambda: step_with(copy.deepcopy), r"optimizer 0 has no parameter of the job's network"),
        (lambda: one().step(), r"0 optimizers for 1 hosted workers; pass one for each"),
        (lambda: make(TWO)[0].step([]), r"1 optimizers for 2 hosted workers"),  # type: ignore[arg-type]
        (lambda: one().step([]), r"job.step was given a list; give it the optimizers themselves"),  # type: ignore[arg-type]
        (lambda: one().step(StepLR(sgd(tiny()), 1)), r"job.step was given a StepLR; give it the optimizers"),  # type: ignore[arg-type]
        (lambda: step_with(lambda model: model.half()), r"'stem.weight' was moved out .* give Job the device"),
        (lambda: step_with(lambda model: model.to("meta")), r"'stem.weight' was moved out .* give Job the device"),
        (lambda: step_with(lambda model: put(model, "head")), r"'head.weight' was moved .* change layers in build_mo"),
        (lambda: step_with(lambda model: put(model, "extra")), r"'extra.weight' was moved .* change layers in build"),
        (lambda: Job(tiny, TWO).full_model(iter(())), r"full_model got no batches \(an iterator that is used up\?\)"),
        (
            lambda: Job(tiny, TWO).full_model([{"image": 0}]),
            r"got batches with image, .* missing a required argu.*; give dict",
        ),
        (lambda: Job(tiny, TWO).full_model([{}]), r"got batches with nothing, .* missing a required arg.*; give"),
        (lambda: Job(tiny, TWO).full_model([5]), r"full_model got batches of type int; give tensors"),
        (lambda: Job(tiny, TWO).full_model([()]), r"full_model got batches of type tuple; give tensors"),
    ],
)
def test_wrong_use_is_named_in_one_line(wrong: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        wrong()
    assert "\n" not in str(raised.value)


def test_optimizers_of_one_and_of_several_workers() -> None:
    job = one()
    with pytest.raises(UserError, match="optimizers 0 and 1 train the same parameters; give each parameter to one"):
        job.step(sgd(job.model), sgd(job.model))
    job, (first, _) = make(TWO)
    matrices = [p for p in job.workers[0].model.parameters() if p.dim() > 1]
    vectors = [p for p in job.workers[0].model.parameters() if p.dim() == 1]
    with pytest.raises(UserError, match=r"2 optimizers, none for job.workers\[1\]; pass one for each"):
        job.step(torch.optim.SGD(matrices), torch.optim.SGD(vectors))
    both = torch.optim.SGD([p for worker in job.workers for p in worker.model.parameters()])
    with pytest.raises(UserError, match="optimizer 0 has the networks of several workers; make it from the param"):
        job.step(both, first)


def test_a_moved_parameter_is_reported_before_any_state_is_lost() -> None:
    job, optimizers = make(resist.resist(2, 2, optimizer_state="reset"))
    train(job, optimizers, 1)
    job.workers[1].model.float()
    with pytest.raises(UserError, match="was moved out of the sub-network's flat tensor"):
        job.synchronize()
    assert all(optimizer.state for optimizer in optimizers)


@pytest.mark.slow
def test_the_order_of_optimizers_does_not_matter() -> None:
    job, optimizers = make(resist.resist(3, 1))
    other, others = make(resist.resist(3, 1))
    train(job, optimizers, 3)
    for _ in range(3):
        step, other.step = other.step, lambda *given, step=other.step: step(*given[::-1])  # type: ignore[method-assign]
        train(other, others, 1)
        other.step = step  # type: ignore[method-assign]
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(job).items())


def test_two_optimizers_for_one_worker() -> None:
    """As one with two groups: the state of both travels, also where parameters come and go."""
    strategy = resist.switch(resist.resist(2, 2, capacities=(3, 4)), resist.resist(2, 2, capacities=(5, 2)), at_round=1)

    def parts(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        return [p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]

    found = []
    for split in (True, False):
        job = Job(tiny, strategy, batchnorm="average")
        optimizers = []
        for matrices, vectors in (parts(worker.model) for worker in job.workers):
            groups = [{"params": matrices, "lr": 0.01}, {"params": vectors, "lr": 0.1}]
            optimizers += [torch.optim.AdamW([group]) for group in groups] if split else [torch.optim.AdamW(groups)]
        for step in range(6):
            for worker in job.workers:
                torch.manual_seed(10 * step + worker.index)
                worker.model(torch.randn(3, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            job.step(*optimizers)
        found.append(weights(job))
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def wrong_number(workers: int) -> str:
    try:
        return type(Job(tiny, resist.resist(workers, 1), batchnorm="average").model).__name__
    except UserError as error:
        return str(error)


@pytest.mark.slow
def test_a_strategy_for_another_number_of_processes(pool: Pool) -> None:
    message = "2 processes for 1 workers; start at most one process for each worker"
    assert pool.run(2, wrong_number, 1) == [message, message]
    answers = pool.run(2, wrong_number, 3)
    assert answers[0] == "PreActResNet"
    assert answers[1] == (
        "this process hosts 2 workers; loop over job.workers, or start one process for each "
        "(torchrun --nproc-per-node 3)"
    )
