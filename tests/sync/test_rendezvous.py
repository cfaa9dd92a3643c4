"""Rendezvous at a store with entries of earlier attempts, and the liveness check."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from resist.sync.liveness import COMPUTING, POLL_S, STATE, WAITING, Liveness
from resist.sync.rendezvous import NAME, agree_on_attempt


@pytest.fixture
def store() -> dist.HashStore:
    return dist.HashStore()


def attempt(store: dist.Store, size: int, delays: list[float], timeout_s: float = 20.0) -> list[str]:
    def agree(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_attempt(store, rank, size, timeout_s)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(agree, range(size)))


@pytest.mark.slow
@pytest.mark.parametrize("delays", [[0, 0, 0], [0.3, 0, 0], [0, 0.3, 0.1]], ids=["together", "0 last", "0 first"])
def test_every_attempt_has_a_name_of_its_own(store: dist.HashStore, delays: list[float]) -> None:
    names = [attempt(store, 3, delays) for _ in range(4)]
    assert all(len(set(attempt_names)) == 1 for attempt_names in names)
    assert len({attempt_names[0] for attempt_names in names}) == 4


def test_an_interrupted_attempt_does_not_disturb_the_next(store: dist.HashStore) -> None:
    with pytest.raises(TimeoutError, match=r"no sign of process 1, 2 within 0\.1 s"):
        agree_on_attempt(store, 0, 3, 0.1)
    with pytest.raises(TimeoutError, match="process 0 has not seen all 3"):
        agree_on_attempt(store, 1, 3, 0.2)  # it has read the name of the interrupted attempt, and answered
    old = store.get(NAME).decode()
    names = attempt(store, 3, [0.3, 0, 0])
    assert len(set(names)) == 1
    assert names[0] != old


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


def test_one_slow_response_of_two_processes_is_waited_for(store: dist.HashStore) -> None:
    caller = Liveness(store, 0, 2)
    response = threading.Timer(2 * POLL_S, store.set, (f"{STATE}1", COMPUTING))  # process 1 polls, and then stalls
    response.start()
    try:
        assert caller.call() == ([], [1])
    finally:
        response.join()
    caller.close()
