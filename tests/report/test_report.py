"""Reports from run directories: their numbers, and damaged, foreign and hostile directories."""

import json
import math
import re
import shutil
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from report_runs import CHAIN, make_run
from resist.cli import main
from resist.cli.report import ReportConfig, run_report
from resist.errors import UserError
from resist.planning.plan import partition
from resist.report.aggregate import holdings, map_rows, traffic
from resist.report.bitmap import png
from resist.report.compare import compare, labels
from resist.report.page import page
from resist.report.units import ends, log_ticks, means, sample, thin, ticks, whole_ticks
from resist.runs.config import TrainConfig
from resist.runs.history import read_history
from resist.runs.records import clean


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "resist")
    make_run(folder / "local", strategy="local_sgd")
    return folder


def report(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["report", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


class Page(HTMLParser):
    """Checks that elements are closed in the order in which they were opened; keeps tags, attributes and text."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "rect"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "rect":  # has a title within
            return
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else(runs: Path) -> None:
    html = page([read_history(runs / "resist")])
    found = Page(html)
    for _, attributes in found.tags:
        for name in ("src", "href", "srcset"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"https?://|@import|url\(", html)
    for text in ("92.38 %", "4 workers", "6 of 22", "config.json", "git checkout abc1234", "a processor"):
        assert text in found.text
    assert sum(tag == "figure" for tag, _ in found.tags) == 6 + 2 + 3


def test_several_runs_are_compared_and_the_speed_up_is_split(runs: Path) -> None:
    histories = [read_history(runs / name) for name in ("resist", "local")]
    table = compare(histories)
    by_name = {row["label"]: row for row in table["rows"]}
    assert set(by_name) == {"resist", "local_sgd"}
    assert by_name["resist"]["speed_up"]["exchange"] == pytest.approx(0.4 / 0.15)
    found = Page(page(histories)).text
    assert "2.67 x" in found
    assert "1.00 x" in found


def test_runs_of_one_strategy_are_labeled_by_the_options_that_differ(tmp_path: Path) -> None:
    make_run(tmp_path / "a", rounds=4)
    make_run(tmp_path / "b", rounds=4, seed=1)
    make_run(tmp_path / "c", rounds=4, workers=2, capacity=11)
    histories = [read_history(tmp_path / name) for name in "abc"]
    assert labels(histories) == ["resist, workers 4", "resist, workers 4", "resist, workers 2"]
    assert labels(histories[:2]) == ["resist", "resist"]
    assert [len(row["runs"]) for row in compare(histories)["rows"]] == [2, 1]
    assert all(row["speed_up"]["time"] is None for row in compare(histories)["rows"])


def test_the_map_shows_the_plans_and_all_holders_of_a_block(runs: Path) -> None:
    (chain,) = holdings(read_history(runs / "resist"))
    assert chain.rounds == list(range(1, 41))
    plan = partition(22, (6,) * 4, seed=0, round=16, chain=CHAIN)
    assert chain.holders[16] == [plan.holders(block) for block in range(22)]
    rows, palette, height = map_rows(chain)
    pixels = np.array(Image.open(BytesIO(png(rows, palette))).convert("RGBA"))
    assert pixels.shape[0] == 22 * height
    column = pixels.shape[1] // 40 * 16
    for block in range(22):
        seen = {tuple(pixel[:3]) for pixel in pixels[block * height : (block + 1) * height, column] if pixel[3]}
        assert seen == {tuple(bytes.fromhex(palette[worker][1:])) for worker in plan.holders(block)}


@pytest.mark.parametrize("blocks", [1, 7, 100])
def test_sampled_maps_keep_to_their_size_and_shares_count_every_round(tmp_path: Path, blocks: int) -> None:
    make_run(tmp_path / "run", rounds=1000, blocks=blocks, workers=2, capacity=-(-blocks // 2) if blocks > 1 else 1,
             distinct=10)  # fmt: skip
    (chain,) = holdings(read_history(tmp_path / "run"))
    assert chain.every == 3
    assert chain.rounds[:2] == [1, 4]
    rows, _, _ = map_rows(chain)
    assert len(rows[0]) == 334
    expected = 1 if blocks == 1 else -(-blocks // 2) / blocks
    assert sum(map(sum, chain.shares)) / blocks / 2 == pytest.approx(expected)


def test_the_matrix_adds_up_to_what_was_booked(runs: Path) -> None:
    history = read_history(runs / "resist")
    sent, mixed = traffic(history)
    assert sum(map(sum, sent)) == sum(record["bytes"]["blocks"] for record in history.rounds)
    assert not mixed
    history.rounds[5]["bytes"]["replica"] = 50  # replicas belong to training
    history.rounds[5]["pairs"].append((1, 0, 50))
    assert not traffic(history)[1]
    assert all(sent[worker][worker] == 0 for worker in range(4))
    history.rounds[3]["pairs"].append((2, 0, 10))
    assert traffic(history)[1]


@pytest.mark.slow
def test_no_file_is_replaced_unless_forced(capsys, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.md"
    (tmp_path / "r-1.png").write_text("precious")
    status, _, err = report(capsys, runs / "resist", "-o", out)
    assert (status, err.count("\n")) == (2, 1)
    assert "r-1.png exists already; give --force" in err
    assert [p.name for p in tmp_path.iterdir()] == ["r-1.png"]
    status, text, _ = report(capsys, runs / "resist", "-o", out, "--force")
    assert status == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r-1.png", "r.md", "r.png"]
    assert "r-1.png" in text
    for name in ("r-1.png", "r.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] == 1650
        assert f"]({name})" in out.read_text()


def test_formats_and_places(capsys, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "resist", tmp_path / "run")
    assert report(capsys, tmp_path / "run")[0] == 0
    assert (tmp_path / "run" / "report.html").is_file()
    assert report(capsys, runs, "-o", tmp_path / "both.html")[0] == 0  # a directory of runs
    assert "2 runs compared" in (tmp_path / "both.html").read_text()
    for arguments, text in (
        ([tmp_path / "run", "-o", tmp_path / "x.doc"], "give --format"),
        ([tmp_path / "none"], "is not a run directory"),
        ([tmp_path / "run", tmp_path / "run"], "given twice"),
        ([], "runs"),
        ([tmp_path / "run", "-o", tmp_path / "no" / "x.html"], "cannot be written"),
    ):
        status, _, err = report(capsys, *arguments)
        assert status == 2
        assert text in err


EVIL = "<script>alert(1)</script>\"'|`"


@pytest.mark.slow
def test_everything_from_files_is_escaped(capsys, runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "<b>run"
    shutil.copytree(runs / "resist", run)
    config = json.loads((run / "config.json").read_text())
    config["network"] |= {"data": EVIL, EVIL: EVIL}
    (run / "config.json").write_text(json.dumps(config))
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL, "command": [EVIL], "commit": EVIL}))
    (run / "evaluation.json").write_text(json.dumps({EVIL: 0.5}))
    (run / "state.json").write_text(json.dumps({"state": "failed", "error": EVIL, "rounds": EVIL}))
    lines = (run / "metrics.jsonl").read_text().replace(CHAIN, "</script><script>alert(1)//")
    lines = lines.replace('"sync"', json.dumps(EVIL))
    (run / "metrics.jsonl").write_text(lines)
    assert report(capsys, run, "-o", tmp_path / "x.html")[0] == 0
    found = Page((tmp_path / "x.html").read_text())
    assert "alert(1)" in found.text
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert len([attributes for attributes in scripts if attributes.get("type") != "application/json"]) == 1
    assert not any(tag == "b" for tag, _ in found.tags)
    assert report(capsys, run, "-o", tmp_path / "x.md")[0] == 0
    text = re.sub(r"^    .*$", "", (tmp_path / "x.md").read_text(), flags=re.M)  # commands, which are code
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


@pytest.mark.slow
def test_unfinished_cut_and_old_runs_are_reported(capsys, runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "resist", run)
    (run / "model.safetensors").unlink()
    (run / "environment.json").unlink()
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-700])
    (run / "state.json").write_text(json.dumps({"state": "running", "rounds": 60}))
    found = Page(page([read_history(run)])).text
    for sentence in ("39 of 60 rounds are done", "is cut off", "environment.json is missing", "not finished"):
        assert sentence in found
    config = json.loads((run / "config.json").read_text())
    del config["method"]["outer"], config["machine"]
    config["network"]["telepathy"] = 3
    config["method"]["strategy"] = "sorcery"
    (run / "config.json").write_text(json.dumps(config))
    bare = [{"round": n, "step": 5 * n} for n in range(1, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in bare))
    found = Page(page([read_history(run)])).text
    assert "not understood: telepathy, strategy" in found
    assert "not tested" in found
    assert report(capsys, run, "-o", tmp_path / "x.md")[0] == 0


def test_rounds_in_which_a_worker_was_left_out_are_noted(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "resist", run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records[4] |= {"dropped": {"2": "a loss of nan in step 3"}}
    records[4]["workers"][2]["loss"] = None
    records[-1]["scores"] = {"accuracy": 0.9, "top5": 0.987}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "In 1 round workers were left out" in (text := Page(page([read_history(run)])).text)
    assert "98.70 %" in text


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
anything = st.recursive(values, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))
KEYS = (
    "epoch",
    "lr",
    "loss",
    "accuracy",
    "images",
    "seconds",
    "bytes",
    "pairs",
    "plan",
    "workers",
    "dropped",
    "scores",
    "weights",
    "evaluation",
    "startup_s",
)


@pytest.mark.slow
@given(st.fixed_dictionaries({"round": st.integers(1, 9), "step": st.integers(1, 99)},
                             optional=dict.fromkeys(KEYS, anything)))  # fmt: skip
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_record_is_drawn_or_refused(runs: Path, tmp_path: Path, record: dict[str, object]) -> None:
    shutil.copyfile(runs / "resist" / "config.json", tmp_path / "config.json")
    (tmp_path / "environment.json").write_text(json.dumps({"missing_rounds": [[1, 9]]}))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n" + json.dumps({"round": 10, "step": 100}) + "\n")
    try:
        history = read_history(tmp_path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    Page(page([history]))


def test_a_record_needs_its_round_and_step() -> None:
    for record in ({}, {"round": 1}, {"round": 0, "step": 1}, {"round": 1, "step": 1, "plan": {"x": [[10**9]]}}):
        with pytest.raises((KeyError, ValueError)):
            clean(record)


finite = st.floats(-1e12, 1e12)


@given(finite, finite, st.integers(1, 12))
def test_ticks_are_few_round_and_within(low: float, high: float, num: int) -> None:
    assume(high - low > 1e-6 * max(abs(low), abs(high)))
    found = ticks(low, high, num)
    slack = (high - low) * 1e-6
    assert all(low - slack <= value <= high + slack for value in found)
    assert len(found) <= 2 * num + 2
    assert found == sorted(found)


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 12))
def test_whole_ticks_are_whole_and_within(low: int, more: int, num: int) -> None:
    found = whole_ticks(low, low + more, num)
    assert all(low <= value <= low + more for value in found)
    assert len(found) <= num + 1


@given(st.floats(1e-6, 1e6), st.floats(1.0, 1e9))
def test_log_ticks_lie_within(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert all(low * 0.99 <= value <= low * ratio * 1.01 for value in found)
    assert len(found) <= 35


@given(st.lists(finite, min_size=1, max_size=400), st.integers(1, 60))
def test_fewer_points_keep_the_mean_the_ends_and_the_bound(values: list[float], num: int) -> None:
    assert len(means(values, num)) == len(ends(values, num)) <= num
    assert ends(values, num)[-1] == values[-1]
    if len(values) % num == 0:
        assert np.mean(means(values, num)) == pytest.approx(np.mean(values), abs=1e-3)
    assert len(sample(len(values), num)) <= num
    assert thin(len(values), num)[-1] == len(values) - 1
    assert math.isnan(means([math.nan], 1)[0])


def test_the_error_of_a_failed_run_names_options_as_they_are_typed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TrainConfig().to_json()))
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "step": 5, "loss": 1.0}\n')
    (tmp_path / "state.json").write_text('{"state": "failed", "rounds": 2, "error": "give `lr=0.1`"}')
    run_report(ReportConfig(runs=(tmp_path,)), frozenset())
    text = (tmp_path / "report.html").read_text()
    assert "give --lr 0.1" in text
    assert "`lr" not in text


def test_members_that_came_and_went_are_in_the_report(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run", rounds=6, workers=4)
    assert "Members that came" not in page([read_history(run)])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    one = {"number": 1, "round": 3, "step": 180, "workers": 3, "left": [2], "came": [], "repeated": True}
    lines[2] |= {"step": 180, "workers": lines[2]["workers"][:1], "generations": [one | {"pause_s": 0.25}]}
    lines[3] |= {"step": 230, "workers": lines[3]["workers"][:3]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_history(run)
    assert history.steps[:4] == [50, 100, 135, 172]  # of four workers, of which three have gone on
    assert [each["left"] for each in history.generations] == [[2]]
    status, _, _ = report(capsys, run, "--out", run / "report.md")
    assert status == 0
    text = (run / "report.md").read_text()
    assert "The members changed once (1 left, 0 came), which took 250 ms in all" in text
    assert "| 1 | 3 | 2 | – | 3 | yes | 250 ms |" in text
    assert "Members that came and went" in page([history])
