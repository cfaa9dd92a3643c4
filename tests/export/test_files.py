"""Exported files are complete, or not there; others are refused."""

import errno
import os
from pathlib import Path

import pytest
import torch

from exported import own
from resist.errors import UserError
from resist.export import load_scaled
from resist.export.files import state_of, write_state
from resist.runs.model_file import save_full


def test_a_disk_that_is_full_leaves_nothing_behind(tmp_path, monkeypatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_state(tmp_path / "x.pt", {"a": torch.zeros(3)}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path, monkeypatch, links: bool) -> None:
    path, link = tmp_path / "x.pt", os.link

    def late(source: Path, target: Path) -> None:
        target.write_text("precious")
        if not links:
            raise PermissionError("no links here")
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(UserError, match="exists already"):
        write_state(path, {"a": torch.zeros(3)}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]
    assert path.read_text() == "precious"


def test_a_file_that_is_no_export_is_refused(tmp_path) -> None:
    saved = tmp_path / "model.safetensors"  # as a run leaves it
    save_full(own(), (), (), saved)
    with pytest.raises(UserError, match="cannot be read"):
        load_scaled(own(), tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="give a file of resist export"):
        load_scaled(own(), saved)
    path = tmp_path / "x.safetensors"
    for state, scales in (({}, "{}"), (state_of(own()), '{"layer9.1": 0.5}'), (state_of(own()), "[")):
        path.unlink(missing_ok=True)
        write_state(path, state, {"format": "resist export 1", "scales": scales})
        with pytest.raises(UserError, match=r"another network|no block 'layer9.1'"):
            load_scaled(own(), path)
