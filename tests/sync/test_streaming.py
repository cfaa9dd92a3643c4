"""Jobs whose shared part is averaged in fragments: what all agree on, what is never lost, and what stays as it was."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pool import Pool
from resist.cost.footprint import build_on_meta
from resist.cost.sizes import sizes_of
from resist.cost.states import StateMeter
from resist.cost.traffic import round_traffic
from resist.errors import DivergedError, UserError
from resist.job import Job
from resist.models import PreActResNet
from resist.planning.capacities import Capacities
from resist.planning.fragments import STRIPS, fragment_sizes, fragment_strips, fragment_times
from resist.planning.strategy import OuterSGD, Strategy, ddp, diloco, local_sgd, resist, switch
from resist.planning.wire import Wire, as_wire
from resist.runs.job_state import restore_weights
from resist.runs.library import load_checkpoint, save_checkpoint
from resist.subnet.batchnorm import has_running_statistics
from resist.sync.averaging import VELOCITY
from resist.sync.local import Local
from resist.sync.worker import Worker

STEPS = 4  # of a round


def single() -> PreActResNet:
    return PreActResNet((1, 1, 7, 1), 5, width=4)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Run:
    """A job on `single` with fragments, its optimizers and batches."""

    def __init__(
        self,
        strategy: Strategy,
        wire: str | Wire = "fp32",
        fragments: int = 2,
        delay: int = 1,
        *,
        equal: bool = False,
        make: Callable[[nn.Module], Optimizer] = sgd,
        network: Callable[[], nn.Module] = single,
        **options: object,
    ) -> None:
        options = {"batchnorm": "average", "example": False, "seed": 3, **options}
        wire = replace(as_wire(wire), fragments=fragments, delay=delay)
        self.job = Job(network, strategy, wire=wire, **options)  # type: ignore[arg-type]
        self.optimizers, self.equal = [make(worker.model) for worker in self.job.workers], equal
        self.job.attach(*self.optimizers)
        self.averages: list[AveragedModel] = []
        self.kept: list[Tensor] = []

    def follow(self) -> "Run":
        update = get_ema_multi_avg_fn(0.9)
        self.averages = [AveragedModel(worker.model, multi_avg_fn=update) for worker in self.job.workers]
        self.job.follow(*self.averages)
        return self

    def train(self, steps: int) -> "Run":
        """Take steps with random gradients towards zero, which is faster than batches, and change the statistics."""
        for _ in range(steps):
            for worker, optimizer in zip(self.job.workers, self.optimizers, strict=True):
                seed = self.job.step_index if self.equal else 1000 * worker.index + self.job.step_index
                random = torch.Generator().manual_seed(seed)
                for parameter in worker.model.parameters():
                    noise = torch.randn(parameter.shape, generator=random)
                    parameter.grad = parameter.detach() + noise if parameter.requires_grad else None
                for name, buffer in worker.model.named_buffers():
                    if "running" in name:
                        buffer.add_(0.01 if self.equal else 0.01 * (worker.index + 1))
                optimizer.step()
            for worker, average in zip(self.job.workers, self.averages, strict=False):
                average.update_parameters(worker.model)
            self.job.step(*self.optimizers)
        return self


STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "resist": lambda: resist(3, STEPS),
    "average": lambda: resist(3, STEPS, capacities=(4, 3, 2), optimizer_state="average"),
    "outer": lambda: resist(3, STEPS, min_depth=3, outer=OuterSGD()),
    "local_sgd": lambda: local_sgd(3, STEPS, optimizer_state="average"),
    "diloco": lambda: diloco(3, STEPS),
    "switch": lambda: switch(
        local_sgd(3, STEPS), switch(resist(3, STEPS), local_sgd(3, STEPS), at_round=4), at_round=2
    ),
    "growing": lambda: resist(3, STEPS, capacities=Capacities(by_worker=2, by_round={2: 4, 3: 6})),
}


def anchors(worker: Worker) -> Tensor:
    return torch.cat([fragment.feedback.anchor for fragment in worker.fragments])


def everyones(worker: Worker, *, blocks: bool) -> Tensor:
    """What every worker trains: of the shared part, or of all blocks as well."""
    layout = worker.subnet.layout
    return torch.cat([worker.subnet.flat[start:end] for start, end in layout.ranges(blocks=blocks)])


def tensors_of(run: Run) -> list[Tensor]:
    """Everything that the next rounds depend on."""
    found: list[Tensor] = []
    for worker in run.job.workers:
        found += [worker.subnet.flat, *(worker.state[name][torch.float32] for name in sorted(worker.state))]
        for feedback in (fragment.feedback for fragment in worker.fragments):
            found += [t for t in (feedback.anchor, feedback.error, feedback.piece_error) if t is not None]
    return [tensor.clone() for tensor in found]


@given(st.integers(0, 9000), st.integers(1, 12))
def test_strips_have_every_number_once(numel: int, fragments: int) -> None:
    dealt = fragment_strips(numel, fragments)
    assert len(dealt) == fragments
    ordered = sorted(strip for strips in dealt for strip in strips)
    assert [number for start, end in ordered for number in range(start, end)] == list(range(numel))
    assert all(len(strips) <= STRIPS for strips in dealt)
    assert sum(fragment_sizes(numel, fragments)) == numel
    if numel >= 16 * 8 * fragments:
        assert all(strips[-1][1] - strips[0][0] > numel / 2 for strips in dealt if fragments < 5)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_fragments_follow_each_other_within_the_round(steps: int, fragments: int, delay: int) -> None:
    if steps < 2 * fragments or delay >= steps // fragments:
        with pytest.raises(UserError, match=r"needs at least|is too long"):
            fragment_times(steps, fragments, delay)
        return
    before = 0
    for times in fragment_times(steps, fragments, delay):
        assert 1 <= times.begin < times.advance <= times.finish <= steps
        assert times.finish == times.begin + delay
        assert times.begin >= before
        before = times.finish


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
    run, drifts = Run(STRATEGIES[name](), wire), 0
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
    several = Run(make[name](3), fragments=3, delay=delay, equal=True).train(20)
    alone = Run(make[name](1), fragments=3, delay=delay, equal=True).train(20)
    assert not alone.job.workers[0].fragments
    for worker in several.job.workers:
        torch.testing.assert_close(worker.subnet.flat, alone.job.workers[0].subnet.flat, rtol=1e-4, atol=1e-5)


def test_every_number_is_averaged_once_a_round() -> None:
    """Each worker's change of a round arrives in the anchors in equal parts."""
    for name, early in (("resist", 0), ("resist", 3), ("local_sgd", 1)):
        run = Run(STRATEGIES[name](), delay=1)
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
    run = Run(resist(2, 8, optimizer_state="keep"), wire, fragments=2, delay=3)
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
    run = Run(STRATEGIES[name](), wire, replicate=name == "average")
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

    run = Run(resist(2, STEPS), network=network).train(2 * STEPS)
    changing = {name for _, name in run.job.workers[0].subnet.changing}
    assert has_running_statistics(run.job.workers[0].model)
    assert all("running" in name for name in changing)


