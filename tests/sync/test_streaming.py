"""Jobs whose shared part is averaged in fragments: what all agree on, and what is never lost."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist.cost.footprint import build_on_meta
from resist.cost.sizes import sizes_of
from resist.cost.states import StateMeter
from resist.cost.traffic import round_traffic
from resist.errors import DivergedError, UserError, WorkerLostError
from resist.planning.capacities import Capacities
from resist.planning.fragments import fragment_times
from resist.planning.strategy import Strategy, diloco, local_sgd, resist
from resist.subnet.batchnorm import has_running_statistics
from resist.sync.averaging import VELOCITY
from resist.sync.local import Local
from wired import STEPS, STRATEGIES, anchors, everyones, sgd, single, streamed, tensors_of


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("average", "fp32"),
        ("switch", "int8"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("diloco", "fp32"), ("growing", "int4"))),
    ],
)
def test_all_workers_agree_on_the_anchors(name: str, wire: str) -> None:
    """And the complete network has the mean of what the workers have, whose training goes on undisturbed."""
    run, drifts = streamed(STRATEGIES[name](STEPS), wire), 0
    for _ in range(5):
        run.train(STEPS)
        job, workers = run.job, run.job.workers
        assert all(torch.equal(anchors(workers[0]), anchors(worker)) for worker in workers)
        before, blocks = tensors_of(run), job.plan.held_by_all
        full = job.full_model()
        assert full is not None
        assert all(torch.equal(*pair) for pair in zip(before, tensors_of(run), strict=True))
        mean = torch.stack([everyones(worker, blocks=blocks) for worker in workers]).double().mean(0).float()
        assembled = dict(full.named_parameters())
        held = job.plan.held(0)
        state = workers[0].subnet.state(held)
        drifts += not torch.equal(mean, everyones(workers[0], blocks=blocks))
        own, layout = workers[0].subnet.flat.clone(), workers[0].subnet.layout
        parts = [own[start:end] for start, end in layout.ranges(blocks=blocks)]
        for part, value in zip(parts, torch.split(mean, [part.numel() for part in parts]), strict=True):
            part.copy_(value)
        expected = workers[0].subnet.state(held, {torch.float32: own})
        chains = tuple(f"{chain.block_name(0).rpartition('.')[0]}." for chain in job.chains)
        for key in state:
            if key in assembled and (blocks or not key.startswith(chains)):
                torch.testing.assert_close(assembled[key], expected[key], rtol=1e-5, atol=1e-6)
    assert drifts >= 3


@pytest.mark.parametrize(("name", "delay"), [("resist", 1), ("local_sgd", 2)])
def test_equal_workers_train_as_one(name: str, delay: int) -> None:
    """The mean of equal changes is the own change: the delay loses nothing, and counts nothing twice."""
    make: dict[str, Callable[[int], Strategy]] = {
        "local_sgd": lambda workers: local_sgd(workers, 9, optimizer_state="keep"),
        "resist": lambda workers: resist(workers, 9, capacities=6, optimizer_state="keep"),
    }
    several = streamed(make[name](3), fragments=3, delay=delay, equal=True).train(20)
    alone = streamed(make[name](1), fragments=3, delay=delay, equal=True).train(20)
    assert not alone.job.workers[0].fragments
    for worker in several.job.workers:
        torch.testing.assert_close(worker.subnet.flat, alone.job.workers[0].subnet.flat, rtol=1e-4, atol=1e-5)


def test_every_number_is_averaged_once_a_round() -> None:
    """Each worker's change of a round arrives in the anchors in equal parts."""
    for name, early in (("resist", 0), ("resist", 3), ("local_sgd", 1)):
        run = streamed(STRATEGIES[name](STEPS), delay=1)
        workers = run.job.workers
        start = anchors(workers[0]).clone()
        for step in range(early or STEPS):
            if step == 0:
                with torch.no_grad():
                    for worker in workers:
                        worker.subnet.flat.add_(float(worker.index))  # 0, 1, 2: the mean is 1
            run.job.begun = True
            run.job._steps_in_round += 1
            if run.job._streaming is not None:
                run.job._streaming.step(run.job._steps_in_round)
        run.job.synchronize()
        torch.testing.assert_close(anchors(workers[0]) - start, torch.ones_like(start), rtol=0, atol=1e-5)
        for worker in workers:
            blocks = run.job.plan.held_by_all
            torch.testing.assert_close(
                everyones(worker, blocks=blocks), everyones(workers[0], blocks=blocks), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("wire", ["fp32", "int8", "bf16"])
def test_progress_during_the_delay_is_kept(wire: str) -> None:
    run = streamed(resist(2, 8, optimizer_state="keep"), wire, fragments=2, delay=3)
    streaming, workers = run.job._streaming, run.job.workers
    assert streaming is not None
    start = {worker.index: everyones(worker, blocks=False) for worker in workers}
    with torch.no_grad():
        workers[1].subnet.flat.add_(1.0)
        begin = fragment_times(8, 2, 3)[0].begin
        for step in range(1, begin + 1):
            streaming.step(step)
        workers[0].subnet.flat.add_(0.25)  # while the mean of fragment 0 is on its way
        for step in range(begin + 1, begin + 4):
            streaming.step(step)
    for worker, own in zip(workers, (0.75, 0.5), strict=True):
        first, second = worker.fragments
        moved = first.read(worker.subnet.flat) - torch.cat([start[worker.index][a:b] for a, b in first.strips])
        torch.testing.assert_close(moved, torch.full_like(moved, own), rtol=0, atol=0.02)
        own = 0.25 if worker.index == 0 else 1.0
        moved = second.read(worker.subnet.flat) - torch.cat([start[worker.index][a:b] for a, b in second.strips])
        torch.testing.assert_close(moved, torch.full_like(moved, own), rtol=0, atol=1e-5)


SLOW = [("average", "fp32"), ("outer", "int8"), ("switch", "fp32"), ("growing", "bf16")]


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        *(("average", "int8"), ("diloco", "fp32"), ("switch", "int4")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW),
    ],
)
def test_bytes_are_those_of_the_formula(name: str, wire: str) -> None:
    run = streamed(STRATEGIES[name](STEPS), wire, replicate=name == "average")
    sizes = sizes_of(build_on_meta(single), run.job.chains)
    held = [run.job.plan.capacities(worker) for worker in range(3)]
    meter = StateMeter(lambda parameters: sgd(nn.ParameterList(parameters)))
    state = meter.sizes(build_on_meta(single), run.job.chains, held)
    for number in range(5):
        run.job.transport.take()
        run.train(STEPS if number != 3 else 2)  # a round that ends early sends as much
        run.job.finish()
        expected = round_traffic(
            sizes, run.job.plan_of(number), run.job.plan_of(number + 1),
            strategy=run.job.strategy.at(number), state=state, replicate=name == "average", wire=run.job.wire,
        )  # fmt: skip
        assert +run.job.transport.bytes == +Counter(expected.bytes)


