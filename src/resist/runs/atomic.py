"""Atomic writes: a file appears with its whole new content, or stays as it was. Reads of a bounded size."""

import errno
import os
import select
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from resist.errors import PRINTABLE

# Bytes of a file of options or of a table, at most.
LARGEST_TABLE = 16 * 2**20
# Seconds that a pipe may take to its next bytes.
PIPE_S = 10.0


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Write a file under another name in the same folder, and rename it when the block ends without an error.

    Args:
        path: The file to write; its folder has to exist. A file that is there already is replaced.

    Yields:
        The path to write to. It is removed where the block raises.

    Raises:
        OSError: The file could not be flushed or renamed.
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def utf8_path(path: Path) -> Iterator[str]:
    """Yield a name of a file that is UTF-8, for libraries that open no other.

    Args:
        path: The file, which exists.

    Raises:
        OSError: The file cannot be opened.
    """
    if str(path).isprintable() or sys.platform != "linux":
        yield str(path)
        return
    with path.open("rb") as file:
        yield f"/proc/self/fd/{file.fileno()}"


def write_atomically(path: Path, content: str | bytes) -> None:
    r"""Write `content` to `path`, text as UTF-8 with `\xe9` for a byte that is not. Raises OSError."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode("utf-8", PRINTABLE) if isinstance(content, str) else content)


def write_new(path: Path, text: str) -> None:
    r"""Write `text` to a file that must not exist yet, as UTF-8 with `\xe9` for a byte that is not.

    Where writing fails, no part of it is left behind.

    Raises:
        OSError: It exists, or cannot be written.
    """
    with path.open("xb", buffering=0) as file:
        try:
            content = memoryview(text.encode("utf-8", PRINTABLE))
            while content:
                content = content[file.write(content) :]
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def read_small(path: Path) -> bytes:
    """Read a file, or a pipe as in `<(program)`, that has the size of a table at most.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read, is neither a file nor a pipe, is too large, or nothing comes from it.
    """
    content = bytearray()
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0) as file:
        kind = os.fstat(file.fileno())
        if stat.S_ISDIR(kind.st_mode):
            raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not (stat.S_ISREG(kind.st_mode) or stat.S_ISFIFO(kind.st_mode)):
            raise OSError(errno.EINVAL, "Not a file")
        if stat.S_ISFIFO(kind.st_mode):
            _wait(file.fileno())
        while part := file.read(2**20):
            content += part
            if len(content) > LARGEST_TABLE:
                raise OSError(errno.EFBIG, f"Larger than {LARGEST_TABLE // 2**20} MiB")
            if stat.S_ISFIFO(kind.st_mode):
                _wait(file.fileno())
    return bytes(content)


def _wait(pipe: int) -> None:
    """Wait until a pipe has more, or has ended. Raises OSError."""
    if not select.select([pipe], [], [], PIPE_S)[0]:
        raise OSError(errno.ETIMEDOUT, f"Nothing came from this pipe for {PIPE_S:.0f} s")
