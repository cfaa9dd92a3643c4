"""Replicas of every block: the network is complete without any one worker, whenever that one is lost.
And workers with nonfinite numbers: found before they are averaged, or left out of the means."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from pool import Pool
from resist.errors import DivergedError, UserError, WorkerLostError
from resist.job import Job
from resist.planning.plan import RoundPlan, partition
from resist.planning.schedule import schedule
from resist.planning.strategy import OuterSGD, Strategy, ddp, local_sgd, resist, switch
from resist.runs.replicas import (
    REPLICAS,
    newest_replicas,
    remove_replicas,
    restore_replicas,
    write_diverged,
    write_replicas,
)
from resist.runs.tensor_file import read_description, write_tensors
from resist.sync.averaging import all_finite
from resist.sync.distributed import Distributed
from resist.sync.transport import Handle
from support import local_step, make, train, weights

pytestmark = pytest.mark.slow


@given(st.data())
def test_every_block_lies_with_two_workers_after_any_synchronization(data: st.DataObject) -> None:
    workers = data.draw(st.integers(2, 5))
    blocks = data.draw(st.integers(workers, 12))
    own = -(-blocks // workers)
    capacities = [data.draw(st.integers(own, blocks)) for _ in range(workers)]
    now, then = (partition(blocks, capacities, seed=0, round=data.draw(st.integers(0, 50))) for _ in range(2))
    made = schedule(RoundPlan((now,)), RoundPlan((then,)), [10], replicate=True)
    sent = {message.block: message for message in made.replicas}
    where = {block: set(then.holders(block)) for block in range(blocks)}
    for (_, block), keeper in made.keepers.items():
        if block in sent:
            assert (sent[block].source, sent[block].target) == (made.owners[0, block], keeper)
        else:
            assert keeper in now.holders(block)  # no message is needed
        where[block].add(keeper)
    assert all(len(found) >= 2 for found in where.values())
    assert len(made.keepers) == sum(len(then.holders(b)) == 1 for b in range(blocks))
    assert sent.keys() <= {block for _, block in made.keepers}


STRATEGIES = {
    "alone": lambda: resist(3, 2, min_depth=0),
    "shared": lambda: resist(3, 2, capacities=(4, 3, 2)),
    "local_sgd": lambda: local_sgd(3, 2),
    "warm-up": lambda: switch(local_sgd(3, 2), resist(3, 2, min_depth=0), at_round=2),
    "outer": lambda: resist(3, 2, min_depth=0, outer=OuterSGD()),
}


class Dying(Distributed):
    """A transport whose process kills itself: before call number `fatal` in `round`, counting the wait for a handle."""

    def arm(self, job: Job, round: int, fatal: int) -> None:
        self.job, self.round, self.fatal, self.calls = job, round, fatal, 0

    def count(self) -> None:
        if hasattr(self, "job") and self.job.round >= self.round:
            if self.calls == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            self.calls += 1

    def all_gather_text(self, text: str) -> list[str]:
        self.count()
        return super().all_gather_text(text)

    def transfer(self, moves: Any) -> Handle:
        self.count()
        return Waiting(self, super().transfer(moves))

    def mean(self, tensors: Any, traffic_kind: str, scale: float = 1.0) -> Handle:
        self.count()
        return Waiting(self, super().mean(tensors, traffic_kind, scale))


class Waiting:
    def __init__(self, owner: Dying, handle: Handle) -> None:
        self.owner, self.handle = owner, handle

    def finish(self) -> list[Tensor | None]:
        self.owner.count()
        return self.handle.finish()


Copies = list[tuple[int, int, dict[str, Tensor]]]


def run_safely(name: str, victim: int | None, fatal: int) -> list[Copies]:
    """The replicas after every round, or, where another process is lost, those that remained then."""
    transport = Dying(3, timeout_s=20)
    job, optimizers = make(STRATEGIES[name](), replicate=True, transport=transport)
    if transport.rank == victim:
        transport.arm(job, 2, fatal)
    history: list[Copies] = []
    try:
        for _ in range(4 * 2):
            local_step(job, optimizers)
            if job.step(*optimizers):
                history.append([(one.round, one.step, clones(one.tensors)) for one in job.replicas])
    except WorkerLostError:
        history.append([(one.round, one.step, clones(one.tensors)) for one in job.replicas])
    job.close()
    dist.destroy_process_group()  # of the pool, which would wait for the lost process
    return history


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def union(parts: list[Copies], round: int) -> dict[str, Tensor]:
    """All that several processes have of a round; what two of them have is the same."""
    found: dict[str, Tensor] = {}
    for copies in parts:
        for tensors in (tensors for done, _, tensors in copies if done == round):
            for name, tensor in tensors.items():
                assert torch.equal(found.setdefault(name, tensor), tensor)
    return found


CALLS = 8  # agreement, mean, two batches of blocks, the waits for these three, the confirmation


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("alone", (0, 4, CALLS)),
        pytest.param("alone", (1, 2, 3, 5, 6, 7), marks=pytest.mark.nightly),
        *(pytest.param(name, (0, 3, CALLS - 1), marks=pytest.mark.nightly) for name in STRATEGIES if name != "alone"),
    ],
)
def test_the_network_outlives_a_process_that_is_killed_in_any_phase(
    pool: Pool, name: str, phases: tuple[int, ...]
) -> None:
    """One process kills itself before each thing that it does in the round after the second synchronization: the
    others' copies are the whole network as it was synchronized last, bit for bit."""
    undisturbed = pool.run(3, run_safely, name, None, 0)
    truth = {round: union([history[round - 1] for history in undisturbed], round) for round in range(1, 5)}
    everything = set(truth[1])
    for fatal in phases:
        outcomes = pool.outcomes(3, run_safely, name, fatal % 3, fatal)
        assert outcomes[fatal % 3].error == ""
        left = [outcome.value[-1] for outcome in outcomes if outcome.error is None]
        assert len(left) == 2
        complete = [round for round in (2, 3) if set(union(left, round)) == everything]
        assert complete, f"killed before call {fatal}"
        newest = max(complete)
        assert newest == {0: 2, CALLS: 3}.get(fatal, newest)
        assert all(torch.equal(truth[newest][key], value) for key, value in union(left, newest).items())


