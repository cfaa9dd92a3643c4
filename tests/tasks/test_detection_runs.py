"""`resist` on photographs with boxes, as people use it."""

import json
from pathlib import Path

import pytest

import vockit
from detectors import ARGUMENTS, classification_run, cli

pytestmark = pytest.mark.slow


def test_train_evaluate_and_go_on(capsys, tmp_path) -> None:
    """Also without the run that the backbone started from, which is not needed any more."""
    vockit.draw(tmp_path)
    classification_run(tmp_path / "start")
    out = tmp_path / "run"
    common = ["--data-dir", str(tmp_path), "--processes", "1", "--out", str(out), "--num-evals", "1"]
    status, text, err = cli(
        capsys, "train", *ARGUMENTS, *common, "--epochs", "4", "--until", "rounds=2",
        "--init-from", str(tmp_path / "start"),
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "chain backbone.body.layer3:1-4: 4 blocks, the workers hold 2 2" in text
    assert "test AP50 (11 points)" in text
    assert "accuracy" not in text
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["round"] == 2
    assert list(record["scores"]) == ["AP50 (11 points)", "AP50 (area)"]
    assert record["accuracy"] == record["scores"]["AP50 (11 points)"]
    (tmp_path / "start").rename(tmp_path / "gone")
    status, text, _ = cli(capsys, "evaluate", str(out), "--device", "cpu")
    assert status == 0
    values = record["scores"].values()
    assert text == "".join(f"test {n} {100 * v:.2f} %\n" for n, v in zip(record["scores"], values, strict=True))
    state = out / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"state": "training"}))  # as a kill leaves it
    status, _, err = cli(capsys, "train", "--resume", str(out))
    assert (status, err) == (0, "")
    rounds = [json.loads(line)["round"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [1, 2]  # the limit was reached: it is tested, and finished
    assert json.loads(state.read_text())["state"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--data", "coco"], "--data coco is not known; choose one of"),
        (
            ["--data", "voc2007", "--model", "timm:resnet50"],
            "--data voc2007 needs a pre-activation ResNet as the detector's",
        ),
        (["--config", "splits.json"], "network.splits has no effect with --data digits"),
        (["--image-size", "64"], "--image-size has no effect with --data digits"),
        (["--init-from", "x"], "--init-from 'x' is not of the form timm:FILE"),
        ([*ARGUMENTS, "--model-args", "final_norm=true"], "--model-args final_norm has no effect with --data voc2007"),
        ([*ARGUMENTS, "--config", "smoothing.json"], "optimization.label_smoothing has no effect with --data voc2007"),
        ([*ARGUMENTS, "--init-from", "timm:x"], "--init-from timm:x has no effect with this network; give --model"),
        ([*ARGUMENTS, "--compile"], "--compile does not support detection"),
        ([*ARGUMENTS, "--init-from", "/nonexistent"], "/nonexistent is not a run directory"),
        ([*ARGUMENTS, "--batch-size", "5"], "--batch-size 5 is outside 1 to 4"),
        ([*ARGUMENTS, "--image-size", "4"], "--image-size 4 is too small; give at least 32"),
        ([*ARGUMENTS, "--config", "splits.json"], "other.txt: not found; give network.splits two of test, trainval"),
        ([*ARGUMENTS, "--min-depth", "5"], "--min-depth 5 exceeds the 4 blocks of chain backbone.body.layer3:1-4"),
    ],
)
def test_what_does_not_go_together_ends_in_one_line(
    capsys, kit, tmp_path, monkeypatch, arguments, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("splits.json").write_text('{"network": {"splits": ["trainval", "other"]}}')
    Path("smoothing.json").write_text('{"optimization": {"label_smoothing": 0.1}}')
    out = tmp_path / "run"
    status, _, err = cli(capsys, "train", "--data-dir", str(kit), "--processes", "1", *arguments, "--out", str(out))
    assert (status, err.count("\n")) == (2, 1)
    assert complaint in err
    assert not out.exists()


def test_bad_files_end_the_run_or_are_counted(capsys, tmp_path) -> None:
    vockit.draw(tmp_path)
    root = tmp_path / "VOCdevkit" / "VOC2007"
    photograph, text = root / "JPEGImages" / "000002.jpg", root / "Annotations" / "000003.xml"
    whole = text.read_text()
    common = [*ARGUMENTS, "--data-dir", str(tmp_path), "--processes", "1", "--epochs", "1", "--num-evals", "1"]
    text.write_text(whole[:-30])
    status, _, err = cli(capsys, "train", *common, "--out", str(tmp_path / "a"))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"resist: {text}: not complete XML")
    photograph.write_bytes(photograph.read_bytes()[:-500])
    status, text_out, err = cli(capsys, "train", *common, "--skip-bad-files", "--out", str(tmp_path / "b"))
    assert (status, err) == (0, "")
    for split in ("trainval", "test"):
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        assert f"resist: {listed}: left out 2 photographs:\nresist: {photograph}: cannot be read" in text_out
    text.write_text(whole)  # what is only seen when it is decoded ends the run then
    status, _, err = cli(capsys, "train", *common, "--out", str(tmp_path / "c"))
    assert (status, err.count("\n")) == (2, 1)
    assert err.startswith(f"resist: {photograph}: cannot be read")


def test_training_that_diverges_says_so(capsys, kit, tmp_path) -> None:
    status, _, err = cli(
        capsys, "train", *ARGUMENTS, "--data-dir", str(kit), "--processes", "1", "--lr", "1e20", "--epochs", "4",
        "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert (status, err.count("\n")) == (2, 1)
    assert "training diverged" in err


def test_plan_and_cost_know_detectors(capsys) -> None:
    network = ["--data", "voc2007", "--image-size", "64", "--model-args", "depths=1,1,5,1"]
    status, text, _ = cli(capsys, "plan", *network, "--workers", "2", "--min-depth", "0", "--json")
    assert status == 0
    assert json.loads(text)["chains"][0]["name"] == "backbone.body.layer3:1-4"
    status, text, _ = cli(capsys, "cost", *network, "--workers", "2", "--batch-size", "2", "--json")
    assert status == 0
    assert {row["strategy"] for row in json.loads(text)["strategies"]} == {"resist", "local_sgd", "diloco", "ddp"}


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.nightly)])
def test_two_workers_learn_four_photographs(commands, tmp_path, processes: int) -> None:
    """They learn, which needs correct boxes, labels, averages, scale and evaluation."""
    vockit.draw(tmp_path)
    arguments = [
        *ARGUMENTS,
        "--data-dir",
        str(tmp_path),
        "--model-args",
        "depths=1,1,5,1",
        "width=8",
        "--image-size",
        "48",
        "--local-steps",
        "10",
    ]
    schedule = ["--epochs", "20", "--lr", "0.02", "--lr-schedule", "cosine", "--lr-warmup-steps", "10"]
    arguments += ["--num-evals", "1", "--processes", str(processes), "--out", str(tmp_path / "run")]
    done = commands.run("train", *arguments, *schedule)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["accuracy"] > 0.6
    assert record["capacity"] == {"backbone.body.layer3:1-4": [2, 2]}
