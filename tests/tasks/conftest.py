"""Photographs with boxes, and the task of detecting them."""

from dataclasses import replace
from pathlib import Path

import pytest

import vockit
from detectors import SMALL
from resist.tasks import open_task
from resist.tasks.detection import Detection


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: a test that changes files draws its own."""
    root = tmp_path_factory.mktemp("kit")
    vockit.draw(root)
    return root


@pytest.fixture(scope="module")
def task(kit: Path) -> Detection:
    found = open_task(replace(SMALL, data_dir=kit), download=False)
    assert isinstance(found, Detection)
    return found
