"""Reports of predictions: sentences, JSON and tables."""

import io
import json

import pytest
from cost_cases import SMALL, all_of, timed
from rich.console import Console

from resist.cost import Link, Speed, predict, print_table
from resist.planning.methods import build_strategy
from resist.planning.strategy import ddp, local_sgd, resist
from support import tiny


@pytest.mark.slow
def test_the_verdict_names_the_fastest() -> None:
    weights_only = [
        build_strategy(name, workers, 50, optimizer_state="reset", min_depth=0)
        for workers in (2, 3)
        for name in ("resist", "local_sgd", "ddp")
    ]
    slow = timed(weights_only, Link(0.01), Speed(1000)).verdict()
    assert [sentence.split(" is ")[0] for sentence in slow[:2]] == ["2 workers: resist", "3 workers: resist"]
    assert "one machine" in slow[0]
    assert slow[2].startswith("Of all these, resist with ")
    hopeless = timed([resist(2, 10), local_sgd(2, 10), ddp(2, 10)], Link(1e-6), Speed(1000)).verdict()
    assert hopeless[-1].startswith("None of them is faster than one machine")
    free = timed([local_sgd(2, 10), ddp(2, 10)], Link(1e6), Speed(10)).verdict()
    assert "equal to " in free[0]


def test_json_is_plain_and_complete() -> None:
    report = timed(all_of((2, 3), ("resist", "local_sgd", "ddp"), 10), Link(1, 0.1), Speed(100))
    data = report.to_json()
    assert json.loads(json.dumps(data)) == data
    assert [(one["strategy"], one["workers"]) for one in data["strategies"]] == [
        (name, workers) for workers in (2, 3) for name in ("resist", "local_sgd", "ddp")
    ]
    for one, is_row in zip(data["strategies"], report.rows, strict=True):
        assert sorted(w for network in one["networks"] for w in network["workers"]) == list(range(one["workers"]))
        assert one["bytes"]["total"] == pytest.approx(is_row.traffic.total_bytes)
        assert set(one["seconds"]["speedup_over"]) == {"resist", "local_sgd", "ddp", "one machine"} - {one["strategy"]}
    assert data["assumptions"]
    assert predict(tiny, [resist(2)], **SMALL).to_json()["strategies"][0]["seconds"] is None


@pytest.mark.parametrize("with_seconds", [True, False])
def test_tables_have_a_line_for_every_row(with_seconds: bool) -> None:
    options = {"link": Link(1, 0.1), "speed": Speed(100)} if with_seconds else {}
    report = predict(tiny, all_of((2, 3)), **SMALL, **options)  # type: ignore[arg-type]
    out = io.StringIO()
    print_table(report, Console(file=out, width=100))
    lines = [line.split()[:2] for line in out.getvalue().splitlines()]
    for one in report.rows:
        assert lines.count([one.strategy, str(one.workers)]) == (3 if with_seconds else 2)
    assert ("fastest" in out.getvalue()) == with_seconds


def test_unequal_workers_are_shown_apart() -> None:
    report = predict(tiny, [resist(3, capacities=(6, 1, 1))], **SMALL)
    networks = report.to_json()["strategies"][0]["networks"]
    assert [(one["workers"], one["blocks"]) for one in networks] == [([0], [6]), ([1, 2], [1])]
