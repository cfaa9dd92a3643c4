"""Tests of the benchmark of recording: a round can be recorded in each way that the table names."""

from pathlib import Path

import pytest

import recording
from report_runs import record

ROUND = record(0, rounds=2, plan=((0,), (1,)), pairs={}, share=0.5, times=1)


@pytest.mark.slow
@pytest.mark.parametrize("way", recording.WAYS)
def test_a_round_is_recorded(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    if recording.WAYS[way]:
        pytest.importorskip(way, reason=f"needs {way}")
    recording.per_round(tmp_path / "run", way, [ROUND], 1)
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    for logger in recording.WAYS[way]:
        assert list((tmp_path / "run" / logger).iterdir())
