"""The reader of run directories: totals, damage, gaps, other versions."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resist.errors import UserError
from resist.runs.config import TrainConfig
from resist.runs.config_file import read_config, read_options
from resist.runs.directory import Run
from resist.runs.follower import Follower
from resist.runs.history import missing_rounds, read_history, read_past, warn_of_rounds
from resist.training.progress import Summary


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
    with pytest.raises(UserError, match=r"line 2 of .* is damaged"):  # time does not run backward
        read_history(run(tmp_path, [GOOD[0], GOOD[1].replace("0.25", "-0.25"), GOOD[2]]))
    for lines in ([], ["damaged\n"]):
        with pytest.raises(UserError, match=r"holds no complete round; .* or the file is damaged"):
            read_history(run(tmp_path, lines))
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


def test_bytes_of_replicas_count_in_the_report_as_in_the_display_and_in_until(tmp_path: Path) -> None:
    lines = [record(number, None) for number in (1, 2)]
    for line in lines:
        line["bytes"] = {"shared": 100, "replica": 7, "evaluate": 1000}
    history = read_history(run(tmp_path, [json.dumps(line) + "\n" for line in lines]))
    summary = Summary(2)
    for line in history.rounds:
        summary.add(line)
    assert history.bytes == [107, 214]
    assert summary.bytes == history.bytes[-1]
    assert summary.training_s == history.seconds[-1]


def test_gaps_are_refused_but_for_those_that_a_resumption_has_recorded(tmp_path: Path) -> None:
    path = run(tmp_path, [GOOD[0], GOOD[2], json.dumps(record(7, None)) + "\n"])
    for known in ([], [[2, 2]], "odd"):
        (path / "environment.json").write_text(json.dumps({"missing_rounds": known}))
        with pytest.raises(UserError, match=r"no record of round.*; restore the file, or keep only the lines"):
            read_history(path)
    (path / "environment.json").write_text(json.dumps({"missing_rounds": [[2, 2], [4, 6]]}))
    (note,) = [note for note in read_history(path).notes if "no record" in note]
    assert "no record of round 2 (and 1 other gap)" in note
    assert [line["round"] for _, line in read_past(path, 1)] == [1]
    with pytest.raises(UserError, match=r"no record of round 2 .*restore the file, or delete it"):
        read_past(path, 7)
    assert [line["round"] for _, line in read_past(path, 7, [[2, 2], [4, 6]])] == [1, 3, 7]
    for odd in (None, 3, [[1]], [["a", "b"]], [[2, 2]]):
        with pytest.raises(UserError, match="no record of"):
            read_past(path, 7, odd)
    assert missing_rounds([3, 4, 6]) == [(1, 2), (5, 5)]


@pytest.mark.parametrize("numbers", [(1, 2, 3, 2, 3), (1, 2, 2), (1, 1, 2, 2, 3, 3), (1, 3, 2)])
def test_records_of_two_processes_are_not_added_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, numbers: tuple[int, ...]
) -> None:
    path = run(tmp_path, [json.dumps(record(number, None)) + "\n" for number in numbers])
    twice = r"metrics\.jsonl has round . after round .* two processes have written to it; restore the file, or"
    for read in (read_history, lambda path: read_past(path, 3), lambda path: Follower(path).read()):
        with pytest.raises(UserError, match=twice):
            read(path)
    warn_of_rounds(path)  # its network may be used
    (warning,) = caplog.messages
    assert "two processes have written to it" in warning


def test_a_run_without_records_or_with_all_of_them_gives_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_rounds(tmp_path)
    warn_of_rounds(run(tmp_path, [*GOOD, GOOD[0][:30]]))
    assert not caplog.messages


def test_a_round_whose_record_was_lost_with_its_process_does_not_prevent_a_second_resumption(tmp_path: Path) -> None:
    """Replicas of round 4 survive the process that would have written the record of round 4."""
    path = run(tmp_path, GOOD)
    (path / "environment.json").write_text(json.dumps({"started": "then"}))
    for last, recorded in ((4, [1, 2, 3]), (5, [1, 2, 3, 5])):
        with contextlib.closing(Run(path, TrainConfig(), last)) as resumed:
            assert [line["round"] for line in resumed.past] == recorded
            resumed.append(record(last + 1, None))
        environment = json.loads((path / "environment.json").read_text())
        assert environment["missing_rounds"] == [[4, 4]]
        assert environment["started"] == "then"
    assert "".join(GOOD) in (path / "metrics.jsonl").read_text()  # lines stay as they were


def test_a_damaged_line_on_resume_is_named_and_a_cut_last_one_left_out(tmp_path: Path) -> None:
    path = run(tmp_path, [*GOOD, GOOD[0][:30]])
    assert [line["round"] for _, line in read_past(path, 3)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"line 1 of .* is damaged"):
        read_past(run(tmp_path, ["{}\n", *GOOD]), 3)
    (path / "metrics.jsonl").unlink()
    assert read_past(path, 3) == []


def test_runs_of_other_versions_are_refused_in_one_line(tmp_path: Path) -> None:
    data = TrainConfig().to_json()
    old = {("optimizer" if part == "optimization" else part): values for part, values in data.items()}
    (tmp_path / "config.json").write_text(json.dumps(old))
    refused = r"was written by another version of resist \(its config.json has the entry 'optimizer'\); train again"
    with pytest.raises(UserError, match=refused):
        read_config(tmp_path)
    with pytest.raises(UserError, match=refused):  # the learning rate and the batch size would be those of no run
        read_options(tmp_path, [])
    for name in ("loaders", "telepathy"):
        (tmp_path / "config.json").write_text(json.dumps(data | {"network": data["network"] | {name: 1}}))
        with pytest.raises(UserError, match=f"was written by another version .*{name}"):
            read_config(tmp_path)
        notes: list[str] = []
        read_options(tmp_path, notes)
        assert name in notes[0]


@pytest.mark.parametrize("method", [3, {"workers": 0}, {"workers": 10**30}])
def test_a_configuration_that_no_run_can_have_is_damaged(tmp_path: Path, method: object) -> None:
    """A report on it would show the values of no run, or never end."""
    (tmp_path / "config.json").write_text(json.dumps({"method": method}))
    with pytest.raises(UserError, match=r"config\.json is damaged: method.* is not a .*; restore it"):
        read_options(tmp_path, [])


def test_damage_after_the_last_kept_round_does_not_stop_a_resumption(tmp_path: Path) -> None:
    """Those rounds are done again; damage before it is refused, with a remedy that works."""
    path = run(tmp_path, [GOOD[0], "{broken\n", *GOOD[1:]])
    assert [record["round"] for _, record in read_past(path, 1)] == [1]
    with pytest.raises(UserError, match=r"line 2 of .* is damaged; restore the file, or delete it to resume without"):
        read_past(path, 2)
    (path / "metrics.jsonl").unlink()
    assert read_past(path, 2) == []
