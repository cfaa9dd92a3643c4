"""Standard output and standard error of a command: they take every text, and losing their reader loses no run."""

import errno
import io
import os
import re
import select
import sys
from typing import TextIO

from resist.errors import PRINTABLE, shown


class OutputError(Exception):
    """Standard output cannot be written.

    Args:
        number: Number of the operating system's error.

    Attributes:
        closed: Its reader has ended, as `head` does, or its terminal was closed.
    """

    def __init__(self, number: int) -> None:
        super().__init__(
            f"standard output cannot be written: {os.strerror(number)}; give it another file, or make room"
        )
        self.closed = number in (errno.EPIPE, errno.EIO)


def open_streams(*, lasting: bool) -> None:
    r"""Prepare the standard streams of this process.

    What their encoding does not have is written in ASCII, names of files that are not UTF-8 as in `\xe9`. Where a
    stream can no longer be written, what is printed is dropped from then on.

    Args:
        lasting: The command goes on without standard output, whose loss is reported on standard error. Otherwise
            losing it raises OutputError.
    """
    _fill_closed()
    for name, number, dropping in (("stdout", 1, lasting), ("stderr", 2, True)):
        stream = getattr(sys, name)
        file = getattr(getattr(stream, "buffer", None), "raw", None)
        if isinstance(file, _File):  # of an earlier command in this process
            file.dropping = dropping
        elif stream is None:  # it was closed as this process began
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__"):
            stream.flush()
            setattr(sys, name, _wrapped(stream, _File(number, dropping)))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=PRINTABLE)


def print_error(text: str) -> None:
    """Print a line on standard error in one write, because several processes may print at the same time.

    Line breaks and control characters, which a value or a path may contain, are written as in `\\n`. A value that is
    longer than any name of a file is shortened.
    """
    text = re.sub(r"[^\s/]{260,}", lambda long: f"{long[0][:60]}...", shown(text))
    print(f"resist: {text}\n", end="", file=sys.stderr, flush=True)


class _File(io.RawIOBase):
    """An open file that continues as /dev/null once it cannot be written."""

    def __init__(self, number: int, dropping: bool) -> None:
        super().__init__()
        self._number, self.dropping = number, dropping

    def write(self, data: object) -> int:
        try:
            return os.write(self._number, data)  # type: ignore[arg-type]
        except BlockingIOError:  # another program has changed the terminal so: wait, and be called again
            select.select([], [self._number], [])
            return 0
        except OSError as error:
            number = error.errno or errno.EIO
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._number)
        os.close(null)
        if not self.dropping:
            raise OutputError(number)
        if self._number == 1:
            print_error(f"standard output is lost ({os.strerror(number)}); the command goes on without it")
        return len(memoryview(data))  # type: ignore[arg-type]

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._number

    def isatty(self) -> bool:
        return os.isatty(self._number)


def _wrapped(stream: TextIO, file: _File) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(file),
        encoding=stream.encoding,
        errors=PRINTABLE,
        line_buffering=stream.line_buffering,  # type: ignore[attr-defined]
        write_through=stream.write_through,  # type: ignore[attr-defined]
    )


def _fill_closed() -> None:
    """Open /dev/null in place of standard streams that are closed: the next file that is opened takes their number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
