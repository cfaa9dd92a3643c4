"""A file that is written atomically has its old or its new content, never a part."""

import resource
import signal
from pathlib import Path

import pytest

from resist.runs.atomic import atomic_path, write_atomically, write_new


def test_text_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "ä")
    write_atomically(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_leaves_the_old_content_and_no_other_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "old")
    with pytest.raises(TypeError), atomic_path(tmp_path / "a") as partial:
        partial.write_text(b"half of")  # type: ignore[arg-type]
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere"):
        write_atomically(tmp_path / "nowhere" / "a", "x")


def test_a_new_file_is_whole_or_not_there(tmp_path: Path) -> None:
    write_new(tmp_path / "a", "ä\udcff")
    assert (tmp_path / "a").read_bytes() == "ä\\xff".encode()
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "a", "other")
    assert (tmp_path / "a").read_bytes() == "ä\\xff".encode()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # in place of a full disk
    try:
        with pytest.raises(OSError, match="File too large"):
            write_new(tmp_path / "b", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
