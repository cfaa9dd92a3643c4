"""The page of results is what the script writes from the result files that are kept."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import tables  # noqa: E402


def test_a_benchmark_without_results_is_left_out(tmp_path: Path) -> None:
    assert tables.page(tmp_path).startswith("# Results")
    assert "##" not in tables.page(tmp_path)


def test_the_latest_line_of_a_setting_counts(tmp_path: Path) -> None:
    lines = [{"rate": "1", "n": 1}, {"rate": "2", "n": 2}, {"rate": "1", "n": 3}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [line["n"] for line in tables.latest(tmp_path / "x.jsonl", "rate")] == [3, 2]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_page_is_up_to_date() -> None:
    written = (BENCHMARKS.parent / "docs" / "results.md").read_text(encoding="utf-8")
    assert written == tables.page(BENCHMARKS / "results")
