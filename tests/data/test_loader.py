"""Streams: batches do not depend on the reading processes, which end with their stream."""

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from resist.data import handover, loader
from resist.data.loader import Stream, in_order, seeded
from resist.data.readers import num_readers, workers_here
from resist.data.sampler import Sampler
from resist.errors import UserError


class Numbers:
    """Item i is i, some chance, and the process that read it. Item `bad` cannot be read."""

    def __init__(self, num: int, bad: int = -1) -> None:
        self.num, self.bad = num, bad

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        index, seed = pair
        if index == self.bad:
            raise UserError(f"file{index}.jpg: cannot be read; repair it")
        with seeded(seed):
            return torch.tensor(index), torch.rand(3), os.getpid()


def make_sampler(**options: object) -> Sampler:
    settings = {"batch_size": 5, "seed": 0, "worker": 0, "workers": 3, **options}
    return Sampler(23, **settings)  # type: ignore[arg-type]


def stream(bad: int = -1, num_data_workers: int = 0, **options: object) -> Stream:
    return Stream(Numbers(23, bad), make_sampler(**options), num_data_workers=num_data_workers)


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


@pytest.mark.slow
def test_batches_depend_on_seed_worker_and_step_alone() -> None:
    alone = stream()
    expected = [alone.batch(step) for step in range(12)]
    before = torch.get_rng_state()
    for num_data_workers in (0, 1, 3):
        other = stream(num_data_workers=num_data_workers)
        for step in (4, 5, 6, 11, 0, 1, 7, 7):
            assert same(other.batch(step), expected[step])
    assert torch.equal(torch.get_rng_state(), before)
    for changed in (stream(seed=1), stream(worker=1)):
        assert not torch.equal(changed.batch(0)[1], expected[0][1])
    again = [number for step in range(12) for number in zip(*expected[step][:2], strict=True) if number[0] == 7]
    assert not torch.equal(again[0][1], again[1][1])  # another augmentation in the next epoch


@pytest.mark.slow
def test_the_processes_stay_and_end_with_the_stream() -> None:
    one = stream(num_data_workers=2)
    seen = {int(pid) for step in (0, 1, 2, 3, 9, 10, 2, 3) for pid in one.batch(step)[2]}
    assert len(seen) == 2
    assert os.getpid() not in seen
    assert all(os.getpgid(pid) == pid for pid in seen)
    one.close()
    assert not any(psutil.pid_exists(pid) for pid in seen)
    assert same(one.batch(3), stream().batch(3))