def test_replicas_on_disk(tmp_path: Path) -> None:
    """They are read where they are complete, and only then; a damaged file counts as missing, and is named."""
    job, optimizers = make(resist(2, 2, min_depth=0), replicate=True)
    train(job, optimizers, 4)
    expected = weights(job)
    write_replicas(tmp_path, job, "first attempt")
    found, errors = newest_replicas(tmp_path)
    assert found is not None
    assert errors == []
    assert (found["round"], found["step"], found["workers"]) == (2, 4, 2)

    again, _ = make(resist(2, 2, min_depth=0), replicate=True, resume_at=(2, 4))
    restore_replicas(again, tmp_path, found)
    assert all(torch.equal(expected[name], value) for name, value in weights(again).items())
    other, _ = make(resist(3, 2, min_depth=0), resume_at=(2, 4))
    restore_replicas(other, tmp_path, found)
    assert all(torch.equal(expected[name], value) for name, value in weights(other).items())
    with pytest.raises(UserError, match="has the tensor"):
        restore_replicas(other, tmp_path, {**found, "round": 3})
    with pytest.raises(UserError, match="has the tensor"):
        restore_replicas(other, tmp_path, {**found, "attempt": "another"})

    file = tmp_path / "round-000002" / "process-0.safetensors"
    assert list(file.parent.iterdir()) == [file]
    whole = file.read_bytes()
    half = len(whole) // 2
    for damaged in (b"", whole[:half], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"\x08" + whole[1:]):
        file.write_bytes(damaged)
        found, errors = newest_replicas(tmp_path)
        assert found is None
        assert len(errors) == 1
        assert str(errors[0]).startswith(f"{file} is damaged: ")
        assert "\n" not in str(errors[0])
    file.write_bytes(whole)
    remove_replicas(tmp_path, 1)
    assert newest_replicas(tmp_path)[0]
    remove_replicas(tmp_path, 2)
    assert newest_replicas(tmp_path) == (None, [])


def test_files_of_two_attempts_are_not_combined(tmp_path: Path) -> None:
    """Half of the network from one start of a run and half from another: the same round, other weights."""
    for attempt in range(2):
        job, optimizers = make(resist(2, 2, min_depth=0), replicate=True, seed=attempt)
        train(job, optimizers, 2)
        write_replicas(tmp_path, job, f"attempt {attempt}")
        folder = tmp_path / "round-000001"
        tensors = dict(sorted(load_file(folder / "process-0.safetensors").items()))
        metadata = read_description(folder / "process-0.safetensors", REPLICAS).metadata
        half = list(tensors)[attempt::2]
        write_tensors(folder / f"process-{attempt + 1}.safetensors", {n: tensors[n] for n in half}, REPLICAS, metadata)
        (folder / "process-0.safetensors").unlink()
    assert newest_replicas(tmp_path) == (None, [])


