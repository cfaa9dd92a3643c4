"""Tests of docs/results.md: the page is the script's output for the recorded results."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import accuracy
import format_tables
import page_parts
import paper_tables
import sources
import tables
from resist.cost import Link, Speed, predict
from resist.planning.strategy import ddp

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

SMALL = {"model": "preact_small", "width": 4, "num_classes": 10}
ORIGIN = {"date": "2020-01-02", "commit": "abc", "machine": "m", "cores": 2, "gpu": None, "torch": "t", "python": "p"}


def write(file: Path, *lines: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def method(name: str, compute_s: float, exchange_s: float, ledger_bytes: int | None = None) -> dict[str, Any]:
    kinds = {"compute_s": compute_s, "exchange_s": exchange_s, "round_s": compute_s + exchange_s}
    return {
        "method": name, "n": 2, **{kind: {"median": value, "all": [value, value]} for kind, value in kinds.items()},
        "wire_bytes": [1005, 1005], "ledger_bytes": ledger_bytes and [ledger_bytes] * 2, "formula_bytes": None,
        "busiest_host_over_mean": 1.0,
    }  # fmt: skip


def wire(*methods: dict[str, Any], **other: Any) -> dict[str, Any]:
    return {
        **SMALL, "rate": "1mbit", "workers": 4, "sections": [], "local_steps": 2, "rounds": 2, "ddp_steps": 1,
        "compute_s": [1.0, 2.0], "compute_note": "a device", "methods": methods, **ORIGIN, **other,
    }  # fmt: skip


def run(percent: float, **other: Any) -> dict[str, Any]:
    """Return a record of the first format, in which "recalibrate" means images that were not augmented."""
    ways = {f"{way}, scale {scale}": {"of_5000": percent, "of_10000": percent + add}
            for scale in ("inclusion", "1.0")
            for way, add in (("average", 2), ("batch", 0), ("recalibrate", 1))}  # fmt: skip
    return {
        "strategy": "resist", "optimizer_state": "travel", "workers": 4, "rounds": 40, "local_steps": 5, "seed": 0,
        "min_depth": None, "chain_lr": 1.0, "local_sgd_first": 0, "local_sgd_last": 0,
        "percent_of_5000": {"20": 1.25, "40": percent}, "train_cpu_s": 10.0, "readings": ways, **ORIGIN, **other,
    }  # fmt: skip


@pytest.mark.slow
def test_without_results_there_is_only_what_can_be_computed(tmp_path: Path) -> None:
    page = tables.page(tmp_path, SMALL)
    assert [line for line in page.splitlines() if line.startswith("## ")] == [
        "## Table 1 of the paper: GB per synchronization, preact_small, 10 classes"
    ]


def test_of_each_setting_the_latest_line_counts(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", {"rate": "1", "n": 1}, {"rate": "2", "n": 2}, {"rate": "1", "n": 3})
    assert [line["n"] for line in tables.latest(tmp_path / "x.jsonl", "rate", "missing")] == [3, 2]


@pytest.mark.parametrize("other", [{"seed": 1}, {"min_depth": 3}, {"local_sgd_first": 2}, {"local_steps": 6}])
def test_no_run_of_another_setting_takes_the_place_of_one(tmp_path: Path, other: dict[str, int]) -> None:
    write(tmp_path / "runs.jsonl", run(40.0), run(50.0, **other))
    curves = accuracy.curves(tables.latest(tmp_path / "runs.jsonl", *tables.RUN_SETTINGS))
    names = [line.split("|")[1] for line in curves.splitlines() if line.startswith("| ResIST")]
    assert len(set(names)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("resist", "average"),
        ("local_sgd", "average"),
        *(pytest.param("resist", state, marks=pytest.mark.nightly) for state in ("reset", "travel")),
    ],
)
def test_the_formula_is_that_of_resist_cost(name: str, state: str) -> None:
    build, strategy = paper_tables.builder(SMALL), paper_tables.strategy_of(name, 4, state)
    report = predict(build, [strategy], batchnorm="batch", batch_size=2, rounds=3)
    assert paper_tables.formula(build, strategy, 3).mean == report.rows[0].traffic


@pytest.mark.parametrize("name", ["resist", "local_sgd"])
def test_the_byte_count_of_a_job_is_the_formula(name: str) -> None:
    build, strategy = paper_tables.builder(SMALL), paper_tables.strategy_of(name, 4, "reset")
    assert paper_tables.count_bytes(build, strategy, 4) == paper_tables.formula(build, strategy, 4).rounds


def exchanged(**times: float) -> dict[str, Any]:
    seconds = {"median_s": 1.0, "quartile_low_s": 1.0, "quartile_high_s": 1.0}
    methods = {name: {**seconds, "times_resist": value} for name, value in times.items()}
    result = {"n": 1, "measured": 1, "others_share": {"max": 0.0}, "methods": methods}
    return {**SMALL, "results": {"4": result}, **ORIGIN}


def test_a_sentence_on_speed_says_what_was_measured() -> None:
    page = tables.exchange(exchanged(published=3.0, flat=0.97))
    assert "`published` takes 3.00 times as long as ResIST, target 3.60: **missed**; " in page
    assert "`flat` takes 0.97 times as long as ResIST, so ResIST is the slower one, target" in page
    assert page.count("**missed**") == 2
    good = tables.exchange(exchanged(published=3.6, flat=9.0))
    assert good.count(": reached") == 2
    assert "slower" not in good


def test_each_wire_format_reaches_or_misses_each_target() -> None:
    def row(name: str, gb: float, stall_s: float, slowed: float | None = None, formula: float = 1.0) -> dict[str, Any]:
        times = {"round_s": 10.0, "stall_s": stall_s, "cpu_s": 1.0}
        return {
            "method": name, "n": 2, **{key: {"median": value, "all": [value] * 2} for key, value in times.items()},
            "wire_bytes": [gb * 1e9] * 2, "formula_bytes": [gb * 1e9 / formula] * 2, "slowed_percent": slowed,
        }  # fmt: skip

    ours = "resist,optimizer_state=travel"
    methods = [row(ours, 0.5, 5.0), row(f"{ours},wire=int8", 0.11, 1.0), row(f"{ours},wire=int4", 0.1, 0.2, 6.0, 1.02)]
    record = wire(*methods, rate="1gbit", full_step_s=2.0)
    page = format_tables.formats([record])
    assert "| resist, travel, wire=int4 | 0.1000 | 1.0200 | 10.00 | 0.00 | 0.20 | 2.0 | +6.0 | 1.00 |" in page
    assert [line for line in page.splitlines() if line.startswith("- ")] == [
        "- At most 0.10 GB a round: reached by resist, travel, wire=int4 (0.1000).",
        "- At most 0.10 GB a round: **missed** by resist, travel, wire=int8 (0.1100).",
        "- A stall of at most 5 % of a round: reached by resist, travel, wire=int4 (2.0).",
        "- A stall of at most 5 % of a round: **missed** by resist, travel, wire=int8 (10.0).",
        "- Steps slowed by at most 5 %: **missed** by resist, travel, wire=int4 (6.0).",
        "- Interfaces and formula within 1 %: reached by resist, travel (0.00); resist, travel, wire=int8 (0.00).",
        "- Interfaces and formula within 1 %: **missed** by resist, travel, wire=int4 (2.00).",
    ]
    assert "A stall" not in format_tables.formats([record | {"rate": "20mbit"}])
    assert "GB a round:" not in format_tables.formats([record | {"workers": 2}])
    again = record | {"methods": [row(f"{ours},wire=int4", 0.09, 0.1), row(f"{ours},wire=int6", 0.1, 0.1)]}
    joined = format_tables.formats([record, again])  # one table of a setting that was measured in two calls
    assert joined.count("wire=int8 | 0.1100") == joined.count("wire=int4 | 0.0900") == 1
    assert "wire=int4 | 0.1000" not in joined
    assert joined.count("\n### ") == 1


def test_losses_and_ties_are_named() -> None:
    methods = [
        method("resist,optimizer_state=reset", 5.0, 5.0), method("local_sgd,optimizer_state=reset", 9.0, 6.0),
        method("averager", 9.0, 1.2), method("ddp", 9.0, 0.0), method("published", 10.0, 3.0),
    ]  # fmt: skip
    page = tables.round_times([wire(*methods)])
    # published: with ResIST's 5 s of compute, as the paper's workers have, and its own 3 s of exchange
    assert "resist, reset: slower than published, ddp, equal to averager." in page
    assert "published* 0.80, ddp 0.90, averager 1.02, local_sgd, reset 1.50" in page
    assert "a round saves 4.00 s of compute and 1.00 s of exchange" in page


@pytest.mark.slow
def test_a_missed_target_is_called_missed() -> None:
    near, far = (tables.predictions([wire(method("ddp", 4.0, exchange_s))], []) for exchange_s in (1.0, 1e6))
    measured = 4.0 + predicted_exchange_s()
    exact = tables.predictions([wire(method("ddp", 4.0, measured - 4.0))], [])
    assert "**missed** by 1mbit, ddp" in near
    assert "**missed** by 1mbit, ddp (-100.0 %)" in far
    assert "reached by all, at most 0.0 % off" in exact
    assert "**missed**" in paper_tables.on_wire([wire(method("resist", 1.0, 1.0, ledger_bytes=990))])
    assert "reached, at most 0.50 % apart" in paper_tables.on_wire(
        [wire(method("resist", 1.0, 1.0, ledger_bytes=1000))]
    )


def test_the_cost_of_recording_is_judged_by_its_dearest_part() -> None:
    way = {"cpu_s": 0.002, "all": [0.001, 0.004], "percent": 0.2}
    record = {
        "round_cpu_s": 1.0, "workers": 4, "local_steps": 10, "batch_size": 32, "ways": {"wandb": way}, "rounds": 200,
        "repetitions": 3, "drawing": {"percent": 0.5}, **ORIGIN,
    }  # fmt: skip
    page = tables.recording(record)
    assert "| wandb | 2.00 | 0.200 | 3.00 |" in page
    assert "reached, at most 0.50 %" in page
    assert "**missed**, at most 1.50 %" in tables.recording(record | {"drawing": {"percent": 1.5}})


def predicted_exchange_s() -> float:
    report = predict(
        paper_tables.builder(SMALL), [ddp(4, 2)], batchnorm="batch", batch_size=2,
        link=Link(1e-3), speed=Speed(1.0),
    )  # fmt: skip
    assert report.rows[0].seconds is not None
    return report.rows[0].seconds.exchange


def test_first_runs_are_not_taken_for_runs_with_augmented_statistics(tmp_path: Path) -> None:
    new = run(50.0, strategy="local_sgd")
    new["readings"] |= {"recalibrate, not augmented, scale inclusion": {"of_5000": 30.0, "of_10000": 31.5}}
    write(tmp_path / "runs.jsonl", run(40.0), new)
    runs = tables.latest(tmp_path / "runs.jsonl", *tables.RUN_SETTINGS)
    curves, readings = accuracy.curves(runs), accuracy.readings(runs)
    assert "| plain | 1.25 | 40.00 | 40.00 | 41.00 | 42.00 | 10 |" in curves
    assert "| augmented | 1.25 | 50.00 | 50.00 | 51.00 | 52.00 | 10 |" in curves
    assert "is 10.00 points behind the best local SGD run" in curves
    assert "| 40.00 |  | 41.00 | 42.00 |" in readings
    assert "| 50.00 | 51.00 | 31.50 | 52.00 |" in readings
    assert "in 2 of 2 runs" in readings


def test_methods_are_compared_seed_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("local SGD", 0, 60.0), ("local SGD", 1, 62.0), ("ResIST, average", 0, 61.0), ("ResIST, average", 1, 64.0)]
    cost = {"gmac": 2, "bytes": {"shared": 4, "evaluate": 9}, "peak_bytes": 6, "train_cpu_s": 8.0, "rounds": 7}
    known = {"benchmark": "accuracy", "setting": "short", "plain": "", **cost, **ORIGIN}
    lines = [known | {"row": row, "seed": seed, "percent": {"averaged": percent}} for row, seed, percent in rows]
    other = {"name": "long", "image_size": 24, "rounds": 7, "batch_size": 8, "lr": 0.5}
    longer = lines[0] | {"setting": "long", "settings": other}
    write(tmp_path / "accuracy.jsonl", lines[0] | {"percent": {"averaged": 1.0}}, *lines, longer)
    monkeypatch.setattr(tables, "traffic", lambda network, wire: "")
    page = tables.page(tmp_path, SMALL)
    assert "### `short`: CIFAR-10, 32 pixels, at most 40 rounds" in page
    assert "### `long`: CIFAR-10, 24 pixels, at most 7 rounds, batch 8 for each worker, rate 0.5\n" in page
    assert "| ResIST, average | 62.50 | 2 | +1.50 ± 0.50 | -4.85 |  |  |  |  | 1.00 | 1.00 | 1.00 | 1.00 |" in page
    assert "| local SGD | 61.00 | 2 |  |  |  |  |  |  | 1.00 |" in page
    assert "accuracy.svg" not in page


def test_photographs_say_what_was_measured() -> None:
    trained = {"part": "train", "loss_by_epoch": [3.9, 3.5], "accuracy": 0.15, "top5": 0.4, "rounds": 9, "gb_sent": 0.1}
    resumed = {"part": "resume", "status": 75, "interrupted_after": 4, "rounds": 9, "greatest_difference": 0.0}
    read = {"read_images_s": {"0": 50.0, "1": 90.0}, "trained_images_s": 30.0, "both_images_s": 29.0}
    records = [
        {**trained, "warmup_epochs": 0.0, "warmup_rounds": 0, **ORIGIN},
        {**trained, "warmup_epochs": 2.0, "warmup_rounds": 4, **ORIGIN},
        {**resumed, "same_accuracy": False, **ORIGIN},
        {"part": "input", **read, "waited_share": 0.015, "load": 2.0, **ORIGIN},
    ]
    page = accuracy.photographs(records)
    assert "| 0 epochs (0 of 9 rounds) | 3.900 | 3.500 | 15.00 | 40.00 | 0.100 |" in page
    assert "| 2 epochs (4 of 9 rounds) |" in page
    assert "at most 0; the test accuracy **differs**." in page
    assert "(with 1 process 3.0 times the training speed on one thread, 30 images/s)" in page
    assert "1.5% of the time" in page


def faults(*problems: str) -> dict[str, Any]:
    return {
        "number": 8, "seed": 0, "timeout_s": 9.0, "lanes": 1, "forked": True, "same_weights": 8 - bool(problems),
        "kinds": dict.fromkeys(("kill", "stop", "delay", "raise"), 2), "points": {"start": 8},
        "to_end_s": {"kill": {"median": 1.25, "max": 2.0}},
        "problems": [{"kind": "kill", "point": "start", "rank": 1, "problems": list(problems)}] if problems else [],
        **ORIGIN,
    }  # fmt: skip


def saves(percent: float, alone_s: float) -> dict[str, Any]:
    def three(value: float) -> dict[str, float]:
        return {"median": value, "min": value, "max": value}

    return {
        **SMALL, "workers": 4, "local_steps": 5, "batch_size": 2, "checkpoint_rounds": 10,
        "checkpoint_bytes": 10, "n": 2, "parameters": 1, "percent_cpu": three(percent), "percent_wall": three(0.0),
        "round_cpu_s": three(1.0), "save_cpu_s": three(alone_s), "stood_s": three(0.1), "others_share": three(0.5),
        **ORIGIN,
    }  # fmt: skip


def test_what_faults_and_checkpoints_cost_is_read_from_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "traffic", lambda network, wire: "")
    write(tmp_path / "faults.jsonl", faults())
    write(tmp_path / "checkpoints.jsonl", saves(2.0, 0.2))
    page = tables.page(tmp_path, SMALL)
    assert "All 8 ended without help" in page
    assert "**8 of 8 ended with the weights" in page
    assert "at most 3 %: reached in processor time, +2.0 % in the median of 2 pairs, 2.00 %" in page
    write(tmp_path / "faults.jsonl", faults("did not end"))
    for percent, alone_s in ((4.0, 0.2), (2.0, 0.4)):
        write(tmp_path / "checkpoints.jsonl", saves(percent, alone_s))
        page = tables.page(tmp_path, SMALL)
        assert "7 of 8 ended without help" in page
        assert "kill at `start` in process 1: did not end" in page
        assert "at most 3 %: **missed**" in page


def test_figures_of_other_code_are_listed_and_are_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = sources.hashes(sources.SOURCES["faults"])
    write(
        tmp_path / "results" / "faults.jsonl",
        faults() | {"timeout_s": 1.0, "sources": now},
        faults() | {"timeout_s": 2.0, "sources": now | {"src/resist/runs": "0"}, "commit": "old"},
        faults() | {"timeout_s": 3.0, "commit": "older"},
    )
    monkeypatch.setattr(tables, "traffic", lambda network, wire: "")
    monkeypatch.setattr(tables, "HERE", tmp_path)
    monkeypatch.setattr(tables, "PAGE", tmp_path / "page.md")
    assert_ends(monkeypatch, None)
    written = tables.PAGE.read_text()
    assert ["Code changed since" in line for line in written.splitlines() if line.startswith("*Measured")] == [
        False, True, True,
    ]  # fmt: skip
    capsys.readouterr()
    assert_ends(monkeypatch, None, "--changed")
    assert capsys.readouterr().out.splitlines() == [
        "faults, 2020-01-02, commit old. Code changed since: runs.",
        "faults, 2020-01-02, commit older. Code changed since: unknown, its line names no source files.",
        "2 of 3 measurements on docs/results.md are of other code than this",
    ]
    # Code moves on, and the page says what it said before: no failure. Another figure is one.
    monkeypatch.setattr(sources, "here", lambda: {"src/resist/job.py": b""})
    assert_ends(monkeypatch, 0, "--check")
    tables.PAGE.write_text(written.replace("All 8 ended", "All 9 ended"))
    assert_ends(monkeypatch, "out of date in docs: page.md", "--check")


def assert_ends(monkeypatch: pytest.MonkeyPatch, status: object, *arguments: str) -> None:
    """Run tables.py in this process; None: it returns."""
    monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
    if status is None:
        tables.main()
        return
    with pytest.raises(SystemExit) as ended:
        tables.main()
    assert ended.value.code == status


@pytest.mark.slow
def test_the_page_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes come from the formula, which other tests compare with a job's, and predictions are those of the page."""
    written = tables.PAGE.read_text(encoding="utf-8")
    title = page_parts.fill("predictions", times="", memory="").splitlines()[0]
    section = re.search(rf"^{re.escape(title)}$.*?(?=\n\n## )", written, re.M | re.S)
    assert section is not None
    monkeypatch.setattr(tables, "predictions", lambda *records: section[0])
    monkeypatch.setattr(paper_tables, "count_bytes", lambda *setting: paper_tables.formula(*setting).rounds)
    page = tables.page(tables.HERE / "results")
    assert page_parts.without_marks(page) == page_parts.without_marks(written)


@pytest.mark.nightly
def test_the_page_is_up_to_date_with_the_bytes_of_jobs() -> None:
    command = [sys.executable, BENCHMARKS / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
