"""Streams of batches that processes read, decode and augment ahead of training.

A worker's batches are a pure function of (seed, worker, step), for any number of reading processes: each item is
requested with its own seed, so that a run that is resumed at step t sees the batches of an uninterrupted one.

The reading processes live as long as their stream. They leave the process group of the training, because launchers and
terminals signal whole groups: after a signal the training ends its round and saves, which still needs their batches.
They exit with the stream, or within seconds after the process that they read for, however it ended.
"""

import contextlib
import itertools
import multiprocessing.context
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, default_collate
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from resist.data import handover
from resist.data.handover import FEWER, Collate, Collated, Failure, Guarded, Stuck, loss_of, remedy_of
from resist.data.readers import num_readers
from resist.data.sampler import Sampler
from resist.data.spans import WHOLE, Share, spans
from resist.errors import UserError, first_line
from resist.planning.plan import keyed_int

# Batches that each reading process prepares in advance.
AHEAD = 2


class Items(Protocol):
    """Data set of a stream.

    An item is requested with its index and the seed of its augmentation (see `seeded`). Where a file cannot be read,
    `__getitem__` raises a UserError that names it; training ends with that line.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index_and_seed: tuple[int, int], /) -> Any: ...


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within a context, and restore it after."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Stream:
    """Training batches of one worker in CPU memory.

    Args:
        dataset: The items.
        sampler: The items of each batch, and the key of their augmentation.
        num_data_workers: Processes that read; 0: this process reads, when a batch is requested. The cores bound it,
            see `resist.data.readers`.
        collate: Makes a batch from a list of items.
        pin_memory: Return batches in pinned memory, from which a GPU copies them while it computes.

    Attributes:
        wait_s: Seconds that `batch` has waited for data.
    """

    def __init__(
        self,
        dataset: Items,
        sampler: Sampler,
        *,
        num_data_workers: int = 0,
        collate: Collate = default_collate,
        pin_memory: bool = False,
    ) -> None:
        self.wait_s = 0.0
        self._steps = _Steps(sampler)
        self._loader = _loader(dataset, self._steps, num_readers(num_data_workers), collate, pin_memory, stay=True)
        self._batches: Iterator[Any] | None = None
        self._next = 0

    def batch(self, step: int) -> Any:
        """Return the batch of a step.

        Consecutive steps are read ahead. For any other step the stream restarts there, and the batches that were read
        ahead are discarded.

        Raises:
            UserError: An item cannot be read, or a reading process was lost.
        """
        start = time.perf_counter()
        if self._batches is None or step != self._next:
            self._steps.start = step
            self._batches = _begin(self._loader)
        batch = _take(self._batches)  # waits for the reading processes
        self._next = step + 1
        self.wait_s += time.perf_counter() - start
        return batch

    def close(self) -> None:
        """Stop the reading processes; the next call of `batch` starts them again."""
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
    share: Share = WHOLE,
) -> Iterator[Any]:
    """Iterate over all items once, in order, with seed 0.

    Args:
        dataset: The items.
        batch_size: Items in a batch; the last one may have fewer, or one more, see `spans`.
        num_data_workers: Processes that read; 0: this process reads.
        collate: Makes a batch from a list of items.
        pin_memory: Return batches in pinned memory.
        limit: Number of batches, at most; default: all.
        share: The part of the batches to iterate over.

    Yields:
        Batches in CPU memory.

    Raises:
        UserError: An item cannot be read, or a reading process was lost.
    """
    num_data_workers = num_readers(num_data_workers)
    chosen = share.of(spans(len(dataset), batch_size)[:limit])
    batches = [[(index, 0) for index in span] for span in chosen]
    loader = _loader(dataset, batches, min(num_data_workers, len(batches)), collate, pin_memory, stay=False)
    items = _begin(loader)
    for _ in batches:
        yield _take(items)


class _Steps:
    """Endless batch sampler from step `start` on; an item is (index, seed of the augmentation)."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.start = sampler, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in itertools.count(self.start):
            key = ("item", self.sampler.seed, self.sampler.worker, step)
            yield [(index, keyed_int(*key, place)) for place, index in enumerate(self.sampler.indices(step).tolist())]


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
            "timeout": handover.SLICE_S,
            "num_workers": num_data_workers,
            "prefetch_factor": AHEAD,
            "persistent_workers": stay,
            "worker_init_fn": _leave_group,
            # A fork starts immediately and shares the lists of files; it is safe on Linux only.
            "multiprocessing_context": _fork() if sys.platform == "linux" else None,
        }
    with _unwarned():
        return DataLoader(
            Guarded(dataset),  # type: ignore[arg-type]
            batch_sampler=batches,
            collate_fn=Collated(collate),
            pin_memory=pin_memory,
            generator=torch.Generator(),  # otherwise each new iterator would draw from torch's global generator
            **options,
        )


