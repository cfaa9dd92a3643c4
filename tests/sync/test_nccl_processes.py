"""Jobs of several processes on a stand-in for NCCL: gloo, whose errors are withheld as NCCL withholds them."""

import os
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pool import Pool
from resist.errors import WorkerLostError
from resist.planning.strategy import Strategy, resist
from resist.sync import distributed, groups, liveness, nccl
from support import local_step, make, train, weights

pytestmark = pytest.mark.slow


class Withheld:
    """An operation of gloo that never ends if it fails."""

    def __init__(self, work: Any) -> None:
        self._work, self._done = work, threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._work.wait()
        except RuntimeError:
            return
        self._done.set()

    def is_completed(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        assert self.is_completed()


class StandIn:
    """torch.distributed, with groups of gloo for those of NCCL."""

    def __init__(self) -> None:
        self.of_nccl: list[Any] = []
        self.aborted: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def new_group(self, *, timeout: Any, backend: str) -> Any:
        group = dist.new_group(timeout=timeout, backend="gloo")
        self.of_nccl += [group] * (backend == "nccl")
        return group

    def all_reduce(self, tensor: torch.Tensor, group: Any, async_op: bool = False) -> Any:
        work = dist.all_reduce(tensor, group=group, async_op=async_op)
        return Withheld(work) if async_op and group in self.of_nccl else work

    def batch_isend_irecv(self, operations: list[Any]) -> list[Any]:
        return [Withheld(work) for work in dist.batch_isend_irecv(operations)]


def end_in_an_exchange() -> tuple[bool, str, float, list[int], bool]:
    """Train as on gloo, and lose process 1 between the begin of an exchange and its end."""
    rank = dist.get_rank()
    strategy = resist(2, 2, min_depth=3)
    job, optimizers = make(strategy, replicate=True)
    train(job, optimizers, 6)
    expected = weights(job) if rank == 0 else job.full_model()
    job.close()
    with pytest.MonkeyPatch.context() as patch:
        return equal_and_lost(patch, strategy, expected)


def equal_and_lost(
    patch: pytest.MonkeyPatch, strategy: Strategy, expected: Any
) -> tuple[bool, str, float, list[int], bool]:
    rank, stand_in = dist.get_rank(), StandIn()
    for module in (distributed, groups):
        patch.setattr(module, "dist", stand_in)
    patch.setattr(distributed, "agree_on_backend", lambda *_: "nccl")
    patch.setattr(groups, "abort_group", stand_in.aborted.append)
    for module in (liveness, nccl):
        patch.setattr(module, "LOOK_S", 0.2)
    patch.setattr(liveness, "POLL_S", 0.05)
    job, optimizers = make(strategy, replicate=True, timeout_s=60.0)
    train(job, optimizers, 6)
    actual: Any = weights(job) if rank == 0 else job.full_model()
    equal = rank == 1 or all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    for _ in range(2):
        local_step(job, optimizers)
        if rank == 1 and job.steps_left == 1:
            patch.setattr(distributed, "PendingMoves", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        start = time.monotonic()
        try:
            job.step(*optimizers)
        except WorkerLostError as error:
            seconds, aborted = time.monotonic() - start, stand_in.aborted == stand_in.of_nccl
            job.close()
            dist.destroy_process_group()
            return equal, str(error), seconds, [replica.round for replica in job.replicas], aborted
    raise AssertionError("the loss of a worker went unnoticed")


def test_a_process_that_is_lost_in_an_exchange_is_named_and_replicas_are_kept(pool: Pool) -> None:
    survivor, lost = pool.outcomes(2, end_in_an_exchange)
    assert lost.error == ""
    assert survivor.error is None, survivor.error
    equal, text, seconds, replicas, aborted = survivor.value
    assert equal, "weights as on gloo"
    assert "lost contact while exchanging blocks: a process shows no life any more" in text
    assert text.endswith("no answer from process 1 (worker 1)")
    assert seconds < 20
    assert replicas == [3]
    assert aborted
