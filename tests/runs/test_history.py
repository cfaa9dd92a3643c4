import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resist.errors import UserError
from resist.runs.config import TrainConfig
from resist.runs.history import read_history


def record(round: int, accuracy: float | None) -> dict[str, object]:
    return {
        "round": round, "step": 5 * round, "loss": 1.0, "accuracy": accuracy,
        "seconds": {"compute": 1.0, "wait": 0.5, "sync": 0.25, "evaluate": 9.0},
        "bytes": {"shared": 100, "blocks": 10, "evaluate": 1000},
    }  # fmt: skip


def run(path: Path, lines: list[str]) -> Path:
    (path / "config.json").write_text(json.dumps(TrainConfig().to_json()))
    (path / "metrics.jsonl").write_text("".join(lines))
    return path


GOOD = [json.dumps(record(1, None)) + "\n", json.dumps(record(2, 0.5)) + "\n", json.dumps(record(3, 0.75)) + "\n"]


def test_a_run_is_added_up_without_evaluations(tmp_path: Path) -> None:
    history = read_history(run(tmp_path, GOOD))
    assert history.seconds == [1.75, 3.5, 5.25]
    assert history.bytes == [110, 220, 330]
    assert history.steps == [5, 10, 15]
    assert (history.tested, history.accuracies) == ([1, 2], [0.5, 0.75])
    assert [history.reached(a) for a in (0.4, 0.6, 0.8)] == [1, 2, None]
    assert history.total("compute") == 3.0


def test_a_cut_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    assert len(read_history(run(tmp_path, [*GOOD, GOOD[0][:30]])).rounds) == 3
    with pytest.raises(UserError, match=r"line 2 of .* is damaged"):
        read_history(run(tmp_path, [GOOD[0], GOOD[1][:30] + "\n", GOOD[2]]))
    with pytest.raises(UserError, match="holds no round"):
        read_history(run(tmp_path, []))
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_history(tmp_path)


@given(st.lists(st.sampled_from(GOOD) | st.text(max_size=30) | st.sampled_from(["[]\n", "3\n", "null\n", "{}\n"])))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_metrics_are_read_or_refused_in_one_line(tmp_path: Path, lines: list[str]) -> None:
    try:
        read_history(run(tmp_path, lines))
    except UserError as error:
        assert "\n" not in str(error)
