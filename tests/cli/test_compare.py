"""`resist compare`: what it makes, how it goes on, and what it refuses."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from resist.cli import compare as module
from resist.cli import main
from resist.runs.config import TrainConfig
from resist.runs.directory import Run

FAST = [
    "--workers", "4", "--min-depth", "0", "--model-args", "depths=1,1,5,1", "width=4", "--batch-size", "32",
    "--local-steps", "3", "--epochs", "0.2", "--num-evals", "2", "--device", "cpu", "--batchnorm", "average",
    "--processes", "1",
]  # fmt: skip
SEEDS = ["--seeds", "0", "1"]
RUNS = ["local_sgd-seed0", "local_sgd-seed1", "resist-seed0", "resist-seed1"]


def resist(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def rounds(path: Path) -> list[int]:
    return [json.loads(line)["round"] for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_it_trains_each_strategy_and_goes_on_after_an_interruption(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the second of four runs, a third that is only a folder, and a fourth that is missing."""
    out, append = tmp_path / "both of them", Run.append

    def appended(run: Run, record: Any) -> None:
        append(run, record)
        if run.path.name == "resist-seed1" and record["round"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "append", appended)
        status, text, _ = resist(capsys, "compare", *FAST, *SEEDS, "--out", out)
    assert status == 75
    assert text.endswith(f"to go on with the comparison: resist compare --resume '{out}'\n")
    assert rounds(out / "resist-seed1") == [1, 2]
    assert not (out / "lock").exists()
    (out / "local_sgd-seed0").mkdir()  # as where the process was killed at that moment
    (out / "local_sgd-seed0" / "metrics.jsonl").touch()

    weights = (out / "resist-seed0" / "model.safetensors").stat()
    status, text, err = resist(capsys, "compare", "--resume", out, *FAST)
    assert (status, err) == (0, "")
    assert f"[1/4] {out / 'resist-seed0'}: finished before" in text
    assert (out / "resist-seed0" / "model.safetensors").stat() == weights
    assert sorted(p.name for p in out.iterdir()) == [
        "compare.json", "compare.png", "compare.svg", *RUNS, "settings.json"
    ]  # fmt: skip
    assert all(rounds(out / name) == [1, 2, 3] for name in RUNS)
    rows = {row["strategy"]: row for row in json.loads((out / "compare.json").read_text())["rows"]}
    assert rows["resist"]["bytes"] < rows["local_sgd"]["bytes"]
    assert rows["local_sgd"]["speed_up"]["time"] == 1
    assert rows["resist"]["steps"] == rows["local_sgd"]["steps"] == 9
    assert rows["resist"]["accuracy_sd"] is not None
    assert "<svg" in (out / "compare.svg").read_text()
    assert "local_sgd" in text

    status, _, _ = resist(capsys, "train", *FAST, "--seed", "1", "--out", tmp_path / "undisturbed")
    assert status == 0
    expected = load_file(tmp_path / "undisturbed" / "model.safetensors")
    found = load_file(out / "resist-seed1" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seed", "1"], "compare takes --seeds"),
        (["--strategy", "resist"], "compare takes --strategies"),
        (["--strategies", "magic"], "--strategy 'magic' is not one of resist, local_sgd, diloco, ddp"),
        (["--strategies", "resist", "resist"], "--strategies resist resist names one twice; name each once"),
        (["--seeds", "1", "1"], "--seeds 1 1 names one twice"),
        (["--strategies"], "--strategies needs a value"),
        (["--strategies="], "--strategies needs a value"),
        (["--strategies", ""], "--strategies needs a value"),
        (["--strategies", "resist", ""], "--strategy '' is not one of"),
        (["--seeds"], "--seeds needs a value"),
        (["--seeds", "--strategies", "resist"], "--seeds needs a value"),
        (["--seeds="], "--seeds needs a value"),
        (["--data", "cifar"], "--data cifar is not known"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_it_cannot_compare_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], text: str
) -> None:
    status, _, err = resist(capsys, "compare", *arguments, "--out", tmp_path / "x")
    assert (status, err.count("\n")) == (2, 1)
    assert text in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["strategies", "seeds"])
def test_nothing_to_compare_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str) -> None:
    """Also where the record is not made by the command line."""
    path = compared(tmp_path / "x", **{name: []})
    status, _, err = resist(capsys, "compare", "--resume", path)
    assert (status, err) == (2, f"resist: --{name} names none; give at least one\n")


def compared(path: Path, *run_names: str, **changes: Any) -> Path:
    """The directory of a comparison with these runs, which are finished."""
    path.mkdir()
    options = TrainConfig().to_json()
    settings = {"strategies": ["resist", "local_sgd"], "seeds": [0], "options": options, **changes}
    (path / "settings.json").write_text(json.dumps(settings))
    for name in run_names:
        (path / name).mkdir()
        (path / name / "config.json").write_text(json.dumps(options | {"run": {**options["run"], "seed": 5}}))
    return path


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--lr", "0.5"], "--lr cannot change in a comparison that goes on; remove it"),
        (["--seeds", "0", "1"], "--seeds cannot change in a comparison that goes on"),
        (["--strategies", "resist"], "--strategies cannot change in a comparison that goes on"),
        (["--workers", "2"], "--workers cannot change in a comparison that goes on"),
        (["--out", "y"], "--out y and --resume x contradict each other; give one"),
        (["--device", "none"], "--device 'none' is not one of"),
        ([], "resist-seed0 was trained with --seed 5, the comparison has 0; move it elsewhere, and it is trained"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_comparison_goes_on_with_its_own_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    compared(Path("x"), *([] if arguments else ["resist-seed0"]))
    status, _, err = resist(capsys, "compare", "--resume", "x", *arguments)
    assert (status, err.count("\n")) == (2, 1)
    assert text in err


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"strategies": 3, "seeds": [], "options": {}}'])
def test_what_is_not_a_comparison_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "settings.json").write_text(content)
    status, _, err = resist(capsys, "compare", "--resume", tmp_path)
    assert (status, err.count("\n")) == (2, 1)
    assert ("is not a directory of resist compare" if content is None else "settings.json is damaged") in err


def test_machine_options_may_change(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, started = compared(tmp_path / "x"), list[TrainConfig]()
    monkeypatch.setattr(module, "start", lambda run: started.append(run) or 1)
    status, _, err = resist(capsys, "compare", "--resume", path, "--processes", "2", "--data-dir", "elsewhere")
    assert (status, err) == (1, "")
    (run,) = started
    assert (run.machine.processes, run.network.data_dir, run.run.seed) == (2, Path("elsewhere"), 0)
    assert run.run.out == path / "resist-seed0"
    assert run.run.resume is None


def test_a_second_comparison_in_the_same_directory_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, errors = compared(tmp_path / "x"), list[str]()

    def start(run: TrainConfig) -> int:
        errors.append(resist(capsys, "compare", "--resume", path)[2])
        return 1

    monkeypatch.setattr(module, "start", start)
    resist(capsys, "compare", "--resume", path)
    assert len(errors) == 1
    assert f"{path} is in use by process {os.getpid()} on " in errors[0]
