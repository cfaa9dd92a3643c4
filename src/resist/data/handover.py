"""Hand-over of batches from a reading process, where every error becomes one line.

A queue pickles what is put into it in a thread of its own. An error there, as where no file can be opened or /dev/shm
is full, is a page of traceback on stderr, the batch is lost, and the training waits for it forever. So a batch is
pickled in the reading process before it gets into the queue, and an error goes in its place.

What is pickled of a tensor is where to get its shared memory from: from the reading process, which has to answer. One
that is stopped does not, so this is done in a thread that is not waited for without end.
"""

import errno
import math
import pickle
import signal
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch.multiprocessing  # teaches ForkingPickler to hand over tensors in shared memory  # noqa: F401
from torch.utils.data import get_worker_info

from resist.errors import UserError, first_line

# Seconds without a batch after which reading processes count as stuck, as on a network disk that does not answer. They
# are waited for in slices, and each counts once, however long this process was stopped in it (Ctrl-Z).
STUCK_S, SLICE_S = 300.0, 5.0

Collate = Callable[[list[Any]], Any]

LOST = "a process that reads data was lost"
FEWER = "give fewer `data_workers`, or 0"
NO_FILES, NO_MEMORY = (errno.EMFILE, errno.ENFILE), (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT)


@dataclass(frozen=True)
class Failure:
    """Error message in place of an item or a batch; an exception would add a page of traceback."""

    message: str


@dataclass(frozen=True)
class Stuck(Failure):
    """Failure of a reading process that lives and does not answer."""


def stuck() -> Stuck:
    """Return the failure of reading processes that gave nothing in time."""
    return Stuck(
        f"the processes that read data gave none for {STUCK_S:g} s; look after the disk of the files, the limit of "
        f"open files (ulimit -n) and the size of /dev/shm, or {FEWER}"
    )


@dataclass(frozen=True)
class Guarded:
    """Items of a data set, with a `Failure` in place of each that cannot be read."""

    dataset: Any

    def __getitem__(self, pair: tuple[int, int]) -> Any:
        try:
            return self.dataset[pair]
        except UserError as error:
            return Failure(str(error))


@dataclass(frozen=True)
class Collated:
    """Makes a batch from a list of items, or the first `Failure` among them."""

    collate: Collate

    def __call__(self, items: list[Any]) -> Any:
        failed = [item for item in items if isinstance(item, Failure)]
        if failed:
            return failed[0]
        if get_worker_info() is None:
            return self.collate(items)
        try:
            return _Parcel(bytes(ForkingPickler.dumps(self.collate(items))))
        except (OSError, RuntimeError) as error:
            if (remedy := remedy_of(error)) is None:  # an error of the items' own code
                raise
            return Failure(f"a process that reads data cannot hand it over: {_text(error)}; {remedy}")


@dataclass(frozen=True)
class _Parcel:
    """A pickled batch, which is unpickled where it is received."""

    content: bytes

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return _opened, (self.content,)


def _opened(content: bytes) -> Any:
    results: list[Any] = []

    def load() -> None:
        try:
            results.append(pickle.loads(content))
        except (OSError, RuntimeError, EOFError) as error:
            remedy = remedy_of(error)
            lost = "data cannot be taken from the process that has read it" if remedy else LOST
            results.append(Failure(f"{lost}: {_text(error)}; {remedy or FEWER}"))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    for _ in range(math.ceil(STUCK_S / SLICE_S)):
        thread.join(SLICE_S)  # waits for the reading process
        if results:
            return results[0]
    return stuck()


def remedy_of(error: BaseException) -> str | None:
    """Return what to do about a lack of files or of shared memory; None for another error."""
    number, text = getattr(error, "errno", None), str(error)
    if number in NO_FILES or "Too many open files" in text:
        return f"raise the limit of open files (ulimit -n{_limit()}), or {FEWER}"
    if number in NO_MEMORY or "shared memory" in text or "file </torch_" in text or "Bus error" in text:
        return f"enlarge /dev/shm (docker run --shm-size=8g), or {FEWER}"
    return None


def _limit() -> str:
    try:
        import resource
    except ImportError:  # not on Unix
        return ""
    return f", now {resource.getrlimit(resource.RLIMIT_NOFILE)[0]}"


def _text(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or first_line(error)).rstrip(".")


def loss_of(error: BaseException, exit_codes: Iterable[int | None]) -> UserError:
    """Return the error for a reading process that has ended.

    Args:
        error: What torch raised.
        exit_codes: Those of all reading processes, None for those that run.
    """
    ended = {code for code in exit_codes if code}
    reason, remedy = _text(error), remedy_of(error) or FEWER
    if -signal.SIGBUS in ended:  # shared memory that was promised, and is not there
        reason, remedy = "ended by SIGBUS", f"enlarge /dev/shm (docker run --shm-size=8g), or {FEWER}"
    elif -signal.SIGKILL in ended:
        reason = "ended by SIGKILL, as where memory runs out"
    return UserError(f"{LOST}: {reason}; {remedy}")