def test_frozen_weights_beside_fragments_do_not_count_as_changed() -> None:
    def network() -> nn.Module:
        model = single()
        model.get_parameter("stem.weight").requires_grad_(False)
        model.register_buffer("table", torch.arange(5.0))
        return model

    run = streamed(resist(2, STEPS), network=network).train(2 * STEPS)
    changing = {name for _, name in run.job.workers[0].subnet.changing}
    assert has_running_statistics(run.job.workers[0].model)
    assert all("running" in name for name in changing)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
@pytest.mark.parametrize("everyone", [False, True])
def test_a_worker_with_nan_does_not_spoil_the_others(wire: str, everyone: bool) -> None:
    run = streamed(resist(3, STEPS, min_depth=6), wire, on_nonfinite="drop").train(STEPS)
    workers = run.job.workers
    for worker in workers if everyone else workers[:1]:
        with torch.no_grad():
            for parameter in worker.model.parameters():
                parameter.fill_(torch.nan)
    before = anchors(workers[1]).clone()
    run.train(STEPS - 1)
    assert anchors(workers[1]).isfinite().all()
    assert all(torch.equal(anchors(workers[0]), anchors(worker)) for worker in workers)
    if everyone:
        assert torch.equal(anchors(workers[1]), before) or wire != "fp32"
        with pytest.raises(DivergedError):
            run.train(1)
        return
    assert all(worker.subnet.flat.isfinite().all() for worker in workers[1:])
    assert not torch.equal(anchors(workers[1]), before)
    run.train(1)
    assert run.job.dropped.keys() == {0}
    for fragment in workers[0].fragments:
        assert torch.equal(fragment.read(workers[0].subnet.flat), fragment.feedback.anchor)
    run.train(STEPS)
    assert not run.job.dropped
    assert all(worker.subnet.flat.isfinite().all() for worker in workers)


