"""Runs with an average of the weights (EMA): saved, tested, resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from resist.cli import main
from resist.planning.strategy import resist as resist_strategy
from resist.runs.replicas import write_replicas
from resist.sync.local import Local
from resist.training.resume import find_resume_point
from resist.training.trainer import start_average
from support import make
from support import train as train_rounds

SMALL = [
    "--workers", "2", "--min-depth", "0", "--model-args", "depths=1,1,3,1", "width=4", "--batch-size", "32",
    "--local-steps", "3", "--epochs", "0.2", "--num-evals", "2", "--device", "cpu", "--processes", "1", "--lr", "0.01",
    "--checkpoint-rounds", "2",
]  # fmt: skip
RECIPE = {"no_decay_norm_and_bias": True, "clip_grad_norm": 1.0, "mixup": 0.2, "cutmix": 1.0}
RESUMED = ["--optimizer", "adamw", "--model-ema-decay", "0.8"]


def run(capsys: Any, *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return out


def files(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / name) for name in ("model.safetensors", "model_ema.safetensors")]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("timm:lamb", "sgd", "rmsprop", "nadam"))],
)
def test_a_run_that_resumes_ends_as_one_that_was_not_interrupted(capsys, tmp_path: Path, optimizer: str) -> None:
    """Bit for bit: optimizer state, average, and mixed images."""
    if optimizer.startswith("timm"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    (tmp_path / "recipe.json").write_text(json.dumps({"optimization": RECIPE}))
    options = [*SMALL, "--config", tmp_path / "recipe.json", "--optimizer", optimizer, "--model-ema-decay", "0.8"]
    options += ["--weight-decay", "0.01"]
    run(capsys, "train", *options, "--out", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    newest = max((tmp_path / "again/checkpoints").iterdir())
    assert int(newest.name.removeprefix("round-")) == records(tmp_path / "whole")[-1]["round"]
    shutil.rmtree(newest)
    for file in (tmp_path / "again").glob("model*.safetensors"):
        file.unlink()
    run(capsys, "train", "--resume", tmp_path / "again")
    for whole, again in zip(files(tmp_path / "whole"), files(tmp_path / "again"), strict=True):
        assert whole.keys() == again.keys()
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert records(tmp_path / "whole")[-1]["scores"] == records(tmp_path / "again")[-1]["scores"]


@pytest.mark.slow
@pytest.mark.parametrize("batchnorm", ["recalibrate", "average", "batch"])
def test_the_average_is_tested_and_saved_beside_the_weights(capsys, tmp_path: Path, batchnorm: str) -> None:
    out = run(capsys, "train", *SMALL, "--model-ema-decay", "0.8", "--batchnorm", batchnorm, "--out", tmp_path / "run")
    last = records(tmp_path / "run")[-1]
    assert list(last["scores"]) == ["accuracy", "EMA accuracy"]
    assert last["accuracy"] == last["scores"]["accuracy"]
    weights, average = files(tmp_path / "run")
    assert weights.keys() == average.keys()
    change = max(
        float((weights[name] - average[name]).abs().max()) for name in weights if name.endswith("conv1.weight")
    )
    assert 1e-5 < change < 0.1
    out = run(capsys, "evaluate", tmp_path / "run", "--device", "cpu")
    lines = [f"test {name} {100 * value:.2f} %" for name, value in last["scores"].items()]
    assert out.splitlines() == lines
    run(capsys, "report", tmp_path / "run")
    assert "test EMA accuracy" in (tmp_path / "run/report.html").read_text()


@pytest.mark.slow
def test_an_average_goes_on_with_another_number_of_workers(capsys, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(capsys, "train", *SMALL, "--model-ema-decay", "0.999", "--out", out)
    before = files(out)[1]
    newest = max((out / "checkpoints").iterdir())
    shutil.rmtree(newest)
    run(capsys, "train", "--resume", out, "--workers", "1")
    after = files(out)[1]
    name = "layer3.1.conv1.weight"
    assert 0 < float((before[name] - after[name]).abs().max()) < 0.01  # 1/1000 of the way in each step


def test_after_a_loss_the_average_begins_anew_with_the_weights_of_the_replicas(
    capsys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from resist.runs.config import MethodConfig, OptimizationConfig, RunConfig, TrainConfig

    strategy = resist_strategy(2, 2, capacities=(4, 3))
    job, optimizers = make(strategy, replicate=True)
    train_rounds(job, optimizers, 4)
    write_replicas(tmp_path / "replicas", job, "attempt")
    config = TrainConfig(
        method=MethodConfig(workers=2),
        optimization=OptimizationConfig(model_ema_decay=0.9),
        run=RunConfig(resume=tmp_path),
    )
    point = find_resume_point(config, Local(2))
    again, new = make(strategy, replicate=True, resume_at=(point.round, point.step))
    again.follow(*(start_average(worker.model, 0.9) for worker in again.workers))
    point.restore(again, tuple(new))
    for averaged in (False, True):
        full, expected = again.full_model(averaged=averaged), job.full_model()
        assert full is not None
        assert expected is not None
        for (name, a), b in zip(full.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b), name
