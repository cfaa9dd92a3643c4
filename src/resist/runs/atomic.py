"""Atomic writes: a file appears with its whole new content, or stays as it was."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, text as UTF-8. Raises OSError."""
    with atomic_path(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
