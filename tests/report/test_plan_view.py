"""The drawings of `resist plan`: every mark and every square is a block that the plan gives to that worker."""

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist.cli import main
from resist.planning.plan import partition
from resist.report.colors import COLORS, color_of
from resist.report.plan_view import LABEL_COLUMNS, SHARED_COLUMNS, partition_lines, partition_svg

SVG = "{http://www.w3.org/2000/svg}"


@given(st.integers(1, 130), st.integers(1, 9), st.integers(30, 200), st.booleans(), st.data())
def test_lines_show_the_plan_and_fit_the_terminal(
    blocks: int, workers: int, width: int, utf8: bool, data: st.DataObject
) -> None:
    capacity = data.draw(st.integers(min(blocks, -(-blocks // workers)), blocks))
    plans = [partition(blocks, (capacity,) * workers, seed=0, round=number).blocks for number in range(2)]
    lines = [line.plain for line in partition_lines(blocks, plans, width, utf8=utf8)]
    assert all(len(line) <= max(width, LABEL_COLUMNS + 2 * SHARED_COLUMNS + 9) for line in lines)
    mark = "■" if utf8 else "#"
    assert all(ord(character) < 128 for line in lines for character in line) or utf8
    found: dict[tuple[int, int], list[int]] = {}
    first = number = shown = 0
    for line in lines:
        if not line:  # the next part
            first += shown
        elif "worker" in line:
            number = int(line.split()[1]) - 1 if line.startswith("round") else number
            body = line[LABEL_COLUMNS + SHARED_COLUMNS : -SHARED_COLUMNS]
            pitch = 2 if len(body) > 1 and 2 * blocks <= max(8, width - LABEL_COLUMNS - 2 * SHARED_COLUMNS - 1) else 1
            shown = len(body) // pitch
            held = [first + place // pitch for place, character in enumerate(body) if character == mark]
            found.setdefault((number, int(line[LABEL_COLUMNS - 4 : LABEL_COLUMNS])), []).extend(held)
    assert found == {(n, w): list(held) for n, plan in enumerate(plans) for w, held in enumerate(plan)}


def description(blocks: int, workers: int, rounds: int, name: str = "layer3:1-8") -> dict[str, Any]:
    capacity = -(-blocks // workers)
    plans = [partition(blocks, (capacity,) * workers, seed=0, round=number).blocks for number in range(rounds)]
    return {
        "chains": [{"name": name, "blocks": blocks}],
        "held_by_worker": [1] * workers,
        "rounds": [{"round": number, "plan": {name: plan}} for number, plan in enumerate(plans, start=1)],
    }


@pytest.mark.parametrize(("blocks", "workers", "rounds"), [(22, 4, 3), (1, 1, 1), (100, 12, 2)])
def test_the_picture_has_a_square_for_each_block_and_stays_within(blocks: int, workers: int, rounds: int) -> None:
    plans = description(blocks, workers, rounds)
    root = ET.fromstring(partition_svg(plans))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    squares = [rect for rect in root.iter(f"{SVG}rect") if rect.get("width") == rect.get("height") == "15"]
    for worker in range(workers):
        filled = [rect for rect in squares if rect.get("fill") == color_of(worker)]
        assert len(filled) == 1 + rounds * -(-blocks // workers)  # and the legend
    for rect in root.iter(f"{SVG}rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width", 0)) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height", 0)) <= height
    assert "prefers-color-scheme:dark" in "".join(root.itertext())
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {f"worker {worker}" for worker in range(workers)} <= texts
    assert {f"round {number}" for number in range(1, rounds + 1)} <= texts
    assert "round 0" not in texts


def test_names_from_elsewhere_are_escaped() -> None:
    root = ET.fromstring(partition_svg(description(4, 2, 1, name='<script>"&')))
    assert '4 blocks of <script>"&' in [text.text for text in root.iter(f"{SVG}text")]


def test_workers_have_different_colors() -> None:
    assert len({color_of(worker) for worker in range(64)}) == 64
    assert [color_of(worker) for worker in range(8)] == list(COLORS)


def test_plan_draws_all_chains_into_a_file_that_is_not_there_yet(capsys, tmp_path: Path) -> None:
    out = tmp_path / "p.svg"
    arguments = ["plan", "--workers", "2", "--chain", "layer3:1-8", "layer1:0-1", "--min-depth", "1", "--svg", str(out)]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 0
    assert "Which worker holds which block of layer1:0-1" in capsys.readouterr().out
    text = out.read_text()
    assert "8 blocks of layer3:1-8" in text
    assert "2 blocks of layer1:0-1" in text
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert out.read_text() == text