def test_replicas_of_an_earlier_version_are_named(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "round-000012.worker-1.safetensors", {"format": "resist safe copy 1"})
    found, errors = newest_replicas(tmp_path)
    assert found is None
    assert len(errors) == 1
    assert "has the format 'resist safe copy 1', not 'resist replicas 2'" in str(errors[0])


def test_diverged_weights_are_kept_for_each_worker(tmp_path: Path) -> None:
    job, _ = make(resist(2, 2, min_depth=0))
    poison(job, 1)
    write_diverged(tmp_path, job)
    tensors = load_file(tmp_path / "round-000001" / "process-0.safetensors")
    for worker in job.workers:
        for name, view in worker.subnet.state(job.plan.held(worker.index)).items():
            assert torch.equal(tensors.pop(f"workers.{worker.index}.weights.{name}").nan_to_num(), view.nan_to_num())
    assert not tensors


def poison(job: Job, worker: int) -> None:
    with torch.no_grad():
        job.workers[worker].model.get_parameter("layer1.0.conv1.weight").view(-1)[7] = torch.nan


def test_bad_weights_stop_the_run_before_anything_is_folded() -> None:
    job, optimizers = make(resist(3, 2))
    train(job, optimizers, 3)
    local_step(job, optimizers)
    poison(job, 1)
    before = [worker.subnet.flat.clone() for worker in job.workers]
    expected = r"worker 1 has weights that are not finite \(layer1.0.conv1.weight\) at the end of round 2 \(step 4\)"
    with pytest.raises(DivergedError, match=expected):
        job.step(*optimizers)
    assert all(torch.equal(w.subnet.flat, b) or w.index == 1 for w, b in zip(job.workers, before, strict=True))
    assert job.round == 1


@pytest.mark.parametrize("policy", ["reset", "keep", "travel", "average"])
@pytest.mark.parametrize("capacities", [(2, 2, 2), (4, 3, 2), (6, 6, 6)])
def test_a_dropped_worker_counts_for_nothing(policy: str, capacities: tuple[int, ...]) -> None:
    """Every weight is the mean over its other holders; blocks that only it held are as the round began."""
    strategy: Strategy = resist(3, 2, capacities=capacities, optimizer_state=policy)
    job, optimizers = make(strategy, on_nonfinite="drop")
    train(job, optimizers, 2)
    begun, plan = weights(job), job.plan
    local_step(job, optimizers)
    job.step(*optimizers)
    local_step(job, optimizers)
    states = [dict(worker.subnet.state(job.plan.held(worker.index))) for worker in job.workers]
    expected: dict[str, Tensor] = {}
    for name, value in begun.items():
        good = [state[name].clone() for state in (states[0], states[2]) if name in state]
        expected[name] = torch.stack(good).mean(0) if good else value
    poison(job, 1)
    job.step(*optimizers, nonfinite={1: "a loss of nan in step 4"})
    assert list(job.dropped) == [1]
    found = weights(job)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)
    only = [key for key in plan.keys if plan.holders(*key) == (1,)]
    assert bool(only) == (capacities != (6, 6, 6))
    train(job, optimizers, 4)
    assert not job.dropped
    assert all_finite(*(worker.subnet.flat for worker in job.workers))
    for optimizer in optimizers:
        for state in optimizer.state.values():
            assert all_finite(state["momentum_buffer"])


def test_a_round_without_a_finite_worker_stops_the_run() -> None:
    job, optimizers = make(resist(2, 1), on_nonfinite="drop")
    local_step(job, optimizers)
    with pytest.raises(DivergedError, match="worker 0 has a loss of inf"):
        job.step(*optimizers, nonfinite={0: "a loss of inf in step 1", 1: "a loss of nan in step 1"})


def test_what_cannot_be_kept_safe_is_refused() -> None:
    with pytest.raises(UserError, match="second worker"):
        make(resist(1, 2), replicate=True)
    with pytest.raises(UserError, match="ddp averages"):
        make(ddp(1), on_nonfinite="drop")
    with pytest.raises(UserError, match="`on_nonfinite='ignore'` is not one of stop, drop"):
        make(resist(2, 2), on_nonfinite="ignore")