class _Flag:
    """Event of a DataLoader, without a lock.

    `multiprocessing.Event` is a lock even where it is only read. A reading process that is killed at that moment holds
    the lock for ever, and so this process would wait for ever as soon as it looks at the event.
    """

    def __init__(self, context: multiprocessing.context.BaseContext) -> None:
        self._semaphore = context.Semaphore(0)

    def is_set(self) -> bool:
        return self._semaphore.get_value() > 0

    def set(self) -> None:
        self._semaphore.release()


def _fork() -> multiprocessing.context.BaseContext:
    class Fork(multiprocessing.context.ForkContext):  # exists on Unix only
        def Event(self) -> Any:  # noqa: N802
            return _Flag(self)

    return Fork()


def _begin(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the reading processes; raise UserError where that is not possible."""
    with _unwarned():
        before = signal.getsignal(signal.SIGCHLD) if _signals() else None
        try:
            batches = iter(loader)
        except OSError as error:
            _abandon(error)
            number, reason = loader.num_workers, error.strerror or first_line(error)
            remedy = remedy_of(error) or FEWER
            raise UserError(f"cannot start the {number} processes that read data: {reason}; {remedy}") from error
        if _signals() and signal.getsignal(signal.SIGCHLD) is not before:
            # When a process is lost, torch's handler raises anywhere in the training. `_take` notices it within 5 s.
            signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
        return batches


def _abandon(error: BaseException) -> None:
    """End what a start that failed has left; torch would fail at that too, and print a traceback."""
    trace = error.__traceback__
    while trace is not None:
        batches = trace.tb_frame.f_locals.get("self")
        if isinstance(batches, _MultiProcessingDataLoaderIter):
            batches._shutdown = True
            for process in getattr(batches, "_workers", []):
                process.kill()
        trace = trace.tb_next


def _take(batches: Iterator[Any]) -> Any:
    """Wait for the next batch; raise UserError if an item failed, or a reading process was lost or is stuck."""
    processes, slices = getattr(batches, "_workers", []), 0
    while True:
        try:
            batch = next(batches)
            break
        except (RuntimeError, OSError, EOFError) as error:
            # An error of the items' own code, from this process or ("Caught ...") from a reading one, is not a loss.
            if not processes or str(error).startswith("Caught"):
                raise
            if "timed out after" not in str(error):
                raise loss_of(error, [process.exitcode for process in processes]) from error
            slices += 1
            if slices * handover.SLICE_S >= handover.STUCK_S:
                batch = handover.stuck()
                break
    if isinstance(batch, Stuck):
        for process in processes:  # they would not end by themselves, and this process would wait for that
            process.kill()
    if isinstance(batch, Failure):
        raise UserError(batch.message)
    return batch


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    with warnings.catch_warnings():
        # About more processes than cores: the number is the user's choice.
        warnings.filterwarnings("ignore", category=UserWarning, message="This DataLoader will create")
        # About a fork while threads run (Python 3.12 and later): the reading processes take none of our locks.
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork")
        yield


def _signals() -> bool:
    return hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()


def _leave_group(_number: int) -> None:
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
