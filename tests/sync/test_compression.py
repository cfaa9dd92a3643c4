"""Jobs whose messages are compressed: what agrees bit for bit, what is never lost, and what stays as it was."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resist.cost.footprint import build_on_meta
from resist.cost.sizes import sizes_of
from resist.cost.states import StateMeter
from resist.cost.traffic import round_traffic
from resist.errors import DivergedError, UserError
from resist.job import Job
from resist.planning.schedule import allreduce_bytes
from resist.planning.strategy import ddp, local_sgd, resist
from resist.planning.wire import CHOICES, WIRES, Wire
from resist.sync.averaging import VELOCITY
from resist.sync.codecs import CODECS
from resist.sync.compressed_mean import CompressedMean, Feedback
from resist.sync.local import Local
from resist.sync.transport import Handle, Move
from resist.training.recorder import weights_of
from support import states
from wired import STRATEGIES, Run, adamw, sgd, single, tensors_of

COMPRESSED = [name for name in WIRES if name != "fp32"]


def held_values(job: Job, *, kind: str = "weights") -> dict[str, list[Tensor]]:
    """Values of each weight in all workers that hold it, by global dotted name."""
    found: dict[str, list[Tensor]] = {}
    for worker in job.workers:
        subnet = worker.average if kind == "average" else worker.subnet
        assert subnet is not None
        flats = worker.state[VELOCITY] if kind == VELOCITY else None
        for name, value in subnet.state(job.plan.held(worker.index), flats).items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize(
    ("name", "wire"), [*((name, "int8") for name in STRATEGIES), ("average", "int4"), ("outer", "bf16")]
)
def test_all_holders_agree_bit_for_bit(name: str, wire: str) -> None:
    run = Run(STRATEGIES[name](1), wire, adamw if name == "average" else sgd).follow()
    for _ in range(4):
        run.train(1)
        outer = VELOCITY in run.job.workers[0].state
        for kind in ("weights", "average", *([VELOCITY] if outer else [])):
            for values in held_values(run.job, kind=kind).values():
                assert all(torch.equal(values[0], other) for other in values[1:])
                assert values[0].isfinite().all()


@pytest.mark.parametrize("name", ["outer", "average"])
def test_compressed_runs_stay_near_the_others(name: str) -> None:
    exact = Run(STRATEGIES[name](1), "fp32").train(3).weights()
    for wire, bound in (("bf16", 0.005), ("int8", 0.01), (Wire(shared="int4"), 0.05)):
        near = Run(STRATEGIES[name](1), wire).train(3).weights()
        moved = sum(float((near[n] - exact[n]).square().sum()) for n in exact)
        assert 0 < moved**0.5 < bound * sum(float(value.square().sum()) for value in exact.values()) ** 0.5


def test_a_job_without_formats_copies_nothing() -> None:
    run = Run(resist(3, 1), "fp32").train(2)
    assert all(not worker.fragments and worker.anchor is None for worker in run.job.workers)
    run = Run(resist(3, 1), Wire(blocks="bf16", state="int8")).train(2)
    assert all(not worker.fragments for worker in run.job.workers)


def test_a_network_without_buffers_is_one_range() -> None:
    """Then the anchor of local SGD is as large as the flat tensor, and must not be in its memory."""
    run = Run(local_sgd(2, 3), "int8", batchnorm="batch")
    worker = run.job.workers[0]
    (fragment,) = worker.fragments
    assert fragment.feedback.anchor.numel() == worker.subnet.flats[torch.float32].numel()
    run.train(6)
    first, second = (worker.subnet.flats[torch.float32] for worker in run.job.workers)
    assert torch.equal(first, second)
    assert torch.equal(first, run.job.workers[1].fragments[0].feedback.anchor)


def test_one_worker_loses_nothing() -> None:
    exact, other = (Run(resist(1, 1, optimizer_state="keep"), wire).train(3).weights() for wire in ("fp32", "int4"))
    assert all(torch.equal(value, other[name]) for name, value in exact.items())


def test_statistics_and_blocks_that_stay_are_exact() -> None:
    """With one worker for each block and no move, nothing of a block is rounded; buffers never are."""
    seen = 0
    run = Run(resist(3, 1, min_depth=0), Wire(shared="int4", blocks="int6", state="int8"))
    for _ in range(6):
        plan, own = run.job.plan, [(w, w.subnet.flat.clone()) for w in run.job.workers]
        run.train(0)
        before = {w.index: w.subnet.state(plan.held(w.index), {flat.dtype: flat}) for w, flat in own}
        exact = {name: value for values in before.values() for name, value in values.items()}
        run.job.synchronize()
        for worker in run.job.workers:
            for chain, blocks in enumerate(run.job.plan.held(worker.index)):
                for block in blocks:
                    stays = plan.holders(chain, block) == run.job.plan.holders(chain, block) == (worker.index,)
                    state = worker.subnet.state(run.job.plan.held(worker.index))
                    for name, value in state.items():
                        if not name.startswith(f"{run.job.chains[chain].block_name(block)}."):
                            continue
                        if stays or "running" in name:
                            assert torch.equal(value, exact[name]), name
                            seen += stays
        run.train(1)
    assert seen


@pytest.mark.parametrize("wire", COMPRESSED)
def test_momentum_arrives_and_second_moments_stay_positive(wire: str) -> None:
    run = Run(resist(3, 1, optimizer_state="average"), wire, adamw).train(3)
    for values in states(run.job, run.optimizers, "exp_avg_sq"):
        assert all((value >= 0).all() for value in values.values())
        assert sum(float(value.sum()) for value in values.values()) > 0
    shared = [values["stem.weight"] for values in states(run.job, run.optimizers, "exp_avg")]
    assert all(torch.equal(shared[0], other) for other in shared)
    assert shared[0].abs().sum() > 0


@pytest.mark.parametrize("wire", ["int8", "int4"])
def test_small_gradients_beside_large_ones_lead_to_no_large_step(wire: str) -> None:
    """Adam divides each first moment by the root of its own second moment."""
    lr = 1e-3
    run = Run(
        resist(2, 4, capacities=4, optimizer_state="average"), wire, lambda m: torch.optim.Adam(m.parameters(), lr)
    )
    for step in range(12):
        for worker, optimizer in zip(run.job.workers, run.optimizers, strict=True):
            random = torch.Generator().manual_seed(step + 100 * worker.index)
            before = [parameter.detach().clone() for parameter in worker.model.parameters()]
            for parameter in worker.model.parameters():
                gradient = 1 + 0.5 * torch.randn(parameter.shape, generator=random)
                gradient.view(-1)[::2] *= 1e-5
                parameter.grad = gradient
            optimizer.step()
            for old, parameter in zip(before, worker.model.parameters(), strict=True):
                assert (parameter - old).abs().max() < 4 * lr, step  # 0.1 / sqrt(0.001) at most
        run.job.step(*run.optimizers)


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_the_variance_of_a_centered_rmsprop_stays_positive(wire: str) -> None:
    """It is a difference of two states, small where gradients vary little."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(model.parameters(), lr=1e-4, alpha=0.5, centered=True)

    run = Run(resist(2, 8, capacities=4, optimizer_state="average"), wire, make)
    for step in range(25):
        for worker, optimizer in zip(run.job.workers, run.optimizers, strict=True):
            random = torch.Generator().manual_seed(step + 100 * worker.index)
            for parameter in worker.model.parameters():
                parameter.grad = 1 + 0.02 * torch.randn(parameter.shape, generator=random)
            optimizer.step()
        run.job.step(*run.optimizers)  # DivergedError if it is not