def test_the_others_average_without_a_worker_with_nan() -> None:
    """It is left out of the divisor."""
    for wire in ("fp32", "bf16"):
        run = streamed(resist(4, 8), wire, fragments=2)
        streaming, workers = run.job._streaming, run.job.workers
        assert streaming is not None
        start = anchors(workers[0]).clone()
        with torch.no_grad():
            for worker in workers:
                worker.subnet.flat.add_(torch.inf if worker.index == 2 else 3.0 * worker.index)
        for step in range(1, 8):
            streaming.step(step)
        moved = anchors(workers[1]) - start
        torch.testing.assert_close(moved, torch.full_like(moved, 4.0), rtol=0, atol=0.05)  # of 0, 3 and 9


def test_velocity_is_that_of_fragments() -> None:
    """Of the shared part once a round, in equal bits; one round of diloco moves as without fragments."""
    run, whole = streamed(diloco(3, STEPS)), streamed(diloco(3, STEPS), fragments=0)
    for one in (run, whole):
        with torch.no_grad():
            for worker in one.job.workers:
                worker.subnet.flat.add_(float(worker.index))
        for step in range(1, STEPS):
            if one.job._streaming is not None:
                one.job._streaming.step(step)
        one.job.synchronize()
    for a, b in zip(run.job.workers, whole.job.workers, strict=True):
        for ranges in (a.subnet.layout.ranges(blocks=True),):
            for start, end in ranges:
                torch.testing.assert_close(a.subnet.flat[start:end], b.subnet.flat[start:end], rtol=0, atol=2e-5)
                velocity = [w.state[VELOCITY][torch.float32][start:end] for w in (a, b)]
                torch.testing.assert_close(*velocity, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("first", "then"), [(6, 3), (3, 6)])
@pytest.mark.parametrize("steps", [0, 3])
def test_capacities_do_not_change_what_is_averaged_in_a_round_that_has_begun(first: int, then: int, steps: int) -> None:
    """Blocks that all hold are in the fragments, whose anchors would be those of other numbers."""
    run, other = (streamed(resist(3, STEPS, capacities=first)).train(STEPS + steps) for _ in range(2))
    with pytest.raises(UserError, match="give such capacities to the strategy"):
        run.job.change_capacities(then)
    run.job.change_capacities((first, first, first))  # as before
    for one in (run, other):
        one.train(2 * STEPS)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(run), tensors_of(other), strict=True))
    run = streamed(resist(3, STEPS, capacities=Capacities(by_worker=first, by_round={3: then}))).train(5 * STEPS)
    for worker in run.job.workers:
        assert torch.equal(anchors(worker), anchors(run.job.workers[0]))


class Lost:
    """What another process was lost in."""

    def finish(self) -> list[Tensor | None]:
        raise WorkerLostError("worker 1 is lost")


@pytest.mark.parametrize(("wire", "call"), [("fp32", "mean"), ("int8", "scatter"), ("int8", "gather")])
def test_a_loss_in_the_mean_of_a_fragment_leaves_the_weights(wire: str, call: str) -> None:
    transport = Local(3)
    run = streamed(resist(3, STEPS), wire, transport=transport).train(STEPS)
    setattr(transport, call, lambda *_: Lost())
    before = [worker.subnet.flat.clone() for worker in run.job.workers]
    trained: list[Tensor] = []
    step = run.job.step

    def noted(*optimizers: Optimizer) -> bool:
        trained[:] = [worker.subnet.flat.clone() for worker in run.job.workers]
        return step(*optimizers)

    run.job.step = noted  # type: ignore[method-assign]
    with pytest.raises(WorkerLostError):
        run.train(STEPS)
    for worker, own, at_first in zip(run.job.workers, trained, before, strict=True):
        torch.testing.assert_close(worker.subnet.flat, own, rtol=1e-6, atol=1e-6)
        assert not torch.equal(own, at_first)
