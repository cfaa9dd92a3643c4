"""Checkpoints: a restored job goes on as if nothing had happened; damage is named; no process waits for a lost one."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from pool import Pool
from resist.errors import AgreedError, UserError, WorkerLostError
from resist.job import Job
from resist.planning.strategy import OuterSGD, Strategy, diloco, local_sgd, resist, switch
from resist.runs import checkpoint
from resist.runs.checkpoint import KEEP, Checkpoints
from resist.runs.restore import restore
from resist.runs.saved import FORMAT, complete, newest, verify
from resist.runs.tensor_file import FormatError, read_description, read_tensors, write_tensors
from resist.sync.distributed import Distributed
from resist.sync.local import Local
from support import adamw, make, sgd, train, weights

pytestmark = pytest.mark.slow

STEPS = 2  # in a round


def warmed_up(policy: str) -> Strategy:
    parts = resist(3, STEPS, min_depth=0, optimizer_state=policy)
    return switch(local_sgd(3, STEPS, optimizer_state=policy), parts, at_round=2)


CASES: dict[str, Callable[[], Strategy]] = {
    **{policy: lambda policy=policy: warmed_up(policy) for policy in ("reset", "keep", "travel", "average")},
    "outer": lambda: resist(3, STEPS, min_depth=3, outer=OuterSGD()),
    "diloco": lambda: diloco(3, STEPS),
}


def everything(job: Job) -> list[Tensor]:
    """All that a job keeps for its workers."""
    states = {worker.index: [t for _, v in sorted(worker.state.items()) for t in v.values()] for worker in job.workers}
    return [t for worker in job.workers for t in (worker.subnet.flat, *states[worker.index])]


def saved(job: Job, optimizers: Sequence[Optimizer], folder: Path) -> Checkpoints:
    checkpoints = Checkpoints(folder, job.transport)
    checkpoints.begin(job, tuple(optimizers), {})
    return checkpoints


def continued(case: str, at: int, folder: Path, optimizer: str = "sgd") -> bool:
    """Whether a job saved after `at` rounds and put back is, two rounds later, where the undisturbed one is."""
    kind = {"sgd": sgd, "adamw": adamw}[optimizer]
    job, optimizers = make(CASES[case](), kind)
    train(job, optimizers, at * STEPS)
    checkpoints = saved(job, optimizers, folder)
    train(job, optimizers, 2 * STEPS)  # while it is being written
    checkpoints.finish()
    job.transport.all_gather_text("")  # the first process is done with renaming when it comes here
    again, others = make(CASES[case](), kind, resume_at=(at, at * STEPS))
    restore(again, tuple(others), complete(folder)[0])
    train(again, others, 2 * STEPS)
    return all(torch.equal(a, b) for a, b in zip(everything(job), everything(again), strict=True))


@pytest.mark.parametrize(
    ("case", "at"),
    [
        pytest.param(case, at, marks=() if at == 3 or case in ("travel", "outer") else pytest.mark.nightly)
        for at in (1, 3)  # in the warm-up and behind it
        for case in CASES
    ],
)
def test_a_restored_job_goes_on_bit_for_bit(case: str, at: int, tmp_path: Path) -> None:
    assert continued(case, at, tmp_path)


def test_adams_step_counts_come_back(tmp_path: Path) -> None:
    assert continued("travel", 3, tmp_path, "adamw")


def test_processes_save_their_own_part(pool: Pool, tmp_path: Path) -> None:
    assert all(pool.run(2, continued, "travel", 3, tmp_path))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_another_number_of_workers_takes_over_the_weights(workers: int, tmp_path: Path) -> None:
    job, optimizers = make(CASES["travel"]())
    train(job, optimizers, 3 * STEPS)
    saved(job, optimizers, tmp_path).finish()
    again, others = make(resist(workers, STEPS, min_depth=0), resume_at=(3, 4))
    restore(again, tuple(others), complete(tmp_path)[0])
    before, after = weights(job), weights(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    train(again, others, STEPS)


def test_the_newest_stay_and_damage_is_named_skipped_and_kept(tmp_path: Path) -> None:
    job, optimizers = make(CASES["travel"]())
    for _ in range(KEEP + 1):
        train(job, optimizers, STEPS)
        saved(job, optimizers, tmp_path).finish()
    found = complete(tmp_path)
    assert [path.name for path in found] == ["round-000003", "round-000002"]
    assert verify(found[0])["round"] == 3
    for file in sorted(found[0].iterdir()):
        content = file.read_bytes()
        for wrong in (b"", content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
            file.write_bytes(wrong)
            path, skipped = newest(tmp_path)
            assert path == found[1], file
            assert len(skipped) == 1
            assert "\n" not in str(skipped[0])
        file.write_bytes(content)
    assert newest(tmp_path) == (found[0], [])
    (found[0] / "job.json").write_bytes(b"")
    saved(job, optimizers, tmp_path).finish()  # the same round again, over a damaged one
    assert newest(tmp_path)[0] == found[0]
    assert (tmp_path / "damaged-1-round-000003").is_dir()
    (found[1] / "job.json").write_bytes(b"")
    train(job, optimizers, STEPS)
    saved(job, optimizers, tmp_path).finish()
    assert [path.name for path in complete(tmp_path)] == ["round-000004", "round-000003", "round-000002"]


def test_what_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    job, optimizers = make(CASES["reset"]())
    train(job, optimizers, STEPS)
    saved(job, optimizers, tmp_path).finish()
    (tmp_path / "round-000001").rename(tmp_path / ".round-000001-89abcdef.partial")
    assert newest(tmp_path) == (None, [])
    saved(job, optimizers, tmp_path).finish()  # goes over what is left of it
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    job, optimizers = make(CASES["reset"]())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written") as caught:
        saved(job, optimizers, tmp_path / "file").finish()
    assert "\n" not in str(caught.value)


def test_checkpoints_of_an_earlier_version_are_named(tmp_path: Path) -> None:
    """Their job.json had the same entries; their tensors were in a format of torch."""
    path = tmp_path / "round-000040"
    path.mkdir()
    (path / "job.json").write_text(json.dumps({"format": "resist checkpoint 2", "round": 40}))
    (path / ".metadata").write_bytes(b"a pickle")
    expected = r"round-000040 has the format 'resist checkpoint 2', not 'resist checkpoint 4'; train again, or use the"
    with pytest.raises(FormatError, match=expected):
        verify(path)
    found, errors = newest(tmp_path)
    assert found is None
    assert isinstance(errors[0], FormatError)


def test_another_network_is_refused_and_the_job_stays_as_it_was(tmp_path: Path) -> None:
    job, optimizers = make(CASES["outer"]())
    train(job, optimizers, STEPS)
    saved(job, optimizers, tmp_path).finish()
    path = complete(tmp_path)[0]
    file = path / "process-0.safetensors"
    whole, metadata = read_tensors(file, FORMAT), read_description(file, FORMAT).metadata
    for name in ("head.weight", "outer velocity/head.weight"):
        assert name in whole
        write_tensors(file, {**whole, name: torch.zeros(2, 3)}, FORMAT, metadata)
        again, others = make(CASES["outer"](), resume_at=(1, STEPS))
        before = [tensor.clone() for tensor in everything(again)]
        with pytest.raises(UserError, match=r"belongs to another network"):
            restore(again, tuple(others), path)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(again), strict=True))


def test_a_parameter_whose_name_ends_as_another_gets_its_own_state_only(tmp_path: Path) -> None:
    """`conv1.weight` of the network is not `layer3.5.conv1.weight`."""
    job, optimizers = make(CASES["travel"]())
    train(job, optimizers, 3 * STEPS)
    saved(job, optimizers, tmp_path).finish()
    again, others = make(CASES["travel"](), resume_at=(3, 3 * STEPS))
    restore(again, tuple(others), complete(tmp_path)[0])
    for optimizer in others:
        assert all(set(state) == {"momentum_buffer"} for state in optimizer.state.values())


def test_state_of_any_type_comes_back(tmp_path: Path) -> None:
    values = {
        "half": torch.randn(3).bfloat16(), "flags": torch.tensor([True, False]), "steps": torch.tensor(7),
        "complex": torch.randn(2, dtype=torch.complex64), "bytes": torch.arange(5, dtype=torch.uint8),
        "nothing": torch.zeros(0, 3), "transposed": torch.randn(3, 4).T,
    }  # fmt: skip
    job, optimizers = make(CASES["reset"]())
    parameters = list(job.workers[1].model.parameters())
    train(job, optimizers, STEPS)
    optimizers[1].state[parameters[0]] |= values
    saved(job, optimizers, tmp_path).finish()
    again, others = make(CASES["reset"](), resume_at=(1, STEPS))
    restore(again, tuple(others), complete(tmp_path)[0])
    found = others[1].state[next(again.workers[1].model.parameters())]
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_what_an_earlier_attempt_left_does_no_harm(tmp_path: Path) -> None:
    """Its folder goes; a process of it that still writes finds no folder, and never one of this attempt."""
    job, optimizers = make(CASES["reset"]())
    train(job, optimizers, STEPS)
    left = tmp_path / ".round-000001-01234567.partial"
    left.mkdir()
    write_tensors(left / "process-0.safetensors", {"conv1.weight": torch.zeros(1)}, FORMAT, {})
    saved(job, optimizers, tmp_path).finish()
    assert newest(tmp_path) == (tmp_path / "round-000001", [])
    assert [path.name for path in tmp_path.iterdir()] == ["round-000001"]
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_tensors(left / "process-1.safetensors", {"conv1.weight": torch.zeros(1)}, FORMAT, {})


class Silent(Local):
    """The transport of one of two processes; the other answers, and never writes its file."""

    num_processes = 2

    def all_gather_text(self, text: str) -> list[str]:
        return [text, text]


def test_a_process_that_never_writes_its_file_ends_the_wait(tmp_path: Path) -> None:
    job, optimizers = make(CASES["reset"]())
    train(job, optimizers, STEPS)
    checkpoints = Checkpoints(tmp_path, Silent(3), timeout_s=0.3)
    checkpoints.begin(job, tuple(optimizers), {})
    with pytest.raises(AgreedError, match="process 0 does not see the file of process 1; make room"):
        checkpoints.finish()
    assert list(tmp_path.iterdir()) == []
    checkpoints.finish()  # nothing is open any more


def test_a_checkpoint_is_abandoned_at_once_where_another_process_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resist.runs.checkpoint.ABANDON_S", 0.2)
    threads = threading.active_count()
    job, optimizers = make(CASES["reset"]())
    train(job, optimizers, STEPS)
    checkpoints = Checkpoints(tmp_path, Silent(3), timeout_s=600)
    checkpoints.begin(job, tuple(optimizers), {})
    begin = time.monotonic()
    checkpoints.abandon()
    assert time.monotonic() - begin < 10
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() <= threads


def fail_in_one(folder: Path, failing: int) -> str:
    """One process of two cannot write its file: all end with that line, long before the timeout."""
    job, optimizers = make(CASES["reset"](), transport=Distributed(3))
    train(job, optimizers, STEPS)
    checkpoints = Checkpoints(folder, job.transport, timeout_s=600)
    if job.transport.process_of(job.workers[0].index) == failing:
        checkpoint.write_tensors = broken_disk
    elif failing == 0:
        checkpoint.write_tensors = late
    try:
        checkpoints.begin(job, tuple(optimizers), {})
        train(job, optimizers, STEPS)
        checkpoints.begin(job, tuple(optimizers), {})
    except AgreedError as error:
        return str(error)
    finally:
        checkpoint.write_tensors = write_tensors
    return "no error"


def late(path: Path, *content: Any) -> None:
    """Write when process 0 has looked for what to remove, and before it has removed the folder."""
    time.sleep(0.5)
    path.parent.mkdir(exist_ok=True)
    write_tensors(path, *content)


def broken_disk(path: Path, *_: object) -> None:
    raise UserError(f"{path} cannot be written") from OSError(28, "No space left on device")


@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_cannot_write_ends_all_with_one_line(pool: Pool, failing: int, tmp_path: Path) -> None:
    texts = pool.run(2, fail_in_one, tmp_path, failing)
    assert texts[0] == texts[1]
    assert "could not be written: No space left on device; make room there" in texts[0]
    assert list(tmp_path.iterdir()) == []


def die_while_saving(folder: Path) -> bool:
    """Process 1 of two dies with its file half written: process 0 keeps the older checkpoint only."""
    job, optimizers = make(CASES["reset"](), transport=Distributed(3, timeout_s=20))
    process = job.transport.process_of(job.workers[0].index)
    checkpoints = Checkpoints(folder, job.transport, timeout_s=600)
    train(job, optimizers, STEPS)
    checkpoints.begin(job, tuple(optimizers), {})
    train(job, optimizers, STEPS)
    checkpoints.finish()
    if process == 1:
        checkpoint.write_tensors = die
    checkpoints.begin(job, tuple(optimizers), {})
    try:
        checkpoints.finish()
    except WorkerLostError:
        checkpoints.abandon()
    job.close()
    dist.destroy_process_group()  # of the pool, which would wait for the lost process
    return [path.name for path in folder.iterdir()] == ["round-000001"]


def die(path: Path, *_: object) -> None:
    path.with_name(f".{path.name}.partial").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_dies_while_it_saves_costs_that_checkpoint_only(pool: Pool, tmp_path: Path) -> None:
    outcomes = pool.outcomes(2, die_while_saving, tmp_path)
    assert outcomes[0].error is None, outcomes[0].error
    assert outcomes[0].value
    assert outcomes[1].error == ""


def test_anchors_are_those_of_the_restored_weights(tmp_path: Path) -> None:
    job, optimizers = make(CASES["outer"]())
    train(job, optimizers, STEPS)
    saved(job, optimizers, tmp_path).finish()
    again, others = make(CASES["outer"](), resume_at=(1, STEPS))
    restore(again, tuple(others), complete(tmp_path)[0])
    assert all(torch.equal(worker.anchor[worker.subnet.flat.dtype], worker.subnet.flat) for worker in again.workers)
