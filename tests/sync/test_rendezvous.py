"""Processes that meet at a store with the leavings of earlier attempts agree on a new name, or say who is missing."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from resist.sync.liveness import WAITING, Liveness
from resist.sync.rendezvous import NAME, agree_on_attempt


@pytest.fixture
def store() -> dist.HashStore:
    return dist.HashStore()


def attempt(store: dist.Store, size: int, delays: list[float], timeout_s: float = 20.0) -> list[str]:
    def one(rank: int) -> str:
        time.sleep(delays[rank])
        return agree_on_attempt(store, rank, size, timeout_s)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@pytest.mark.parametrize("delays", [[0, 0, 0], [0.3, 0, 0], [0, 0.3, 0.1]], ids=["together", "0 last", "0 first"])
def test_every_attempt_has_a_name_of_its_own(store: dist.HashStore, delays: list[float]) -> None:
    names = [attempt(store, 3, delays) for _ in range(4)]
    assert all(len(set(one)) == 1 for one in names)
    assert len({one[0] for one in names}) == 4


def test_an_attempt_that_broke_off_confuses_nobody(store: dist.HashStore) -> None:
    with pytest.raises(TimeoutError, match=r"no sign of process 1, 2 within 0\.1 s"):
        agree_on_attempt(store, 0, 3, 0.1)
    with pytest.raises(TimeoutError, match="process 0 has not seen all 3"):
        agree_on_attempt(store, 1, 3, 0.2)  # it found the name of the attempt that broke off, and answered
    old = store.get(NAME).decode()
    names = attempt(store, 3, [0.3, 0, 0])
    assert len(set(names)) == 1
    assert names[0] != old


def test_who_does_not_answer_is_missing_and_who_is_at_work_is_named(store: dist.HashStore) -> None:
    before = threading.active_count()
    rolls = [Liveness(store, rank, 4) for rank in range(3)]  # number 3 is dead
    rolls[1].report_state(WAITING)
    assert rolls[0].call() == ([3], [2])
    del rolls
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert threading.active_count() <= before, "the threads end with those for whom they answer"
