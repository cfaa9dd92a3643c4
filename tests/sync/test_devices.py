"""Backends chosen from the devices that are there, and the rules of NCCL: who calls what, in which group, and when."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from fake_nccl import Recorder, recorded
from resist.errors import AgreedError
from resist.planning.plan import RoundPlan, equal_capacities, partition
from resist.planning.schedule import Message, Schedule, schedule
from resist.sync.devices import Gpu, choose_backend, own_device
from resist.sync.distributed import Distributed
from resist.sync.transport import Move


def named(ranks: Sequence[int]) -> str:
    return ", ".join(f"process {rank}" for rank in ranks)


def gpus(*places: str, visible: int = 1) -> list[Gpu]:
    """GPUs written as machine/pci."""
    return [Gpu(*place.split("/"), "cuda:0", visible) for place in places]


@pytest.mark.parametrize(
    ("found", "backend", "nccl", "chosen"),
    [
        (gpus("a/1", "a/2"), "auto", True, "nccl"),
        (gpus("a/1", "b/1"), "auto", True, "nccl"),  # the same place in two machines
        (gpus("a/1", "a/1"), "auto", True, "gloo"),
        (gpus("a/1", "a/2", "b/1", "b/1"), "auto", True, "gloo"),  # one machine has fewer: gloo everywhere
        (gpus("a/1", "a/2"), "auto", False, "gloo"),
        (gpus("a/1", "a/2"), "gloo", True, "gloo"),
        (gpus("a/1", "a/2"), "nccl", True, "nccl"),
        ([], "auto", False, "gloo"),
        ([], "gloo", False, "gloo"),
    ],
)
def test_nccl_where_each_process_has_a_gpu_of_its_own(found: list[Gpu], backend: str, nccl: bool, chosen: str) -> None:
    assert choose_backend(found, backend, nccl=nccl, named=named) == (chosen, "")


@pytest.mark.parametrize(
    ("found", "nccl", "expected"),
    [
        (gpus("a/1", "a/2", "a/1"), True, "`backend=nccl`: process 0, process 2 share one GPU, cuda:0, and NCCL"),
        (gpus("a/1", "a/2"), False, "`backend=nccl`: torch has no NCCL here; give `backend=gloo`"),
        ([], True, "`backend=nccl` is for GPUs of CUDA, and the device is none; give `backend=gloo`"),
    ],
)  # fmt: skip
def test_nccl_that_cannot_be_is_refused(found: list[Gpu], nccl: bool, expected: str) -> None:
    with pytest.raises(AgreedError) as raised:
        choose_backend(found, "nccl", nccl=nccl, named=named)
    assert str(raised.value).startswith(expected)


def test_the_same_gpu_in_every_process_is_named() -> None:
    chosen, note = choose_backend(gpus("a/1", "a/1", visible=4), "auto", nccl=True, named=named)
    assert chosen == "gloo"
    assert note.startswith("process 0, process 1 share one GPU, cuda:0, of the 4 that they see, so that weights go")


def test_a_gpu_without_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cuda = torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert own_device(cuda) == torch.device("cuda", 0)
    monkeypatch.delenv("LOCAL_RANK")
    assert own_device(cuda) == torch.device("cuda", 1)
    assert own_device(torch.device("cuda", 3)) == torch.device("cuda", 3)
    assert own_device(torch.device("cpu")) == torch.device("cpu")


def moves(messages: Sequence[Message], rank: int) -> list[Move]:
    """One worker in each process: the moves as process `rank` sees them."""
    return [
        Move(
            "blocks", message.source, message.target, 4,
            torch.zeros(1) if message.source == rank else None, torch.zeros(1) if message.target == rank else None,
        )
        for message in messages
    ]  # fmt: skip


@pytest.mark.parametrize("size", range(2, 9))
def test_nccl_has_one_communicator_that_all_processes_open_before_any_batch(
    monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Among them a process that has no message in the first round: it opens it nevertheless."""
    silent = 0
    for num_blocks in (12, 22, 35):
        for rounds in rounds_of(num_blocks, size):
            without = [rank for rank in range(size) if all(rank not in (m.source, m.target) for m in rounds[0].average)]
            silent += len(without)
            for rank in {0, size - 1, *without}:
                check_rules(*recorded(monkeypatch, rank, size), rounds, rank)
    assert silent > 0


def rounds_of(num_blocks: int, size: int) -> list[list[Schedule]]:
    """The schedules of two rounds, for a few seeds."""
    sizes = equal_capacities(num_blocks, size)
    runs = []
    for seed in range(8):
        plans = [RoundPlan((partition(num_blocks, sizes, seed=seed, round=r, chain="a"),)) for r in range(3)]
        runs.append([schedule(plan, then, (4,)) for plan, then in pairwise(plans)])
    return runs


def check_rules(transport: Distributed, recorder: Recorder, rounds: Sequence[Schedule], rank: int) -> None:
    opened = len(recorder.calls)
    assert recorder.calls.count(("all_reduce", 1)) == 1
    assert not recorder.running, "opening it waits"
    assert [group.backend for group in recorder.groups] == ["gloo", "nccl"]
    for one in rounds:
        # As `exchange` does: the mean of the shared part is under way while blocks are sent.
        mean = transport.mean([torch.ones(3)], "shared")
        for phase in (one.average, one.hand_over):
            transport.transfer(moves(phase, rank)).finish()
        mean.finish()
    assert {group for _, group in recorder.calls[opened:]} == {1}
    assert recorder.calls.count(("all_reduce", 1)) == 1 + len(rounds)
    assert not recorder.running
    transport.close()
