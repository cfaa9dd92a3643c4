"""`resist` on a folder of photographs, as people use it."""

import json
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from commands import Commands
from photographs import make_folder
from resist.cli import main
from resist.runs.config import NetworkConfig, OptimizationConfig
from resist.tasks import open_task

SMALL = [
    "--data", "folder", "--model", "preact_resnet50_imagenet", "--model-args", "depths=1,1,5,1", "width=2",
    "--image-size", "32", "--workers", "2", "--min-depth", "0", "--batch-size", "8", "--local-steps", "2",
    "--num-evals", "1", "--device", "cpu",
]  # fmt: skip
LONG = [*SMALL, "--data-workers", "2", "--epochs", "3", "--warmup-rounds", "4", "--checkpoint-rounds", "2"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return make_folder(tmp_path / "data", train=16)


def resist(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def rounds_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_train_and_evaluate(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    (folder / "train/bee/bee_0.png").write_bytes(b"")
    options = ["--processes", "1", "--data-workers", "0", "--epochs", "2", "--warmup-rounds", "3", "--skip-bad-files"]
    (tmp_path / "smoothing.json").write_text('{"optimization": {"label_smoothing": 0.1}}')
    out = tmp_path / "run"
    status, text, err = resist(
        capsys,
        "train",
        *SMALL,
        *options,
        "--data-dir",
        str(folder),
        "--out",
        str(out),
        "--lr-schedule",
        "cosine",
        "--config",
        str(tmp_path / "smoothing.json"),
        "--precision",
        "bf16",
    )
    assert status == 0
    reading = "reading all {} files once to find those that cannot be read"
    expected = [f"resist: {folder / 'train'}: {reading.format(48)}", f"resist: {folder / 'val'}: {reading.format(9)}"]
    assert err.splitlines() == expected
    assert f"resist: {folder / 'train'}: left out 1 file: bee/bee_0.png (the file is empty)\n" in text
    records = rounds_of(out)
    assert [max(held) for held in (r["capacity"]["layer3:1-4"] for r in records)] == [4] * 3 + [2] * 3
    assert json.loads((out / "config.json").read_text())["optimization"]["label_smoothing"] == 0.1
    status, text, _ = resist(capsys, "evaluate", str(out), "--device", "cpu")
    assert text == f"test accuracy {100 * records[-1]['accuracy']:.2f} %\n"


@pytest.mark.slow
def test_plan_and_cost_know_the_folder(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    model = ["--model", "preact_resnet200_imagenet", "--chain", "layer2", "layer3", "--json"]
    status, text, _ = resist(capsys, "plan", "--data", "folder", "--data-dir", str(folder), *model)
    facts = json.loads(text)
    assert status == 0
    assert facts["parameters"] == 64_666_152 - 997 * 2049
    assert [(chain["name"], chain["blocks"]) for chain in facts["chains"]] == [("layer2:1-23", 23), ("layer3:1-35", 35)]
    small = ["--model", "preact_resnet50_imagenet", "--model-args", "depths=1,1,3,1", "width=2", "--workers", "2"]
    flops = []
    for size in ([], ["--image-size", "112"]):  # no files are needed
        status, text, _ = resist(capsys, "cost", "--data", "imagenet", *small, *size, "--json")
        assert status == 0
        flops.append(text)
    assert flops[0] != flops[1]


def test_plan_refuses_a_folder_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = resist(capsys, "plan", "--data", "folder", "--data-dir", "nowhere")
    assert (status, err.count("\n")) == (2, 1)
    assert "nowhere/train: No such file or directory; --data-dir has to" in err


def test_label_smoothing_is_in_the_loss(folder: Path) -> None:
    config = NetworkConfig(data="folder", data_dir=folder, image_size=32, data_workers=0)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 1])
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    logs = F.log_softmax(model(images), 1)
    expected = -0.8 * logs[torch.arange(4), labels].mean() - 0.2 * logs.mean()
    task = open_task(config, OptimizationConfig(label_smoothing=0.2))
    torch.testing.assert_close(task.loss(model, (images, labels)), expected)
    torch.testing.assert_close(open_task(config).loss(model, (images, labels)), -logs[torch.arange(4), labels].mean())


@pytest.mark.slow
def test_a_run_with_augmented_and_mixed_photographs(capsys, folder: Path, tmp_path: Path) -> None:
    """The whole recipe, in two kinds of hosting: the same batches, and so the same weights."""
    recipe = {"rand_augment": [2, 9], "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "clip_grad_norm": 1.0}
    (tmp_path / "recipe.json").write_text(json.dumps({"optimization": recipe | {"no_decay_norm_and_bias": True}}))
    options = [
        "--data-dir",
        str(folder),
        "--processes",
        "1",
        "--epochs",
        "1",
        "--config",
        str(tmp_path / "recipe.json"),
    ]
    options += ["--optimizer", "adamw", "--model-ema-decay", "0.9", "--grad-accum-steps", "2", "--lr", "0.01"]
    for out, data_workers in (("a", "0"), ("b", "2")):
        arguments = [*SMALL, *options, "--data-workers", data_workers, "--out", str(tmp_path / out)]
        status, text, err = resist(capsys, "train", *arguments)
        assert (status, err) == (0, "")
    scores = rounds_of(tmp_path / "a")[-1]["scores"]
    assert list(scores) == ["accuracy", "EMA accuracy"]
    for file in ("model.safetensors", "model_ema.safetensors"):
        a, b = load_file(tmp_path / "a" / file), load_file(tmp_path / "b" / file)
        assert all(torch.equal(a[name], b[name]) for name in a)
    status, text, _ = resist(capsys, "evaluate", str(tmp_path / "a"), "--device", "cpu")
    assert text == "".join(f"test {name} {100 * value:.2f} %\n" for name, value in scores.items())


@pytest.mark.slow
def test_a_file_that_cannot_be_read_ends_all_processes_with_one_line(
    commands: Commands, folder: Path, tmp_path: Path
) -> None:
    bad = folder / "train/cat/cat_5.JPEG"
    with Image.open(bad) as image:
        image.save(bad, quality=95)
    bad.write_bytes(bad.read_bytes()[:-200])
    done = commands.run("train", *LONG, "--data-dir", folder, "--out", tmp_path / "a")
    assert done.returncode == 2
    line = f"resist: {bad}: cannot be read (image file is truncated"
    assert [text[: len(line)] for text in done.stderr.splitlines()] == [line]
    none_is_left(commands)


def none_is_left(commands: Commands) -> None:
    """Wait until the processes that read have ended; the test's timeout is the limit."""
    while commands.left():
        time.sleep(0.05)


def interrupt() -> None:
    """Send SIGTERM to the whole group after the record of round 3, as a scheduler does."""
    import os
    import signal

    from resist.runs.directory import Run

    append = Run.append

    def appended(run, record):
        append(run, record)
        if record["round"] == 3:
            os.killpg(os.getpgid(0), signal.SIGTERM)

    Run.append = appended


@pytest.mark.slow
def test_a_run_that_was_interrupted_ends_with_the_same_weights(
    commands: Commands, folder: Path, tmp_path: Path
) -> None:
    """SIGTERM to the whole group, as a scheduler sends it, with processes that read; going on with other ones."""
    arguments = ["train", *LONG, "--processes", "1", "--data-dir", folder]
    undisturbed = commands.run(*arguments, "--out", tmp_path / "a")
    assert (undisturbed.returncode, undisturbed.stderr) == (0, "")
    out = tmp_path / "b"
    told = commands.run(*arguments, "--out", out, prelude=interrupt)
    assert (told.returncode, told.stderr) == (75, "")
    assert "resist train --resume" in told.stdout
    assert len(rounds_of(out)) == 4
    none_is_left(commands)
    again = commands.run("train", "--resume", out, "--data-workers", "1")
    assert (again.returncode, again.stderr) == (0, "")
    expected, found = (load_file(run / "model.safetensors") for run in (tmp_path / "a", out))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert [r["loss"] for r in rounds_of(out)] == [r["loss"] for r in rounds_of(tmp_path / "a")]