@pytest.mark.parametrize("wire", ["fp32", "int8"])
@pytest.mark.parametrize("everyone", [False, True])
def test_a_worker_with_nan_does_not_spoil_the_others(wire: str, everyone: bool) -> None:
    run = Run(resist(3, STEPS, min_depth=6), wire, on_nonfinite="drop").train(STEPS)
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
        run = Run(resist(4, 8), wire, fragments=2)
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


@pytest.mark.parametrize(
    ("name", "wire"),
    [
        ("switch", "int4"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("average", "fp32"), ("diloco", "int8"))),
    ],
)
def test_a_loaded_job_goes_on_bit_for_bit(name: str, wire: str) -> None:
    run, other = Run(STRATEGIES[name](), wire), Run(STRATEGIES[name](), wire)
    for _ in range(5):
        run.train(STEPS)
        state = run.job.state_dict()
        other.job.load_state_dict(state)
        again = other.job.state_dict()
        assert all(torch.equal(value, again["weights"][key]) for key, value in state["weights"].items())
        other.train(STEPS + 1)
        run.train(1)
        other.job.load_state_dict(state)  # in the middle of a round
        run.train(STEPS - 1)
        other.train(STEPS)
        assert all(torch.equal(*pair) for pair in zip(tensors_of(run), tensors_of(other), strict=True))


def test_another_job_begins_at_the_anchors() -> None:
    run = Run(resist(3, STEPS), "int8").train(2 * STEPS)
    state = run.job.state_dict()
    agreed = state["weights"]["stem.weight"]
    assert not torch.equal(agreed, run.job.workers[0].model.get_parameter("stem.weight"))
    for workers, wire, fragments in ((2, "int8", 2), (3, "fp32", 2), (3, "int8", 1), (3, "int8", 0)):
        other = Run(resist(workers, STEPS), wire, fragments)
        other.job.load_state_dict(state)
        for worker in other.job.workers:
            assert torch.equal(worker.model.get_parameter("stem.weight"), agreed)


