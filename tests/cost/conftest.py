"""Predictions in these tests measure each network once."""

import sys

import pytest
from cost_cases import measure_once


@pytest.fixture(autouse=True)
def _measure_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["resist.cost.predict"], "measure", measure_once)
