"""Real processes: one is killed at a point of an exchange, another joins, and the group is made again."""

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pool import Pool
from resist.errors import WorkerLostError
from resist.job import Job
from resist.planning.strategy import resist
from resist.planning.wire import Wire, as_wire
from resist.sync import distributed, pending
from resist.sync.distributed import Distributed
from resist.sync.local import Unconnected
from support import floats, make, train

pytestmark = pytest.mark.nightly
VICTIM, NEWCOMER, PROCESSES, STEPS, LIMIT_S = 1, 3, 4, 2, 40.0
STREAMED = Wire(**as_wire("int4").formats, fragments=1, delay=1)
POINTS: dict[str, tuple[Any, str]] = {
    "before the exchange": (Job, "synchronize"),
    "agreeing": (distributed.Distributed, "all_gather_text"),
    "the shared part": (distributed.Distributed, "mean"),
    "sending blocks": (distributed.Distributed, "transfer"),
    "awaiting blocks": (pending.PendingMoves, "finish"),
    "awaiting the shared part": (pending.PendingMean, "finish"),
}


def group(folder: str, generation: int, members: list[int], rank: int) -> Distributed:
    """Join the processes of a generation, by a store of their own."""
    if dist.is_initialized():
        dist.destroy_process_group()
    store = f"file://{Path(folder) / str(generation)}"
    limit = timedelta(seconds=LIMIT_S)
    dist.init_process_group("gloo", init_method=store, rank=members.index(rank), world_size=len(members), timeout=limit)
    return Distributed(len(members), timeout_s=LIMIT_S)


def die_at(owner: Any, name: str) -> None:
    """Let this process be killed when it comes by."""
    original: Callable[..., Any] = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def go(point: str, wire: Wire, folder: str) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """The result of regrouping, the network of this worker then, and the full network after two more rounds."""
    rank = dist.get_rank()
    strategy = resist(3, STEPS, min_depth=0)
    options: dict[str, Any] = {"replicate": True, "elastic": True, "example": False, "wire": wire}
    if rank == NEWCOMER:
        dist.destroy_process_group()
        job, optimizers = make(strategy, transport=Unconnected(3), **options)
        job.attach(*optimizers)
    else:
        transport = group(folder, 0, [0, 1, 2], rank)
        job, optimizers = make(strategy, transport=transport, **options)
        train(job, optimizers, STEPS + 1)
        if rank == VICTIM:
            die_at(*POINTS[point])
        with pytest.raises(WorkerLostError):
            train(job, optimizers, STEPS)
    job.transport.close()
    members = [0, 2, NEWCOMER]
    found = job.regroup(group(folder, 1, members, rank))
    worker = job.workers[0]
    state = {name: value.clone() for name, value in worker.subnet.state(worker.subnet.held).items()}
    train(job, optimizers, 2 * STEPS)
    full = job.full_model(on=None)
    assert full is not None
    return found, state, floats(full)


@pytest.mark.parametrize("wire", [Wire(), STREAMED], ids=["fp32", "int4 in fragments"])
@pytest.mark.parametrize("point", POINTS)
def test_one_is_killed_and_another_joins(pool: Pool, tmp_path: Path, point: str, wire: Wire) -> None:
    outcomes = pool.outcomes(PROCESSES, go, point, wire, str(tmp_path))
    assert [outcome.error for outcome in outcomes].count(None) == 3, [outcome.error for outcome in outcomes]
    assert outcomes[VICTIM].error == ""
    results, states, full = zip(*(outcomes[rank].value for rank in (0, 2, NEWCOMER)), strict=True)
    assert results[0] == results[1] == results[2]
    assert (results[0].workers, results[0].lost, results[0].generation) == (3, (VICTIM,), 1)
    assert NEWCOMER - 1 in results[0].joined
    network: dict[str, Tensor] = {}
    for state in states:
        for name, value in state.items():
            assert torch.equal(network.setdefault(name, value), value), name
    assert full[0].keys() == network.keys()
    for other in full[1:]:
        assert all(torch.equal(value, other[name]) for name, value in full[0].items())
