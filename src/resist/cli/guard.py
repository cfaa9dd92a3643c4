"""How a command ends: its exit status, and one line for each error, also for those that nobody foresaw.

An error that is neither invalid input nor a lost worker, and not one of the system that `_of_the_system` knows, is a
bug of this package. Its traceback is kept in error.txt of the run directory (before there is one: in the folder for
temporary files), for RESIST_DEBUG=1 it is printed.
"""

import errno
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from resist.cli.options import as_typed
from resist.cli.printing import OutputError, print_error
from resist.errors import AgreedError, UserError, WorkerLostError, first_line, quoted
from resist.runs.config import TrainConfig
from resist.runs.directory import command

# Exit statuses; 0, 75 (interrupted and saved) and 128 plus a signal come from elsewhere.
LOST, INVALID, INTERNAL, INTERRUPTED, CLOSED = 1, 2, 70, 130, 141
# Environment variable: 1 prints the traceback of every error.
DEBUG = "RESIST_DEBUG"
# Errors of the operating system, and what to do about them.
REMEDIES = {
    errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EROFS: "choose a place that can be written",
    errno.EACCES: "check its permissions", errno.EPERM: "check its permissions",
    errno.EMFILE: "raise the limit of open files (ulimit -n)", errno.ENFILE: "end other programs",
    errno.ENOMEM: "end other programs, or give less work at once",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.EIO: "check the disk", errno.ESTALE: "check the network file system",
    errno.ENAMETOOLONG: "give a shorter name", errno.ELOOP: "remove the link to itself",
}  # fmt: skip
MEMORY = "out of memory: {}; lower `batch_size`, raise `grad_accum_steps`, or use more workers"
# Errors of CUDA, and what to do about them.
GPU = {
    "no kernel image": "this torch has no code for the GPU: install one that was built for it, or give `device=cpu`",
    "busy or unavailable": "another program has the GPU for itself: end it, or choose another by CUDA_VISIBLE_DEVICES",
    "driver version is insufficient": "install a newer driver, or a torch for this one",
    "uncorrectable ECC": "the GPU is damaged: reset it, or choose another by CUDA_VISIBLE_DEVICES",
}
COMPILE = "`compile`: {}; leave it out"
_runs: list[Path] = []  # the run directory that this process trains in


def guarded(action: Callable[[], int], record: type = TrainConfig, written: Mapping[str, str] | None = None) -> int:
    """Run a command, print its error as one line, and return the exit status.

    Args:
        action: The command.
        record: The record class of the command, whose options messages are written for.
        written: The values of the command line as they were written, by the field's name.
    """
    try:
        with _threads_reported():
            try:
                status = action()
            except SystemExit as end:  # after help
                status = int(end.code or 0)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        if _is_first():
            print_error("interrupted")
        return INTERRUPTED
    except OutputError as error:
        if not error.closed:
            print_error(str(error))
        return CLOSED if error.closed else INVALID
    except Exception as error:
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        text, status = known(error) or (_internal(error), INTERNAL)
        if not isinstance(error, AgreedError) or _is_first():  # every process raises it; the first one prints it
            print_error(as_typed(text, record, written))
        return status


def keep_errors_in(path: Path | None) -> None:
    """Keep the tracebacks of errors that nobody foresaw in this run directory from now on, once it exists."""
    _runs[:] = [] if path is None else [path]


def known(error: Exception) -> tuple[str, int] | None:
    """Return message and exit status of an error that is no bug of this package, or None."""
    if isinstance(error, UserError):
        return str(error), INVALID
    if isinstance(error, WorkerLostError):
        return str(error), LOST
    if text := _of_the_system(error):
        return text, INVALID
    return None


def _of_the_system(error: Exception) -> str | None:
    """Describe an error of this machine: memory, disks, packages, the compiler."""
    home = type(error).__module__.split(".")
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator" in str(error)
        or str(error).startswith("CUDA error: out of memory")
    ):
        return MEMORY.format("this machine has no more" if isinstance(error, MemoryError) else _sentence(error))
    for what, remedy in GPU.items() if isinstance(error, RuntimeError) else ():
        if what in first_line(error):
            return f"{_sentence(error)}; {remedy}"
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("resist"):
        return f"the Python package {error.name} is missing; install it"
    if home[:2] in (["torch", "_dynamo"], ["torch", "_inductor"]):
        return COMPILE.format(f"torch.compile failed ({_sentence(error)})")
    if isinstance(error, OSError) and error.errno in REMEDIES:
        where = f"{error.filename}: " if isinstance(error.filename, str) else ""
        return f"{where}{error.strerror}; {REMEDIES[error.errno]}"
    return None


def _sentence(error: Exception) -> str:
    """Return the first sentence of an exception's text, shortened."""
    text = first_line(error).split(". ")[0].rstrip(".")
    return text if len(text) <= 120 else f"{text[:117]}..."


def _internal(error: BaseException) -> str:
    """Keep the traceback of an error that nobody foresaw. Returns the message."""
    what = type(error).__name__ + (f": {_sentence(error)}" if isinstance(error, Exception) and str(error) else "")
    text = "".join(traceback.format_exception(error))
    process = f"process {os.environ.get('RANK', '0')} (number {os.getpid()})"
    content = f"{' '.join(map(quoted, command()))}\n{process}, Python {sys.version.split()[0]}\n\n{text}"
    try:
        return f"internal error: {what}; the traceback is in {_kept(content)}; please report it"
    except OSError:
        return f"internal error: {what}; {DEBUG}=1 prints the traceback; please report it"


def _kept(content: str) -> Path:
    """Write a text into a new file, which no other process has. Raises OSError."""
    data = content.encode("utf-8", "backslashreplace")
    for number in count(1) if _runs and (_runs[-1] / "config.json").exists() else ():
        try:
            file = _runs[-1] / ("error.txt" if number == 1 else f"error-{number}.txt")
            with file.open("xb") as opened:
                opened.write(data)
            return file
        except FileExistsError:
            continue
        except OSError:
            break
    handle, name = tempfile.mkstemp(prefix="resist-error-", suffix=".txt")
    with os.fdopen(handle, "wb") as opened:
        opened.write(data)
    return Path(name)


@contextmanager
def _threads_reported() -> Iterator[None]:
    """Report the errors of other threads in one line, too; the command goes on."""

    def report(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and not issubclass(arguments.exc_type, SystemExit):
            print_error(_internal(arguments.exc_value))

    before, threading.excepthook = threading.excepthook, report
    try:
        yield
    finally:
        threading.excepthook = before


def _is_first() -> bool:
    """Return True in the first process of a job, and in a process that is none of a job."""
    return os.environ.get("RANK", "").strip() in ("", "0")
