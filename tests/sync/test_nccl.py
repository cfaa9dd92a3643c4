"""NCCL, which waits without end: a lost worker is noticed, the group is let go, and replicas are written after that."""

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fake_nccl import Recorder, liveness_of, recorded
from resist.errors import AgreedError, WorkerLostError
from resist.sync import nccl
from resist.sync.distributed import Distributed
from resist.sync.groups import Groups
from resist.sync.interfaces import introduction
from resist.sync.liveness import POLL_S, SILENT, WAITING, Liveness
from resist.sync.nccl import HANDLING, errors_left_to_us, handling_failure, handling_note
from resist.sync.process_group import abort_group
from resist.sync.replicas import Replica, keep_newest
from resist.sync.traffic import CountingTransport
from resist.sync.transport import Move
from resist.training import train

NEVER = float("inf")
OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "blocks": lambda transport: transport.transfer([Move("blocks", 0, 1, 4, outgoing=torch.zeros(1))]),
    "mean": lambda transport: transport.mean([torch.ones(3)], "shared"),
    "mean of integers": lambda transport: transport.mean([torch.ones(3, dtype=torch.int64)], "shared"),
    "short mean": lambda transport: transport.mean([torch.ones(4, dtype=torch.bfloat16)], "shared"),
    "scatter": lambda transport: transport.scatter([torch.zeros(5, dtype=torch.uint8)], [2, 3], "shared"),
    "gather": lambda transport: transport.gather([torch.zeros(2, dtype=torch.uint8)], [2, 2], "shared"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_that_never_completes_is_given_up_in_time(monkeypatch: pytest.MonkeyPatch, operation: str) -> None:
    transport, recorder = recorded(monkeypatch, 0, 2, timeout_s=0.2)
    recorder.takes_s = NEVER
    handle, start = OPERATIONS[operation](transport), time.monotonic()
    with pytest.raises(WorkerLostError) as raised:
        handle.finish()
    assert 0.2 <= time.monotonic() - start < 10
    assert str(raised.value).startswith("process 0 (worker 0) lost contact while ")
    assert str(raised.value).endswith("not complete within 0 s; no answer from process 1 (worker 1)")
    assert recorder.calls[-1] == ("abort", 1)
    assert recorder.works[-1].waited == 0, "a stream would wait for it"
    check_end(transport, recorder, str(raised.value))


def check_end(transport: Distributed, recorder: Recorder, text: str) -> None:
    """No later call uses the group: they fail at once, and closing neither flushes nor destroys it."""
    for use in OPERATIONS.values():
        with pytest.raises(WorkerLostError) as raised:
            use(transport)
        assert str(raised.value) == text
    transport.close()
    transport.close()
    assert recorder.calls.count(("abort", 1)) == 1
    assert ("destroy", 1) not in recorder.calls
    assert ("destroy", 0) in recorder.calls


def test_a_lost_process_is_noticed_long_before_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the liveness check, while this process says that it waits."""
    monkeypatch.setattr(nccl, "LOOK_S", 0.05)
    transport, recorder = recorded(monkeypatch, 0, 2)
    liveness = liveness_of(transport)
    recorder.takes_s = 0.2  # slow, and alive: it is looked at, and waited for
    OPERATIONS["mean"](transport).finish()
    assert len(liveness.asked) >= 2
    recorder.takes_s = NEVER
    handle = OPERATIONS["blocks"](transport)
    threading.Timer(0.2, setattr, (liveness, "lost", True)).start()
    start = time.monotonic()
    with pytest.raises(WorkerLostError, match=r"shows no life any more.*; no answer from process 1 \(worker 1\)"):
        handle.finish()
    assert time.monotonic() - start < 10
    assert set(liveness.asked) == {WAITING}


def test_what_is_under_way_at_a_loss_between_exchanges_is_aborted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, recorder = recorded(monkeypatch, 0, 2)

    def closed(*_: object, **__: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(recorder, "all_gather", closed)
    recorder.takes_s = NEVER
    OPERATIONS["mean"](transport)
    with pytest.raises(WorkerLostError):
        transport.all_gather_text("hello")
    assert recorder.calls[-1] == ("abort", 1)


def test_connecting_two_processes_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first message between two processes waits in the call itself, until the group is aborted."""
    transport, recorder = recorded(monkeypatch, 0, 2, timeout_s=0.2)
    aborted = threading.Event()
    group: Any = transport._groups._nccl
    group._abort = lambda _: aborted.set()
    monkeypatch.setattr(recorder, "batch_isend_irecv", lambda _: [aborted.wait(20)])
    with pytest.raises(WorkerLostError, match="while sending blocks: aborted, since it was not complete within 0 s"):
        OPERATIONS["blocks"](transport)
    assert aborted.is_set()


def test_closing_aborts_what_is_under_way_and_destroys_a_good_group(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, recorder = recorded(monkeypatch, 0, 2)
    OPERATIONS["mean"](transport).finish()
    transport.close()
    assert recorder.calls[-2:] == [("destroy", 1), ("destroy", 0)]
    transport, recorder = recorded(monkeypatch, 0, 2)
    recorder.takes_s = NEVER
    OPERATIONS["mean"](transport)  # interrupted before its `finish`
    transport.close()
    assert recorder.calls[-2:] == [("abort", 1), ("destroy", 0)]


def test_closing_returns_whatever_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "LEAVE_S", 0.1)
    transport, recorder = recorded(monkeypatch, 0, 2)
    group: Any = transport._groups._nccl
    forever = threading.Event()
    left: list[str] = []
    transport._groups._default_group = SimpleNamespace(leave=lambda: left.append("left"))  # type: ignore[assignment]
    group._destroy = lambda _: forever.wait(20)
    group._abort = lambda _: forever.wait(20)
    start = time.monotonic()
    transport.close()
    assert time.monotonic() - start < 10
    assert group.hangs
    assert not left, "this would destroy the group as well"
    assert recorder.calls[-1] == ("destroy", 0)
    forever.set()


def test_replicas_are_written_after_the_group_is_aborted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    transport, recorder = recorded(monkeypatch, 0, 2, timeout_s=0.1)
    recorder.takes_s = NEVER
    job = SimpleNamespace(transport=transport, replicas=[Replica(3, 9, {})])
    training = SimpleNamespace(
        job=job, round_number=4, train=lambda _: OPERATIONS["blocks"](CountingTransport(transport)).finish()
    )
    monkeypatch.setattr(train, "write_replicas", lambda *_: recorder.calls.append(("replicas", -1)))
    with pytest.raises(WorkerLostError, match=r"^round 4: .*; replicas of round 3 are in "):
        train._surviving(tmp_path, "", training, 1)  # type: ignore[arg-type]
    assert recorder.calls[-2:] == [("abort", 1), ("replicas", -1)]


def test_gradients_that_never_arrive_end_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams wait for them, and the host for the streams: a thread aborts the group, and so frees both."""
    monkeypatch.setattr(nccl, "WATCH_S", 0.01)
    transport, recorder = recorded(monkeypatch, 0, 2, timeout_s=0.2)
    own = transport._groups

    def begin() -> None:
        own.begin_gradients(lambda: recorder.all_reduce(torch.ones(1), own.collective, async_op=True))

    begin()  # completes, and is not waited for on the host
    recorder.running.clear()
    recorder.takes_s = NEVER
    begin()
    start = time.monotonic()
    while not recorder.aborted and time.monotonic() - start < 5:
        time.sleep(0.01)
    assert recorder.calls[-1] == ("abort", 1)
    expected = (
        "process 0 (worker 0) lost contact while averaging gradients: not complete within 0 s; no answer from process "
        "1 (worker 1)"
    )
    for use in (begin, lambda: transport.all_gather_text("the end of a round")):
        with pytest.raises(WorkerLostError) as raised:
            use()
        assert str(raised.value) == expected
    check_end(transport, recorder, expected)


@pytest.mark.parametrize("text", ["[/__w/pytorch/gloo/transport/tcp/pair.cc:561] Connection closed by peer [x]", "b"])
def test_a_loss_that_torch_notices_in_a_backward_pass_is_named(text: str, tmp_path: Path) -> None:
    def fail(error: RuntimeError) -> Any:
        raise error

    def gather(_: str) -> list[str]:
        raise WorkerLostError("no answer from process 1")

    job = SimpleNamespace(transport=SimpleNamespace(all_gather_text=gather), replicas=[])
    training: Any = SimpleNamespace(job=job, round_number=4, train=lambda _: fail(RuntimeError(text)))
    with pytest.raises(RuntimeError) as raised:
        train._surviving(tmp_path, "", training, 1)
    if "gloo" in text:
        assert type(raised.value) is WorkerLostError
        assert str(raised.value).startswith("round 4: no answer from process 1; continue with resist train ")
    else:
        assert type(raised.value) is RuntimeError


def test_the_older_replica_goes_when_the_newer_one_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exchange has ended on the GPU, not only been queued there, before the processes tell each other so."""
    transport, recorder = recorded(monkeypatch, 0, 2)
    recorder.takes_s = 0.1
    replicas, newest = [Replica(1, 5, {})], Replica(2, 10, {})
    transport.transfer([Move("replica", 1, 0, 4, incoming=torch.zeros(1))]).finish()
    complete = [work.is_completed() for work in recorder.works]
    keep_newest(transport, replicas, newest)
    assert all(complete)
    assert recorder.calls[-2:] == [("batch", 1), ("all_gather", 0)]
    assert replicas == [newest]


def test_wait_s_counts_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    transport, recorder = recorded(monkeypatch, 0, 2)
    recorder.takes_s = 0.1
    counting = CountingTransport(transport)
    for name in ("blocks", "mean"):
        OPERATIONS[name](counting).finish()
    assert counting.wait_s["blocks"] >= 0.09
    assert counting.wait_s["shared"] >= 0.09


def test_torch_leaves_errors_to_this_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the group that it makes; groups of the user stay as they are."""
    for name in HANDLING:
        monkeypatch.delenv(name, raising=False)
    seen: list[str | None] = []
    make = Recorder.new_group

    def new_group(recorder: Recorder, *, timeout: timedelta, backend: str) -> SimpleNamespace:
        seen.append(os.environ.get(HANDLING[0]))
        return make(recorder, timeout=timeout, backend=backend)

    monkeypatch.setattr(Recorder, "new_group", new_group)
    _, recorder = recorded(monkeypatch, 0, 2, timeout_s=100)
    assert seen == [None, "0"]
    assert HANDLING[0] not in os.environ
    assert recorder.groups[1].timeout > timedelta(seconds=100), "torch's own limit comes later"


@pytest.mark.parametrize("name", HANDLING)
def test_a_choice_of_the_user_about_errors_stays(
    monkeypatch: pytest.MonkeyPatch, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    for other in HANDLING:
        monkeypatch.delenv(other, raising=False)
    assert handling_note() == handling_failure() == ""
    monkeypatch.setenv(name, "3")
    with errors_left_to_us():
        assert {other: os.environ[other] for other in HANDLING if other in os.environ} == {name: "3"}
    assert handling_note().startswith(f"{name}=3: torch may end the processes before they report the loss of one")
    caplog.set_level("INFO", logger="resist")
    recorded(monkeypatch, 0, 2)
    assert handling_note() in caplog.text
    monkeypatch.setenv(name, "2")
    assert handling_note() == handling_failure() == ""
    monkeypatch.setenv(name, "yes")
    assert handling_failure() == f"{name}=yes in the environment; give 0, or unset it"
    assert introduction(torch.device("cuda", 0), "")["failure"] == handling_failure()
    assert introduction(torch.device("cpu"), "")["failure"] == ""


DUPLICATE = "NCCL error in: /x.cpp:1, invalid usage (run with NCCL_DEBUG=WARN)\nLast error:\nDuplicate GPU detected : 0"


def test_an_error_of_opening_nccl_is_one_line_in_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_reduce(*_: object, **__: object) -> None:
        raise RuntimeError(DUPLICATE)

    monkeypatch.setattr(Recorder, "all_reduce", all_reduce)
    with pytest.raises(AgreedError) as raised:
        recorded(monkeypatch, 0, 2)
    assert str(raised.value) == (
        "NCCL cannot connect the GPUs: Duplicate GPU detected : 0 (process 0 (worker 0)); NCCL_DEBUG=INFO in the "
        "environment shows more, and `backend=gloo` does without NCCL"
    )


def test_the_process_that_failed_first_is_named_where_others_notice_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = ["remote process exited or there was a network error", "out of shared memory"]
    gather = Groups.gather_text

    def gather_text(self: Groups, text: str) -> list[str]:
        return gathered if self._nccl is not None else gather(self, text)

    monkeypatch.setattr(Groups, "gather_text", gather_text)
    with pytest.raises(AgreedError, match=r"GPUs: out of shared memory \(process 1 \(worker 1\)\)"):
        recorded(monkeypatch, 0, 2)


def test_opening_nccl_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    forever = threading.Event()
    monkeypatch.setattr(Recorder, "all_reduce", lambda *_, **__: forever.wait(20))
    start = time.monotonic()
    with pytest.raises(AgreedError, match="NCCL cannot connect the GPUs: no answer within 0 s"):
        recorded(monkeypatch, 0, 2, timeout_s=0.2)
    assert time.monotonic() - start < 10
    forever.set()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUDA error: no kernel image is")]
)
def test_errors_of_the_own_gpu_are_no_loss_of_a_worker(monkeypatch: pytest.MonkeyPatch, error: RuntimeError) -> None:
    transport, recorder = recorded(monkeypatch, 0, 2)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(recorder, "all_reduce", fail)
    with pytest.raises(type(error)) as raised:
        OPERATIONS["mean"](transport)
    assert raised.value is error


class Store:
    """A store in memory, without the client of torch."""

    def __init__(self) -> None:
        self.entries: dict[str, bytes] = {}
        self.fails = False

    def set(self, key: str, value: str) -> None:
        self.entries[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self.entries[key]

    def check(self, keys: list[str]) -> bool:
        if self.fails:
            raise RuntimeError("the server has ended")
        return all(key in self.entries for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.entries[key] for key in keys]


@pytest.mark.parametrize("make", [Store, dist.HashStore])
def test_signs_of_life(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Any]) -> None:
    monkeypatch.setattr("resist.sync.liveness.POLL_S", 0.005)
    monkeypatch.setattr("resist.sync.liveness.LOOK_S", 0.0)
    store = make()
    first, second = Liveness(store, 0, 2), Liveness(store, 1, 2)
    second.beat()
    for _ in range(2 * SILENT):
        time.sleep(0.05)
        assert not first.has_loss()
    second.close()  # as where it ends with an error, or is killed
    second._thread.join()
    looks = [first.has_loss() for _ in range(SILENT + 1)]
    assert looks[-1]
    assert not any(looks[: SILENT - 1])
    second.leave()
    assert not any(first.has_loss() for _ in range(2 * SILENT)), "it is done, and nobody waits for it"
    store.set("resist/liveness/request", "")
    assert first.has_loss(), "another process has lost contact"
    first.close()


def test_a_process_that_has_never_shown_life_or_a_store_that_has_ended_is_a_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = Store()
    one = Liveness(store, 0, 2)
    assert not any(one.has_loss() for _ in range(2 * SILENT)), "looks of several threads count once"
    one.close()
    monkeypatch.setattr("resist.sync.liveness.LOOK_S", 0.0)
    one = Liveness(store, 0, 2)
    assert [one.has_loss() for _ in range(SILENT + 1)].index(True) >= SILENT - 1
    store.fails = True
    assert Liveness(store, 0, 2).has_loss()
    one.close()


def test_a_process_shows_life_more_often_than_it_is_looked_at() -> None:
    assert POLL_S < nccl.LOOK_S


def test_an_aborted_group_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that destroying all groups does not wait for it. With torch's own functions, and a group of gloo."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        group = dist.new_group(backend="gloo")
        ended: list[str] = []
        monkeypatch.setattr(dist.ProcessGroup, "abort", lambda _: ended.append("abort"))
        shutdown = dist.ProcessGroup.shutdown
        monkeypatch.setattr(
            dist.ProcessGroup, "shutdown", lambda g: (ended.append("shutdown") if g == group else None, shutdown(g))
        )
        assert isinstance(group, dist.ProcessGroup)
        abort_group(group)
    finally:
        dist.destroy_process_group()
    assert ended == ["abort"]