@pytest.mark.parametrize("num_data_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_all_items_in_order(num_data_workers: int) -> None:
    batches = list(in_order(Numbers(11), 4, num_data_workers=num_data_workers))
    assert [batch[0].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    assert len(list(in_order(Numbers(11), 4, num_data_workers=num_data_workers, limit=2))) == 2
    assert list(in_order(Numbers(0), 4, num_data_workers=num_data_workers)) == []


@pytest.mark.parametrize("num_data_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_an_item_that_cannot_be_read_is_one_line(num_data_workers: int) -> None:
    bad = stream(bad=7, num_data_workers=num_data_workers)
    with pytest.raises(UserError, match=r"^file7\.jpg: cannot be read; repair it$"):
        _ = [bad.batch(step) for step in range(5)]
    with pytest.raises(UserError, match=r"^file7\.jpg: cannot be read; repair it$"):
        list(in_order(Numbers(9, bad=7), 4, num_data_workers=num_data_workers))


@pytest.mark.parametrize("sampling", ["all", "shard"])
def test_every_item_comes_once_an_epoch(sampling: str) -> None:
    own: list[int] = []
    for worker in range(3):
        options = {"worker": worker, "sampling": sampling, "batch_size": 3}
        one, num = stream(**options), make_sampler(**options).images_per_epoch  # type: ignore[arg-type]
        drawn = torch.cat([one.batch(step)[0] for step in range(num)]).tolist()
        for epoch in range(3):
            assert set(Counter(drawn[epoch * num : (epoch + 1) * num]).values()) == {1}
        own += drawn[:num]
    assert Counter(Counter(own).values()) == ({3: 23} if sampling == "all" else {1: 23})


@pytest.mark.slow
def test_a_reading_process_that_is_killed_is_one_line() -> None:
    one = stream(num_data_workers=1)
    os.kill(int(one.batch(0)[2][0]), signal.SIGKILL)
    with pytest.raises(UserError, match=r"^a process that reads data was lost: .*; give fewer `data_workers`, or 0$"):
        _ = [one.batch(step) for step in range(1, 9)]


class Large(Numbers):
    """Items of more bytes than a file may have, where that is limited."""

    def __init__(self, lack: str) -> None:
        super().__init__(23)
        self.lack = lack

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        if self.lack == "files in a reader":
            limit(resource.RLIMIT_NOFILE, 3)
        if self.lack == "shared memory":  # the error of a /dev/shm that is full, but for its number
            limit(resource.RLIMIT_FSIZE, 1000)
        return torch.zeros(3, 64, 64), torch.zeros(3), os.getpid()


def limit(kind: int, number: int) -> int:
    """Set the soft limit of this process. Returns the previous one."""
    soft, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (number, hard))
    return soft


TAKEN, GIVEN = "data cannot be taken from the process that has read it", "a process that reads data cannot hand it over"
FILES, MEMORY = (
    r"raise the limit of open files \(ulimit -n, now \d+\)",
    r"enlarge /dev/shm \(docker run --shm-size=8g\)",
)
HERE = ("files before the start", "files in this process")
LACKS = {
    "files before the start": f"cannot start the 1 processes that read data: Too many open files; {FILES}",
    "files in a reader": f"{GIVEN}: .*; {FILES}",
    "files in this process": f"{TAKEN}: .*; {FILES}",
    "shared memory": f"{GIVEN}: .*; {MEMORY}",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("lack", LACKS)
def test_readers_that_cannot_hand_over_are_one_line(lack: str, capfd: pytest.CaptureFixture[str]) -> None:
    one = Stream(Large(lack), make_sampler(), num_data_workers=1)
    start = int(lack == "files in this process")
    _ = [one.batch(step) for step in range(start)]
    before = limit(resource.RLIMIT_NOFILE, 3) if lack in HERE else 0
    try:
        with pytest.raises(UserError) as raised:
            _ = [one.batch(step) for step in range(start, 9)]
    finally:
        if before:
            limit(resource.RLIMIT_NOFILE, before)
    assert re.fullmatch(rf"{LACKS[lack]}, or give fewer `data_workers`, or 0", str(raised.value))
    one.close()
    assert capfd.readouterr() == ("", "")


class Stopping(Numbers):
    """Item 7 stops the reading process, as a disk does that does not answer."""

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        if pair[0] == 7:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitem__(pair)


@pytest.mark.slow
def test_readers_that_are_stuck_are_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handover, "SLICE_S", 0.1)
    monkeypatch.setattr(handover, "STUCK_S", 0.5)
    others = psutil.Process().children()
    with pytest.raises(
        UserError, match=r"^the processes that read data gave none for 0\.5 s; .*ulimit -n.* /dev/shm, or"
    ):
        list(in_order(Stopping(23), 5, num_data_workers=1))
    assert set(psutil.Process().children()) <= set(others)


@pytest.mark.slow
def test_slow_readers_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(Numbers):
        def __getitem__(self, pair: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
            time.sleep(0.15)
            return super().__getitem__(pair)

    monkeypatch.setattr(handover, "SLICE_S", 0.05)
    assert len(list(in_order(Slow(4), 2, num_data_workers=1))) == 2


@pytest.mark.parametrize(
    ("given", "workers", "cores", "expected"),
    [(None, 1, 1, 1), (None, 1, 2, 2), (None, 1, 64, 4), (None, 4, 2, 0), (None, 4, 8, 2), (None, 4096, 2, 0),
     (0, 9, 1, 0), (4, 4, 2, 4), (16, 1, 1, 16), (128, 4, 64, 128)],
)  # fmt: skip
def test_readers_are_as_many_as_the_cores_allow(given: int | None, workers: int, cores: int, expected: int) -> None:
    assert num_readers(given, workers, cores) == expected


@pytest.mark.parametrize(
    ("given", "workers", "cores", "message"),
    [
        (100_000, 1, 2, "`data_workers=100000` on 2 cores; give 0 to 16"),
        (5, 4, 2, "`data_workers=5`, 20 processes for 4 workers on 2 cores; give 0 to 4"),
        (1, 17, 1, "`data_workers=1`, 17 processes for 17 workers on 1 cores; give 0 to 0"),
        (-1, 4, 2, "`data_workers=-1` on 2 cores; give 0 to 4"),
    ],
)
def test_more_readers_are_refused(given: int, workers: int, cores: int, message: str) -> None:
    with pytest.raises(UserError) as raised:
        num_readers(given, workers, cores)
    assert str(raised.value) == message


def test_no_stream_starts_more_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "DataLoader", None)  # nothing is started
    for number in (10**5, 10**30):
        with pytest.raises(UserError, match=r"^`data_workers=10+` on .* cores; give 0 to "):
            stream(num_data_workers=number)
        with pytest.raises(UserError, match=r"^`data_workers=10+` on .* cores; give 0 to "):
            next(in_order(Numbers(23), 1, num_data_workers=number))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, 8), ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, 4), ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1"}, 3),
     ({"WORLD_SIZE": "", "LOCAL_WORLD_SIZE": "x"}, 8), ({"WORLD_SIZE": "0", "LOCAL_WORLD_SIZE": "0"}, 8)],
)  # fmt: skip
def test_workers_of_a_host(environment: dict[str, str], expected: int) -> None:
    assert workers_here(8, environment) == expected


class LockHolder(Numbers):
    """Item 7 kills the reading process while it holds each lock that it shares with this process."""

    def __getitem__(self, pair: tuple[int, int]) -> tuple[Tensor, Tensor, int]:
        if pair[0] == 7:
            frame = sys._getframe()
            while frame.f_code.co_name != "_worker_loop":
                assert frame.f_back is not None
                frame = frame.f_back
            with contextlib.suppress(AttributeError):
                frame.f_locals["done_event"]._cond.acquire()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(pair)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the readers have torch's own event")
def test_a_reading_process_that_is_killed_while_it_looks_whether_to_end() -> None:
    with pytest.raises(UserError, match=r"^a process that reads data was lost: "):
        list(in_order(LockHolder(23), 5, num_data_workers=2))


SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_loader import stream
one = stream(num_data_workers=2)
print(*{int(pid) for step in range(4) for pid in one.batch(step)[2]}, flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", pytest.param("SIGTERM", marks=pytest.mark.nightly), "SIGKILL"])
def test_no_process_is_left_however_the_training_ends(end: str) -> None:
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), "exit" if end == "exit" else "wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        readers = [int(word) for word in process.stdout.readline().split()]
        assert len(readers) == 2
        if end != "exit":
            os.killpg(process.pid, getattr(signal, end))
        assert process.wait(30) == (0 if end == "exit" else -getattr(signal, end))
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in readers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in readers)
