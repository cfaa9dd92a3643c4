"""Tests of the detection benchmark: the data set that it makes, and its section of docs/results.md."""

from pathlib import Path

import pytest

import detection
import vockit
from resist.data.voc import load_voc

RECORD = {
    "setting": "overfit", "model": "m", "sections": [1], "width": 8, "workers": 2,
    "local_steps": 20, "image_size": 128, "batch_size": 4,
    "rounds": 2, "steps": 40, "last_loss": 0.5,
    "curve": [[1, 1.0, {"a": 0.1, "b": 0.2}], [2, 0.5, {"a": 0.7, "b": 0.8}]],
    "parameters": 100, "held_by_worker": [75, 75], "bytes": {"shared": 2_000_000, "state": 500_000},
    "local_sgd_bytes": 4_000_000, "date": "2020-01-02", "commit": "abc", "machine": "m", "cores": 2, "gpu": None,
    "torch": "t", "python": "p",
}  # fmt: skip


@pytest.mark.parametrize(("score", "verdict"), [(0.7, "reached"), (0.5, "**missed**")])
def test_the_page_says_what_the_runs_say(score: float, verdict: str) -> None:
    record = {**RECORD, "curve": [RECORD["curve"][0], [2, 0.5, {"a": score, "b": 0.8}]]}
    text = detection.section([record, {**record, "setting": "train"}])
    assert f"16 photographs: above 60%: {verdict}" in text
    figures = f"| 2 | 40 | 0.500 | {100 * score:.2f} | 80.00 | 75% | 2.5 | 4.0 |"
    assert [line.split("|", 2)[2] for line in text.splitlines() if "0.500" in line] == [figures[1:]] * 2
    assert f"10.0 % after 1 rounds, {100 * score:.1f} % after 2 rounds" in text
    assert "n = 1 run (overfit)" in text


def test_a_few_photographs_are_a_set_of_their_own(tmp_path: Path) -> None:
    vockit.draw(tmp_path / "all", 20)
    made = detection.few(tmp_path / "all", tmp_path / "few")
    train, test = load_voc("voc2007", made, splits=("sixteen", "sixteen"))
    assert [one.file.stem for one in train.photographs] == [f"{number:06}" for number in range(1, 17)]
    assert len(test) == 16
