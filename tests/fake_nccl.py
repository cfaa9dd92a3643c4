"""torch.distributed of one process without others: a stub that records operations on groups of NCCL, for tests."""

import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from resist.sync import distributed, groups
from resist.sync.distributed import Distributed


@dataclass
class FakeWork:
    """An operation that was begun.

    Attributes:
        ends_at: The time at which it is complete, as of `time.monotonic`.
        waited: How often `wait` was called.
    """

    group: Any
    recorder: "Recorder"
    ends_at: float = 0.0
    waited: int = 0

    def is_completed(self) -> bool:
        return self.recorder.aborted or time.monotonic() >= self.ends_at

    def wait(self) -> None:
        assert self.is_completed(), "a stream would wait for it"
        self.waited += 1
        self.recorder.running.remove(self.group)


@dataclass
class Recorder:
    """torch.distributed of one process, which records the operations and the groups that they are in.

    Attributes:
        calls: (name of the operation, number of its group), in order. Group 0 is that of control messages.
        running: Group of each operation that was begun and not waited for.
        works: The operations that were begun.
        takes_s: Seconds that an operation on weights takes after its begin.
        aborted: True once a group was aborted.
    """

    rank: int
    size: int
    calls: list[tuple[str, int]] = field(default_factory=list)
    running: list[Any] = field(default_factory=list)
    groups: list[Any] = field(default_factory=list)
    works: list[FakeWork] = field(default_factory=list)
    takes_s: float = 0.0
    aborted: bool = False

    ProcessGroup = SimpleNamespace
    P2POp = SimpleNamespace
    isend, irecv = "isend", "irecv"

    def get_world_size(self) -> int:
        return self.size

    def get_rank(self) -> int:
        return self.rank

    def PrefixStore(self, name: str, store: object) -> object:  # noqa: N802
        return (name, store)

    def new_group(self, *, timeout: object, backend: str) -> SimpleNamespace:
        self.groups.append(SimpleNamespace(backend=backend, number=len(self.groups), timeout=timeout))
        return self.groups[-1]

    def destroy_process_group(self, group: SimpleNamespace) -> None:
        self.calls.append(("destroy", group.number))

    def abort(self, group: SimpleNamespace) -> None:
        self.calls.append(("abort", group.number))
        self.aborted = True

    def _begin(self, name: str, group: SimpleNamespace, wait: bool) -> FakeWork:
        self.calls.append((name, group.number))
        others = {other.number for other in self.running if other is not group and other.backend == "nccl"}
        assert group.backend != "nccl" or not others, "two communicators of NCCL are in flight"
        self.running.append(group)
        work = FakeWork(group, self, time.monotonic() + (0.0 if group.backend == "gloo" else self.takes_s))
        self.works.append(work)
        if wait:
            work.wait()
        return work

    def all_gather(
        self, outputs: list[Tensor], own: Tensor, group: SimpleNamespace, async_op: bool = False
    ) -> FakeWork:
        for output in outputs:
            output.copy_(own)
        return self._begin("all_gather", group, wait=not async_op)

    def all_reduce(self, tensor: Tensor, group: SimpleNamespace, async_op: bool = False) -> FakeWork:
        tensor.mul_(self.size)
        return self._begin("all_reduce", group, wait=not async_op)

    def broadcast(self, tensor: Tensor, source: int, group: SimpleNamespace, async_op: bool = False) -> FakeWork:
        return self._begin("broadcast", group, wait=not async_op)

    def batch_isend_irecv(self, operations: list[SimpleNamespace]) -> list[FakeWork]:
        (group,) = {id(op.group): op.group for op in operations}.values()
        return [self._begin("batch", group, wait=False) for _ in operations]


class FakeLiveness:
    """The liveness check of one process.

    Attributes:
        state: What this process reports.
        asked: State of this process at each question for a loss.
        lost: The answer.
    """

    def __init__(self, *_: object) -> None:
        self.state, self.asked, self.lost = "", list[str](), False

    def report_state(self, state: str) -> None:
        self.state = state

    def has_loss(self) -> bool:
        self.asked.append(self.state)
        return self.lost

    def cause(self, named: Any) -> str:
        return f"no answer from {named([1])}"

    def beat(self) -> None: ...

    def leave(self) -> None: ...

    def close(self) -> None: ...


def recorded(
    monkeypatch: pytest.MonkeyPatch, rank: int, size: int, timeout_s: float = 600.0, backend: str = "nccl"
) -> tuple[Distributed, Recorder]:
    """Make the transport of one process of several, on NCCL or gloo."""
    recorder = Recorder(rank, size)
    # P2POp(kind, tensor, peer, group, tag)
    recorder.P2POp = lambda kind, tensor, peer, group, tag: SimpleNamespace(  # type: ignore[misc,assignment]
        kind=kind, tensor=tensor, group=group
    )
    monkeypatch.setattr(distributed, "dist", recorder)
    monkeypatch.setattr(groups, "dist", recorder)
    monkeypatch.setattr(groups, "_get_default_store", lambda: None)
    monkeypatch.setattr(groups, "Liveness", FakeLiveness)
    monkeypatch.setattr(groups, "abort_group", recorder.abort)
    monkeypatch.setattr(distributed, "agree_on_backend", lambda *_: backend)
    return Distributed(size, timeout_s=timeout_s), recorder


def liveness_of(transport: Distributed) -> FakeLiveness:
    """The liveness check of a transport that `recorded` has made."""
    liveness = transport._groups._liveness
    assert isinstance(liveness, FakeLiveness)
    return liveness