def test_a_dropped_workers_round_does_not_count() -> None:
    for wire in ("int8", "int4"):
        run = Run(resist(3, 1, min_depth=3), wire, on_nonfinite="drop").train(2)
        worker = run.job.workers[1]
        (everything,) = worker.fragments
        with torch.no_grad():
            worker.model.get_parameter("stem.weight").fill_(torch.nan)
        run.job.synchronize()
        assert run.job.dropped.keys() == {1}
        assert everything.feedback.error is not None
        assert not everything.feedback.error.any()
        for values in held_values(run.job).values():
            assert all(torch.equal(values[0], other) for other in values[1:])
            assert values[0].isfinite().all()


def test_nan_stops_a_compressed_run() -> None:
    run = Run(local_sgd(2, 1), "int8").train(1)
    with torch.no_grad():
        run.job.workers[0].model.get_parameter("stem.weight")[0, 0, 0, 0] = torch.inf
    with pytest.raises(DivergedError):
        run.job.synchronize()


def test_a_format_without_effect_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    for network, noted in ((single, False), (lambda: single().bfloat16(), True)):
        for wire in ("fp32", "int8", Wire(fragments=2)):
            caplog.clear()
            Job(network, resist(2, 4), wire=wire, example=False)
            assert ("`wire` has no effect" in caplog.text) == (noted and wire != "fp32")


