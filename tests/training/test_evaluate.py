"""`resist evaluate --readings`: the network of a run read in every way, kept where the report finds it."""

import json
from pathlib import Path

import pytest

from resist.cli import main
from resist.report.page import page
from resist.runs.history import read_history

SMALL = ["--workers", "2", "--min-depth", "0", "--model-args", "depths=1,1,3,1", "width=4", "--batch-size", "32",
         "--local-steps", "3", "--epochs", "0.2", "--num-evals", "1", "--device", "cpu",
         "--processes", "1"]  # fmt: skip


def resist(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert ended.value.code == 0, err
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "ways"),
    [("recalibrate", {"recalibrate", "batch"}), ("average", {"average", "recalibrate", "batch"}), ("batch", {"batch"})],
)
def test_a_network_is_read_in_every_way_and_the_runs_own_is_among_them(
    capsys, tmp_path: Path, kept: str, ways: set[str]
) -> None:
    run = tmp_path / "run"
    precision = "bf16" if kept == "recalibrate" else "fp32"
    resist(capsys, "train", *SMALL, "--batchnorm", kept, "--precision", precision, "--out", str(run))
    out = resist(capsys, "evaluate", str(run), "--device", "cpu", "--readings")
    found = json.loads((run / "evaluation.json").read_text())
    assert set(found) == {f"{way}, {scale}" for way in ways for scale in ("scaled", "no scale")}
    history = read_history(run)
    assert found[f"{kept}, scaled"] == pytest.approx(history.accuracies[-1], abs=1e-6)
    assert len({*found.values()}) > 1  # they do differ
    text = page([history])
    for way, value in found.items():
        assert way in out
        assert f"{100 * value:.2f} %" in text
        assert way in text
