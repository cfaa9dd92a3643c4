"""Batches of data that do not fit into memory: processes read, decode and augment them ahead of the training.

A worker's batches are a pure function of (seed, worker, step), however many processes read them: each item is asked for
with a seed of its own, so a run that goes on at step t sees what an undisturbed one would see.

The reading processes stay for the life of a stream. They form a process group of their own, since launchers and
terminals send their signals to whole groups: the training then ends its round and saves, and that takes their batches.
They end with the stream, or within seconds of the process that they read for, whatever became of it.
"""

import contextlib
import itertools
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, default_collate

from resist.data.sampler import Order
from resist.errors import UserError
from resist.planning.plan import keyed_int

# Batches that each reading process has ready.
AHEAD = 2


class Items(Protocol):
    """What a stream reads from. An item is asked for with its index and the seed of its augmentation (see `seeded`).

    Raises UserError that names the file which cannot be read: it ends the training with that line.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index_and_seed: tuple[int, int], /) -> Any: ...


Collate = Callable[[list[Any]], Any]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside it torch's generator of the host, which torchvision's transforms use, is seeded; it is restored after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Stream:
    """Training batches of one worker, on the host, in the order that `Order` says.

    num_data_workers: processes that read; 0: this process reads, when a batch is asked for.
    collate:     makes a batch of the items.
    pin_memory:  batches lie in pinned memory, from which they go to a GPU while it computes.

    wait_s: seconds that `batch` has waited for data.
    """

    def __init__(
        self,
        dataset: Items,
        *,
        batch_size: int,
        seed: int,
        worker: int,
        workers: int,
        sampling: str = "all",
        num_data_workers: int = 0,
        collate: Collate = default_collate,
        pin_memory: bool = False,
    ) -> None:
        self.order = Order(
            len(dataset), batch_size=batch_size, seed=seed, worker=worker, workers=workers, sampling=sampling
        )
        self.wait_s = 0.0
        self._steps = _Steps(self.order)
        self._loader = _loader(dataset, self._steps, num_data_workers, collate, pin_memory, stay=True)
        self._batches: Iterator[Any] | None = None
        self._next = 0

    @property
    def images_per_epoch(self) -> int:
        return self.order.images_per_epoch

    def batch(self, step: int) -> Any:
        """The batch of this step. Steps that are asked for one after another are read ahead; others begin anew.

        Raises UserError in one line where an item cannot be read or a reading process is lost.
        """
        start = time.perf_counter()
        if self._batches is None or step != self._next:
            self._steps.start = step
            self._batches = _begin(self._loader)
        got = _take(self._batches, self._loader.num_workers > 0)
        self._next = step + 1
        self.wait_s += time.perf_counter() - start
        return got

    def close(self) -> None:
        """End the reading processes. They are started again when a batch is asked for."""
        self._batches = None
        self._loader._iterator = None


def in_order(
    dataset: Items,
    batch_size: int,
    *,
    num_data_workers: int = 0,
    collate: Collate = default_collate,
    pin_memory: bool = False,
    limit: int | None = None,
) -> Iterator[Any]:
    """All items, each once, in order, `batch_size` at a time (`limit` batches at most), on the host. Seeds are 0."""
    pairs = [(index, 0) for index in range(len(dataset))]
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)][:limit]
    loader = _loader(dataset, batches, min(num_data_workers, len(batches)), collate, pin_memory, stay=False)
    items = _begin(loader)
    for _ in batches:
        yield _take(items, loader.num_workers > 0)


class _Steps:
    """The items of each step from `start` on, without end: (index, seed of the augmentation)."""

    def __init__(self, order: Order) -> None:
        self.order, self.start = order, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in itertools.count(self.start):
            key = ("item", self.order.seed, self.order.worker, step)
            yield [(index, keyed_int(*key, place)) for place, index in enumerate(self.order.indices(step).tolist())]


@dataclass(frozen=True)
class _Failure:
    """What went wrong with an item, sent instead of a batch: an exception would come with a page of traceback."""

    message: str


@dataclass(frozen=True)
class _Guarded:
    dataset: Items

    def __getitem__(self, pair: tuple[int, int]) -> Any:
        try:
            return self.dataset[pair]
        except UserError as error:
            return _Failure(str(error))


@dataclass(frozen=True)
class _Collated:
    collate: Collate

    def __call__(self, items: list[Any]) -> Any:
        failed = [item for item in items if isinstance(item, _Failure)]
        return failed[0] if failed else self.collate(items)


def _loader(
    dataset: Items,
    batches: Iterable[list[tuple[int, int]]],
    num_data_workers: int,
    collate: Collate,
    pin_memory: bool,
    *,
    stay: bool,
) -> DataLoader[Any]:
    options: dict[str, Any] = {}
    if num_data_workers:
        options = {
            "num_workers": num_data_workers,
            "prefetch_factor": AHEAD,
            "persistent_workers": stay,
            "worker_init_fn": _leave_group,
            # A fork starts at once and shares the lists of files; elsewhere than on Linux it is not safe.
            "multiprocessing_context": "fork" if sys.platform == "linux" else None,
        }
    with _unwarned():
        return DataLoader(
            _Guarded(dataset),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=_Collated(collate),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else each beginning would draw from torch's own
            **options,
        )


def _begin(loader: DataLoader[Any]) -> Iterator[Any]:
    with _unwarned():
        before = signal.getsignal(signal.SIGCHLD) if _signals() else None
        batches = iter(loader)
        if _signals() and signal.getsignal(signal.SIGCHLD) is not before:
            # torch's handler raises wherever the training is when a process is lost. `_take` finds it within 5 s.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return batches


def _take(batches: Iterator[Any], apart: bool) -> Any:
    """The next batch. apart: whether other processes read it."""
    try:
        got = next(batches)
    except (RuntimeError, OSError, EOFError) as error:
        if not apart or str(error).startswith("Caught"):  # an error of the items' own code, from a process or from here
            raise
        first = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"a process that reads data was lost: {first}; give fewer --data-workers, or 0") from error
    if isinstance(got, _Failure):
        raise UserError(got.message)
    return got


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        # Of more processes than cores: how many there are is the user's choice.
        warnings.filterwarnings("ignore", category=UserWarning, message="This DataLoader will create")
        # Of a fork beside threads (Python 3.12 and later): what the processes do after it takes none of our locks.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
        yield


def _signals() -> bool:
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()


def _leave_group(_number: int) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
