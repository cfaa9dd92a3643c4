"""Tests of the text of generated pages: every part is used, and values are filled in."""

import ast
from pathlib import Path

import pytest

import page_parts

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_part_ends_before_the_next_and_empty_values_leave_no_gap(tmp_path: Path) -> None:
    (tmp_path / "x.md").write_text(
        "For writers.\n\n<!-- part: one -->\nA {a:.1f} b. {c}\n\n{d}\n\n{a}\n\n<!-- part: two-2 -->\n\n- {x[0]}\n"
    )
    parts = page_parts.Parts(tmp_path / "x.md")
    assert parts.fill("one", a=2, c="", d="") == "A 2.0 b.\n\n2"
    assert parts.fill("one", a=2, c="c", d="d  \ne") == "A 2.0 b. c\n\nd  \ne\n\n2"
    assert parts.fill("two-2", x=[1]) == "- 1"
    with pytest.raises(KeyError, match="x"):
        parts.fill("two-2")


def test_a_row_stays_a_row() -> None:
    assert page_parts.table(["a", "b"], [["x|y\nz", 1]]) == "| a | b |\n| --- | ---: |\n| x\\|y z | 1 |"


@pytest.mark.parametrize("page", sorted(file.name for file in page_parts.PAGES.glob("*.md")))
def test_every_part_is_used(page: str) -> None:
    texts: set[str] = set()
    for file in BENCHMARKS.glob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        texts |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    settings = {"detection-overfit", "detection-train"}  # the setting is in the record
    assert set(page_parts.Parts(page_parts.PAGES / page).texts) <= texts | settings
