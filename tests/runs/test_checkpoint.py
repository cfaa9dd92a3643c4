"""Checkpoints: a job that is put back goes on as if nothing had happened; damage is named; nothing runs code."""

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from pool import Pool
from resist.errors import UserError
from resist.job import Job
from resist.planning.strategy import OuterSGD, Strategy, diloco, local_sgd, resist, switch
from resist.runs.checkpoint import KEEP, Checkpoints, SafeReader, about, complete, newest, restore
from support import adamw, make, sgd, train, weights

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
    return [t for worker in job.workers for t in (worker.subnet.flat, *(v for _, v in sorted(worker.state.items())))]


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
    restore(again, tuple(others), complete(folder)[0], same_workers=True)
    train(again, others, 2 * STEPS)
    return all(torch.equal(a, b) for a, b in zip(everything(job), everything(again), strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("at", [1, 3])  # in the warm-up and behind it
def test_a_restored_job_goes_on_bit_for_bit(case: str, at: int, tmp_path: Path) -> None:
    assert continued(case, at, tmp_path)


def test_adams_step_counts_come_back(tmp_path: Path) -> None:
    assert continued("travel", 3, tmp_path, "adamw")


@pytest.mark.slow
def test_processes_save_their_own_part(pool: Pool, tmp_path: Path) -> None:
    assert all(pool.run(2, continued, "travel", 3, tmp_path))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_another_number_of_workers_takes_over_the_weights(workers: int, tmp_path: Path) -> None:
    job, optimizers = make(CASES["travel"]())
    train(job, optimizers, 3 * STEPS)
    saved(job, optimizers, tmp_path).finish()
    again, others = make(resist(workers, STEPS, min_depth=0), resume_at=(3, 4))
    restore(again, tuple(others), complete(tmp_path)[0], same_workers=False)
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
    assert about(found[0])["round"] == 3
    for file in sorted(found[0].iterdir()):
        content = file.read_bytes()
        for wrong in (b"", content[: len(content) // 2], content[:-1] + bytes([content[-1] ^ 1])):
            file.write_bytes(wrong)
            path, skipped = newest(tmp_path)
            assert path == found[1], file
            assert len(skipped) == 1
            assert "\n" not in skipped[0]
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
    (tmp_path / "round-000001").rename(tmp_path / ".round-000001.partial")
    assert newest(tmp_path) == (None, [])
    saved(job, optimizers, tmp_path).finish()  # goes over what is left of it
    assert [p.name for p in tmp_path.iterdir()] == ["round-000001"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    job, optimizers = make(CASES["reset"]())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written") as caught:
        saved(job, optimizers, tmp_path / "file").finish()
    assert "\n" not in str(caught.value)


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('this ran')",)


def test_an_index_cannot_run_code(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(pickle.UnpicklingError, match=r"names builtins\.exec"):
        SafeReader(tmp_path).read_metadata()
    job, optimizers = make(CASES["reset"]())
    with pytest.raises(UserError, match=r"names builtins\.exec"):
        restore(job, tuple(optimizers), tmp_path, same_workers=True)


def test_anchors_are_those_of_the_restored_weights(tmp_path: Path) -> None:
    job, optimizers = make(CASES["outer"]())
    train(job, optimizers, STEPS)
    saved(job, optimizers, tmp_path).finish()
    again, others = make(CASES["outer"](), resume_at=(1, STEPS))
    restore(again, tuple(others), complete(tmp_path)[0], same_workers=True)
    assert all(torch.equal(worker.anchor, worker.subnet.flat) for worker in again.workers)