def test_a_job_can_be_loaded_while_a_fragment_is_on_its_way() -> None:
    run = Run(resist(3, STEPS), fragments=1, delay=2).train(STEPS)
    state, expected = run.job.state_dict(), Run(resist(3, STEPS), fragments=1, delay=2).train(2 * STEPS)
    run.train(2)
    run.job.load_state_dict(state)
    run.train(STEPS)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(run), tensors_of(expected), strict=True))
    run.train(2)
    run.job.close()


def test_replicas_have_what_all_agree_on(tmp_path: Path) -> None:
    run = Run(resist(3, STEPS), "int8", replicate=True).train(2 * STEPS)
    (replica,) = run.job.replicas
    state = run.job.state_dict()["weights"]
    assert all(torch.equal(value, replica.tensors[name]) for name, value in state.items())
    other = Run(resist(3, STEPS), "int8", replicate=True, resume_at=(2, 2 * STEPS))
    restore_weights(other.job, replica.tensors, tmp_path)
    for worker in other.job.workers:
        assert torch.equal(anchors(worker), anchors(run.job.workers[0]))
    other.train(STEPS)
    assert all(torch.equal(anchors(other.job.workers[0]), anchors(worker)) for worker in other.job.workers)


def test_a_run_that_ends_within_a_fragment_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """With an average of the weights, which is exchanged at the round's end."""
    run = Run(resist(3, STEPS), "int8", fragments=1, delay=2).follow().train(STEPS)
    save_checkpoint(tmp_path, run.job)
    run.train(2)  # a fragment is on its way; then the process dies
    other = Run(resist(3, STEPS), "int8", fragments=1, delay=2).follow()
    load_checkpoint(tmp_path, other.job)
    assert other.job.step_index == STEPS
    for one, more in ((run, STEPS - 2), (other, STEPS)):
        one.train(more)
        full = one.job.full_model(averaged=True)
        assert full is not None
        one.kept = tensors_of(one) + list(full.parameters())
    assert all(torch.equal(*pair) for pair in zip(run.kept, other.kept, strict=True))


def test_velocity_is_that_of_fragments() -> None:
    """Of the shared part once a round, in equal bits; one round of diloco moves as without fragments."""
    run, whole = Run(diloco(3, STEPS)), Run(diloco(3, STEPS), fragments=0)
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


def test_bad_numbers_are_refused_in_one_line() -> None:
    for wire, message in (
        ({"fragments": -1}, "`fragments=-1`; must be at least 0"),
        ({"fragments": 2, "delay": 0}, "`delay=0`; must be at least 1"),
        ({"fragments": 2.5}, "`fragments=2.5` is not a whole number"),
        ({"delay": 2}, "`delay=2` has no effect without `fragments`"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            Wire(**wire)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"needs at least 10 steps in a round, .* give `fragments=3` or fewer"):
        Job(single, resist(2, 6), wire=Wire(fragments=5), example=False)
    with pytest.raises(UserError, match=r"`delay=3` is too long: .* give at most 2"):
        Job(single, resist(2, 6), wire=Wire(fragments=2, delay=3), example=False)
    with pytest.raises(UserError, match="leave out"):
        Job(single, ddp(1), wire=Wire(fragments=2), example=False)


def trained_by(name: str, wire: str, alone: bool) -> dict[int, Tensor]:
    """Weights of each hosted worker after some rounds, without what only buffers change."""
    strategy = STRATEGIES[name]()
    run = Run(strategy, wire, **({"transport": Local(strategy.workers)} if alone else {}))  # type: ignore[arg-type]
    run.train(4 * STEPS + 2)
    full = run.job.full_model()
    found = {worker.index: everyones(worker, blocks=True).clone() for worker in run.job.workers}
    if full is not None:
        found[-1] = torch.cat([parameter.detach().reshape(-1) for parameter in full.parameters()])
    run.train(3)  # closed with a fragment on its way
    run.job.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wire"), [("average", "int8"), ("switch", "fp32")])
def test_the_number_of_processes_changes_nothing(pool: Pool, name: str, wire: str) -> None:
    alone = trained_by(name, wire, alone=True)
    for processes in (2, 3):
        parts = pool.run(processes, trained_by, name, wire, False)
        found = {worker: values for part in parts for worker, values in part.items()}
        assert found.keys() == alone.keys()
        for worker, values in alone.items():
            if wire == "fp32" or worker == -1:
                torch.testing.assert_close(found[worker], values, rtol=1e-4, atol=1e-5)
            else:
                assert torch.equal(found[worker], values)