def test_strategies_that_send_gradients_have_no_format() -> None:
    with pytest.raises(UserError, match="leave out `replicate`, `on_nonfinite='drop'` and `wire`"):
        Job(single, ddp(1), wire="int8")
    with pytest.raises(UserError, match="`wire='int7'` is not one of"):
        Job(single, resist(2), wire="int7")
    with pytest.raises(UserError, match=r"is not one of fp32, .*; or give a resist\.Wire"):
        Job(single, resist(2), wire={"shared": "int8"})  # type: ignore[arg-type]


class Rounds:
    """Compressed means of vectors that each worker changes, round after round."""

    def __init__(self, workers: int, numel: int, format: str) -> None:
        self.codec, self.transport = CODECS[format], Local(workers)
        self.random = torch.Generator().manual_seed(workers)
        self.anchor = torch.randn(numel, generator=torch.Generator().manual_seed(workers))
        self.feedback = {worker: Feedback(self.anchor) for worker in range(workers)}

    def round(self, changes: Sequence[Tensor]) -> Tensor:
        numbers = {worker: self.anchor + change for worker, change in enumerate(changes)}
        mean = CompressedMean(
            self.transport, self.codec, numbers, "shared",
            dropped=set(), draws=lambda who: self.random, feedback=self.feedback,
        )  # fmt: skip
        mean.finish()
        assert all(torch.equal(numbers[0], other) for other in numbers.values())
        self.anchor = numbers[0].clone()
        for feedback in self.feedback.values():
            feedback.anchor = self.anchor
        return self.anchor


@given(st.integers(1, 5), st.integers(1, 3000), st.sampled_from(CHOICES["shared"][1:]), st.integers(0, 99))
@settings(max_examples=15)
def test_what_is_lost_is_sent_later(workers: int, numel: int, format: str, seed: int) -> None:
    """The anchor and all errors add up to what was meant; and errors do not grow."""
    rounds, random = Rounds(workers, numel, format), torch.Generator().manual_seed(seed)
    meant, largest, rounded = rounds.anchor.double(), 0.0, 1e-4
    for number in range(6):
        changes = [torch.randn(numel, generator=random) for _ in range(workers)]
        meant += torch.stack(changes).double().mean(0)
        rounds.round(changes)
        errors = [feedback.error for feedback in rounds.feedback.values() if feedback.error is not None]
        pieces = [feedback.piece_error for feedback in rounds.feedback.values() if feedback.piece_error is not None]
        owed = torch.stack(errors).double().mean(0) + torch.cat(pieces).double()
        size = max(float(error.abs().max()) for error in (*errors, *(p for p in pieces if p.numel())))
        rounded += 2 * 2**-7 * size  # both errors are kept as bf16
        torch.testing.assert_close(rounds.anchor.double() + owed, meant, rtol=0, atol=rounded)
        largest = size if number < 3 else largest
        assert size <= 3 * max(largest, 0.1)


def test_changes_that_no_code_can_send_at_once_arrive() -> None:
    """A number far below the step of its group is sent when its error has added up."""
    rounds = Rounds(2, 1024, "int4")
    start, change = rounds.anchor.clone(), torch.full((1024,), 0.001)
    change[0] = 1.0
    for _ in range(100):
        rounds.round([change, change])
    moved = (rounds.anchor - start)[1:].mean()
    assert abs(float(moved) - 0.1) < 0.02


def test_changes_far_below_an_error_add_up_to_it() -> None:
    """Rounded to the nearest bf16, an error of 0.05 would not see them."""
    rounds = Rounds(2, 1024, "int4")
    change = torch.full((1024,), 0.05)
    small = torch.arange(1024) % 128 > 0
    change[~small] = 1.0  # one in each group, so that the others are not sent yet
    rounds.round([change, change])
    change[small] = 2e-5
    for _ in range(200):
        rounds.round([change, change])
    error = rounds.feedback[0].error
    assert error is not None
    assert abs(float(error[small].float().mean()) - 0.054) < 2e-4


