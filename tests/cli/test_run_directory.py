"""What a command refuses of a run directory before anything is started: one that is in use, or cannot be continued."""

import json
import os
from pathlib import Path

import pytest

from resist.cli import main, train
from resist.runs.config import OptimizationConfig, RunConfig, TrainConfig
from resist.runs.lock import RunLock


def resist(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and stderr of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    return int(ended.value.code or 0), capsys.readouterr().err


class Started(BaseException):
    """The processes would be started now."""


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_arguments: object) -> int:
        raise Started

    monkeypatch.setattr(train, "_start_processes", started)


def made(path: Path, rounds: int = 0, state: str = "failed", **files: str) -> Path:
    """A run directory of a run on digits with a checkpoint every two rounds."""
    path.mkdir(parents=True)
    config = TrainConfig(optimization=OptimizationConfig(epochs=1), run=RunConfig(path, checkpoint_rounds=2))
    (path / "config.json").write_text(json.dumps(config.to_json()))
    (path / "state.json").write_text(json.dumps({"state": state}))
    (path / "metrics.jsonl").write_text("".join(f'{{"round": {n}, "step": {n}}}\n' for n in range(1, rounds + 1)))
    for name, text in files.items():
        (path / name.replace("_", ".")).write_text(text)
    return path


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [["train", "--resume", "RUN"], ["evaluate", "RUN", "--readings"], ["export", "RUN", "--to", "torch"]],
    ids=lambda arguments: arguments[0],
)
def test_a_directory_that_is_in_use_is_left_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    run = made(tmp_path / "run", rounds=3)
    with RunLock(run, "train", beat=False):
        before = snapshot(run)
        status, err = resist(capsys, *(run if word == "RUN" else word for word in arguments))
        assert (status, err.count("\n")) == (2, 1)
        assert f"{run} is in use by process {os.getpid()} on " in err
        assert "since 20" in err
        assert "wait until it has ended, or stop it there; resist watch" in err
        assert snapshot(run) == before


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rounds": 5}, "has the records of 5 rounds, but no checkpoint to continue from; copy one into"),
        ({"rounds": 1, "state": "interrupted"}, "has the records of 1 round, but no checkpoint to continue from"),
        ({"rounds": 3, "state": "finished"}, "has ended after 3 rounds, and has no checkpoint to continue from"),
        ({"rounds": 3, "model_safetensors": ""}, "has ended after 3 rounds, and has no checkpoint"),
        ({"rounds": None}, "has neither a checkpoint to continue from nor a metrics.jsonl"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value.items())),
)
def test_a_run_that_would_lose_what_it_has_done_is_not_resumed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, object], text: str
) -> None:
    rounds = changes.pop("rounds")
    run = made(tmp_path / "run", rounds or 0, **changes)  # type: ignore[arg-type]
    if rounds is None:
        (run / "metrics.jsonl").unlink()
    before = snapshot(run)
    status, err = resist(capsys, "train", "--resume", run)
    assert (status, err.count("\n")) == (2, 1)
    assert text in err
    assert "or train again with another --out" in err
    assert snapshot(run) == before


@pytest.mark.parametrize("state", ["running", "failed"])
def test_a_run_that_was_ended_before_its_first_checkpoint_begins_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, state: str
) -> None:
    """As a job that is queued again does."""
    run = made(tmp_path / "run", rounds=3, state=state)
    with pytest.raises(Started):
        main(["train", "--resume", str(run)])
    assert not (run / "lock").exists()
