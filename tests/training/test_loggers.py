"""TensorBoard and Weights & Biases: the numbers of metrics.jsonl, also after a resumption, and never fatal."""

import json
from pathlib import Path

import pytest

from report_runs import make_run
from resist.cli import main
from resist.errors import UserError
from resist.runs.config import MachineConfig, TrainConfig
from resist.runs.directory import Run
from resist.training.loggers import TensorBoard, open_loggers, scalars
from resist.training.recorder import Recorder

SMALL = ["--workers", "4", "--min-depth", "0", "--model-args", "depths=1,1,5,1", "width=4", "--batch-size", "32",
         "--local-steps", "3", "--epochs", "0.2", "--num-evals", "2", "--device", "cpu", "--batchnorm", "average",
         "--processes", "1"]  # fmt: skip


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(path: Path, name: str) -> list[tuple[int, float]]:
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module, reason="needs tensorboard")
    accumulated = accumulator.EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0})
    accumulated.Reload()
    return [(event.step, event.value) for event in accumulated.Scalars(name)]


def test_a_record_becomes_scalars(tmp_path: Path) -> None:
    record = lines(make_run(tmp_path / "run", rounds=3, num_evals=3))[2]
    values = scalars(record)
    assert values["loss"] == record["loss"]
    assert values["seconds/sync"] == record["seconds"]["sync"]
    assert values["bytes/shared"] == record["bytes"]["shared"]
    assert values["worker 2/loss"] == record["workers"][2]["loss"]
    assert "accuracy" in values
    assert "accuracy" not in scalars(record | {"accuracy": None})
    record["workers"][1]["loss"] = None  # it was no number
    assert "worker 1/loss" not in scalars(record)
    assert all(isinstance(value, int | float) for value in values.values())


def test_tensorboard_hides_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    records = lines(make_run(tmp_path / "run", rounds=6))
    first = TensorBoard(tmp_path / "run", [])
    for record in records[:5]:
        assert first.write(record) == ""
    first.close()
    again = TensorBoard(tmp_path / "run", records[:3])
    for record in records[3:]:
        again.write(record | {"loss": 7.0})
    again.close()
    logged = events(tmp_path / "run", "loss")
    assert logged == [(r["step"], pytest.approx(r["loss"] if i < 3 else 7.0)) for i, r in enumerate(records)]


@pytest.mark.slow
def test_both_log_what_metrics_jsonl_says(capsys, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["train", *SMALL, "--log", "tensorboard", "wandb", "--out", str(run)])
    assert ended.value.code == 0, capsys.readouterr().err
    written = lines(run)
    assert events(run, "loss") == [(r["step"], pytest.approx(r["loss"])) for r in written]
    assert len(events(run, "accuracy")) == 2
    (offline,) = (run / "wandb").glob("offline-run-*/*.wandb")
    content = offline.read_bytes()
    for name in (b"worker 3/compute_s", b"seconds/sync", b"local_steps"):
        assert name in content


def test_a_missing_package_is_named_before_anything_is_written(capsys, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("resist.training.loggers.importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(SystemExit) as ended:
            main(["train", *SMALL, "--log", name, "--out", str(tmp_path / "run")])
        err = capsys.readouterr().err
        assert (ended.value.code, err.count("\n")) == (2, 1)
        assert f"--log {name} needs the package {name}; pip install 'torch-resist[{name}]'" in err
        assert not (tmp_path / "run").exists()


def test_a_logger_that_fails_is_left_out_and_the_run_goes_on(capsys, tmp_path: Path) -> None:
    class Broken:
        calls = 0

        def write(self, record: object) -> str:
            self.calls += 1
            return "broken: no disk"

        def close(self) -> None: ...

    broken, records = Broken(), lines(make_run(tmp_path / "source", rounds=3))
    run = Run(tmp_path / "run", TrainConfig())
    with Recorder(TrainConfig(), 3, run, [broken]) as recorder:
        for record in records:
            recorder.round(record)
    assert broken.calls == 1
    assert len(lines(tmp_path / "run")) == 3
    assert capsys.readouterr().out.count("broken: no disk; training continues without it") == 1
    assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "finished"


def test_a_run_that_fails_says_so_in_its_state(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", TrainConfig())

    def fail() -> None:
        with Recorder(TrainConfig(), 3, run, []):
            assert json.loads((tmp_path / "run" / "state.json").read_text())["state"] == "running"
            raise UserError("the disk is full")

    with pytest.raises(UserError):
        fail()
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["state"], state["error"], state["rounds"]) == ("failed", "the disk is full", 3)


def test_wandb_that_cannot_start_is_one_line(tmp_path: Path, monkeypatch) -> None:
    wandb = pytest.importorskip("wandb", reason="needs wandb")

    def refuse(**_options: object) -> None:
        raise wandb.errors.UsageError("no API key\nconfigured")

    monkeypatch.setattr(wandb, "init", refuse)
    run = make_run(tmp_path / "run", rounds=1)
    with pytest.raises(UserError, match="`log=wandb`: no API key configured; set WANDB_MODE=offline"):
        open_loggers(TrainConfig(machine=MachineConfig(log=("wandb",))), run, [])