class Recording(Local):
    """Records the bytes that leave each worker."""

    def __init__(self, workers: int) -> None:
        super().__init__(workers)
        self.sent = 0

    def transfer(self, moves: Sequence[Move]) -> Handle:
        for move in moves:
            assert move.outgoing is not None
            assert move.outgoing.nbytes == move.num_bytes
            self.sent += move.outgoing.nbytes
        return super().transfer(moves)

    def mean(self, tensors: Sequence[Tensor], traffic_kind: str, scale: float = 1.0) -> Handle:
        self.sent += self.num_workers * allreduce_bytes(tensors[0].nbytes, self.num_workers)
        return super().mean(tensors, traffic_kind, scale)

    def scatter(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        self.sent += sum(tensor.nbytes - sizes[worker] for worker, tensor in enumerate(sent))
        return super().scatter(sent, sizes, traffic_kind)

    def gather(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        self.sent += (self.num_workers - 1) * sum(tensor.nbytes for tensor in sent)
        return super().gather(sent, sizes, traffic_kind)


CASES: list[tuple[str, str | Wire]] = [
    *(("average", wire) for wire in ("fp32", "bf16", "int8", "int6", Wire(shared="log4", blocks="int6"))),
    ("resist", "int8"),
    ("reset", "int4"),
    ("outer", "int8"),
    ("local_sgd", "int8"),
    ("diloco", "int4"),
    ("centered", "int4"),
]
MAKE = {"outer": sgd, "centered": lambda model: torch.optim.RMSprop(model.parameters(), lr=0.003, centered=True)}


@pytest.mark.parametrize(("name", "wire"), CASES, ids=str)
def test_bytes_are_those_of_the_formula(name: str, wire: str | Wire) -> None:
    """Counted = formula = sent."""
    make, transport = MAKE.get(name, adamw), Recording(3)
    run = Run(
        STRATEGIES["average" if name == "centered" else name](1),
        wire,
        make,
        replicate=name == "average",
        transport=transport,
    ).follow()
    sizes = sizes_of(build_on_meta(single), run.job.chains)
    held = [run.job.plan.capacities(worker) for worker in range(3)]
    meter = StateMeter(lambda parameters: make(nn.ParameterList(parameters)))
    state = meter.sizes(build_on_meta(single), run.job.chains, held)
    for number in range(2):
        run.job.transport.take()
        transport.sent = 0
        run.train(1)
        expected = round_traffic(
            sizes, run.job.plan_of(number), run.job.plan_of(number + 1),
            strategy=run.job.strategy, state=state, average=True, replicate=name == "average", wire=run.job.wire,
        )  # fmt: skip
        assert +run.job.transport.bytes == +Counter(expected.bytes)
        assert run.job.transport.bytes.total() == transport.sent


def test_a_run_is_compared_with_local_sgd_in_the_same_format() -> None:
    for wire in ("fp32", "int8"):
        run = Run(local_sgd(3, 1), wire)
        run.job.transport.take()
        run.train(1)
        assert abs(run.job.transport.bytes["shared"] - weights_of(run.job, run.job.plan)["local_sgd_bytes"]) < 3


@pytest.mark.parametrize("name", ["average", "switch"])
@pytest.mark.parametrize("at", [1, 3])
def test_a_loaded_job_goes_on_bit_for_bit(name: str, at: int) -> None:
    run, other = Run(STRATEGIES[name](1), "int4").train(at), Run(STRATEGIES[name](1), "int4")
    other.job.load_state_dict(run.job.state_dict())
    for one in (run, other):
        one.train(2)
    assert all(torch.equal(*pair) for pair in zip(tensors_of(run), tensors_of(other), strict=True))


def test_errors_of_another_format_or_number_of_workers_are_left() -> None:
    state = Run(resist(3, 1), "int4").train(2).job.state_dict()
    for workers, wire in ((3, "int8"), (2, "int4"), (3, "fp32")):
        run = Run(resist(workers, 1), wire).train(1)
        run.job.load_state_dict(state)
        assert all(fragment.feedback.error is None for worker in run.job.workers for fragment in worker.fragments)
        run.train(1)
