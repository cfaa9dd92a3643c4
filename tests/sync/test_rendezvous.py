"""Rendezvous at a store with entries of earlier attempts, and the liveness check."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from resist.errors import AgreedError, UserError
from resist.sync.liveness import COMPUTING, POLL_S, STATE, WAITING, Liveness
from resist.sync.rendezvous import NAME, Arrival, Introductions, agree_on_attempt


@pytest.fixture
def store() -> dist.HashStore:
    return dist.HashStore()


def named(ranks: Sequence[int]) -> str:
    return ", ".join(f"process {rank}" for rank in ranks)


def no_objection(_: Introductions) -> str:
    return ""


def join(
    store: dist.Store, rank: int, size: int, timeout_s: float = 20.0,
    judge: Callable[[Introductions], str] = no_objection,
) -> tuple[str, Introductions]:  # fmt: skip
    arrival = Arrival(rank, size, {"hostname": f"host{rank // 2}", "failure": "x" * rank}, judge, named)
    return agree_on_attempt(store, arrival, timeout_s)


def attempt(store: dist.Store, size: int, delays: list[float], timeout_s: float = 20.0) -> list[str]:
    def agree(rank: int) -> str:
        time.sleep(delays[rank])
        name, introductions = join(store, rank, size, timeout_s)
        assert [one["hostname"] for one in introductions] == [f"host{rank // 2}" for rank in range(size)]
        return name

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(agree, range(size)))


@pytest.mark.slow
@pytest.mark.parametrize("delays", [[0, 0, 0], [0.3, 0, 0], [0, 0.3, 0.1]], ids=["together", "0 last", "0 first"])
def test_every_attempt_has_a_name_of_its_own(store: dist.HashStore, delays: list[float]) -> None:
    names = [attempt(store, 3, delays) for _ in range(4)]
    assert all(len(set(attempt_names)) == 1 for attempt_names in names)
    assert len({attempt_names[0] for attempt_names in names}) == 4


def test_an_interrupted_attempt_does_not_disturb_the_next(
    store: dist.HashStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resist.sync.rendezvous.LINGER_S", 0.1)
    with pytest.raises(
        AgreedError, match=r"process 1, process 2 have not come within 0 s; there are 0 on host0; check"
    ):
        join(store, 0, 3, 0.1)
    with pytest.raises(UserError, match=r"process 1: process 2 not there within 0 s; check that all 3 processes"):
        join(store, 1, 3, 0.2)  # it has read the name of the interrupted attempt, and answered
    old = store.get(NAME).decode()
    names = attempt(store, 3, [0.3, 0, 0])
    assert len(set(names)) == 1
    assert names[0] != old


def errors_of(store: dist.Store, *processes: tuple[int, int, float]) -> list[str]:
    """The errors of (rank, size, timeout_s) that arrive at once; the first process of three letters objects."""

    def judge(introductions: Introductions) -> str:
        return next((one["failure"] for one in introductions if len(one["failure"]) == 3), "")

    def error(process: tuple[int, int, float]) -> str:
        try:
            join(store, *process, judge)
        except UserError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(error, processes))


def test_all_end_with_the_line_of_the_one_that_cannot_take_part(store: dist.HashStore) -> None:
    assert errors_of(store, *((rank, 4, 20.0) for rank in range(4))) == ["AgreedError: xxx"] * 4


def test_those_that_do_not_come_are_named_to_all(store: dist.HashStore) -> None:
    expected = (
        "AgreedError: process 2 has not come within 1 s; there are 0, 1 on host0; check that all 3 processes "
        "(WORLD_SIZE) were started, with the same MASTER_ADDR and MASTER_PORT"
    )
    assert errors_of(store, (0, 3, 0.6), (1, 3, 20.0)) == [expected] * 2


@pytest.mark.parametrize(
    ("processes", "number", "expected"),
    [
        ([(1, 2, 0.3)], 0, "UserError: process 1: process 0 has not come within 0 s; check that it was started with"),
        (
            [(0, 2, 5.0), (1, 2, 5.0), (2, 3, 0.5)], 2,
            "UserError: process 2: started with WORLD_SIZE=3, process 0 with WORLD_SIZE=2; give all of them the same",
        ),
        (
            [(0, 3, 1.0), (1, 3, 0.4), (1, 3, 0.4)], slice(1, 3),
            "UserError: two processes were started with RANK=1; give each process a number of its own, from 0",
        ),
        (
            [(0, 3, 1.0), (0, 3, 1.0)], slice(0, 2),
            "UserError: two processes were started with RANK=0; give each process a number of its own, from 0",
        ),
    ],
    ids=["no process 0", "one too many", "one number twice", "0 twice"],
)  # fmt: skip
def test_wrong_numbers_are_named(
    store: dist.HashStore, monkeypatch: pytest.MonkeyPatch, processes: list[tuple[int, int, float]],
    number: int | slice, expected: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("resist.sync.rendezvous.LINGER_S", 0.1)
    errors = errors_of(store, *processes)[number]
    assert any(text.startswith(expected) for text in ([errors] if isinstance(errors, str) else errors))


@pytest.mark.slow
def test_processes_are_missing_or_computing(store: dist.HashStore) -> None:
    before = threading.active_count()
    processes = [Liveness(store, rank, 4) for rank in range(3)]  # number 3 is dead
    processes[1].report_state(WAITING)
    assert processes[0].call() == ([3], [2])
    del processes
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() <= before, "the threads end with their objects"


def test_a_process_that_has_lost_contact_is_never_the_one_that_others_wait_for(store: dist.HashStore) -> None:
    first, second = Liveness(store, 0, 2), Liveness(store, 1, 2)
    store.set(f"{STATE}1", WAITING)  # process 1 responds before the thread of process 0 looks
    assert first.call() == ([], [])
    first.report_state(COMPUTING)  # at the end of the operation that failed
    time.sleep(3 * POLL_S)
    assert second.call() == ([], [])
    first.close()
    second.close()


def test_one_slow_response_of_two_processes_is_waited_for(store: dist.HashStore) -> None:
    caller = Liveness(store, 0, 2)
    response = threading.Timer(2 * POLL_S, store.set, (f"{STATE}1", COMPUTING))  # process 1 polls, and then stalls
    response.start()
    try:
        assert caller.call() == ([], [1])
    finally:
        response.join()
    caller.close()
