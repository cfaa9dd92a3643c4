"""The page of several runs: its conclusion, several seeds as mean and range, where the numbers come from."""

import io
import json
import re
import statistics
from dataclasses import replace
from html import unescape
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from report_runs import make_run
from resist.cli.compare import print_comparison
from resist.cli.report import ReportConfig, run_report
from resist.report.colors import COLORS, PHASES
from resist.report.compare import baseline_of, compare, labels
from resist.report.conclusion import T, caveats, conclusion, noise_points
from resist.report.curves import curves_of
from resist.report.markdown import markdown
from resist.report.page import page
from resist.report.provenance import common, differing, environment, repeat_all
from resist.report.tables import headline, local_sgd_sentence, wall_parts
from resist.report.units import amount, duration
from resist.runs.directory import title_of
from resist.runs.history import History, read_history


def edited(path: Path, *, accuracy: float, slower: float = 1.0) -> History:
    """Read a run after its last accuracy was set and its seconds were multiplied."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    records[-1]["accuracy"] = accuracy
    for record in records:
        record["seconds"] = {phase: slower * value for phase, value in record["seconds"].items()}
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return read_history(path)


@pytest.fixture(scope="module")
def histories(tmp_path_factory) -> list[History]:
    """Two seeds of ResIST, then two of local SGD."""
    folder = tmp_path_factory.mktemp("compared")
    accuracies = {("resist", 0): 0.9, ("resist", 1): 0.92, ("local_sgd", 0): 0.93, ("local_sgd", 1): 0.96}
    return [
        edited(make_run(folder / f"{name}-{seed}", strategy=name, seed=seed, rounds=8), accuracy=accuracy,
               slower=1 + seed / 10) for (name, seed), accuracy in accuracies.items()
    ]  # fmt: skip


def text_of(html: str) -> str:
    body = re.sub(r"<(script|style).*?</\1>", "", html, flags=re.S)
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", body)))


def test_the_page_begins_with_the_conclusion(histories: list[History]) -> None:
    rows = {row["label"]: row for row in compare(histories)["rows"]}
    faster = rows["resist"]["speed_up"]["time"]
    sentences = conclusion(compare(histories))
    assert f"A step of ResIST was {faster:.2f} times as fast as one of local SGD" in sentences[0]
    assert "91.00 %, is 3.50 points lower than that of local SGD, 94.50 %" in sentences[1]
    html = page(histories)
    assert "91.00&nbsp;%" in html
    assert html.index(sentences[0][:40]) < html.index("<main>") < html.index("<table>") < html.index("<svg")
    assert html.index('class="legend"') < html.index("Test accuracy against steps")
    assert sentences[0] in markdown(histories, "c.png", ["p.png"] * 4).replace("\\", "")


def test_what_chance_explains_is_the_interval_of_welch(histories: list[History]) -> None:
    rows = compare(histories)["rows"]
    # scipy.stats.ttest_ind([90, 92], [93, 96], equal_var=False).confidence_interval(): 3.5 points +- 8.967
    noise = noise_points(*rows)
    assert noise is not None
    assert 8.967 <= noise < 1.15 * 8.967  # a little too wide, because the table of quantiles is interpolated
    equal = [{"accuracy_by_run": [0.9, 0.92], "accuracy_sd": 0.02 / 2**0.5}] * 2  # two degrees of freedom
    assert noise_points(*equal) == pytest.approx(4.303 * 2**0.5, rel=1e-3)
    assert len(T) == 30
    assert all(a >= b for a, b in pairwise(T))
    assert "may be noise: with 2 seeds each" in conclusion(compare(histories))[2]
    rows[0] |= {"accuracy_by_run": [0.9, 0.9001], "accuracy_sd": statistics.stdev([0.9, 0.9001]), "accuracy": 0.90005}
    rows[1] |= {"accuracy_by_run": [0.95, 0.9501], "accuracy_sd": statistics.stdev([0.95, 0.9501]), "accuracy": 0.95005}
    assert "more than noise" in conclusion({"rows": rows})[2]
    rows[0]["accuracy_sd"] = rows[1]["accuracy_sd"] = 0.0
    assert "says nothing about noise" in conclusion({"rows": rows})[2]


def test_the_terminal_shows_whole_numbers_and_the_conclusion(histories: list[History]) -> None:
    console = Console(record=True, width=80, file=io.StringIO(), soft_wrap=True)
    print_comparison(compare(histories), console)
    text = console.export_text()
    assert "…" not in text
    assert "local_sgd 94.50 ± 2.12" in text
    assert conclusion(compare(histories))[0] in text


def test_the_baseline_comes_last(histories: list[History], tmp_path: Path) -> None:
    run_report(ReportConfig(runs=(histories[2].path, histories[0].path), out=tmp_path / "x.html"), frozenset())
    nav = re.search(r"<nav.*?</nav>", (tmp_path / "x.html").read_text(), re.S)
    assert nav is not None
    assert nav[0].index("resist-0") < nav[0].index("local_sgd-0")


def test_one_run_of_each_says_nothing_about_noise(histories: list[History]) -> None:
    sentences = conclusion(compare([histories[0], histories[2]]))
    assert "nothing can be said about noise" in sentences[-1]
    assert not any("chance" in sentence for sentence in sentences)
    assert "of local SGD, so nothing can be said about its noise" in conclusion(compare(histories[:3]))[-1]


def test_of_many_the_best_are_named(tmp_path: Path) -> None:
    runs = [edited(make_run(tmp_path / str(workers), workers=workers, capacity=11, rounds=2),
                   accuracy=0.8 + workers / 100) for workers in range(2, 8)]  # fmt: skip
    sentences = conclusion(compare(runs))
    assert sentences[0] == "Of 6, ResIST, workers 7 has the best test accuracy, 87.00 %."
    assert sentences[2].startswith("ResIST, workers 2 sends least")
    assert len(sentences) == 4


def test_a_sweep_of_seeds_has_mean_and_spread(histories: list[History]) -> None:
    (sentence,) = conclusion(compare(histories[:2]))
    assert sentence.startswith("2 runs of ResIST that differ in their seeds: test accuracy 91.00 % ± 1.41 (90.00 to 92")
    text = text_of(page(histories[:2]))
    assert "91.00 % ± 1.41" in text
    assert "speed‑up" not in text


def test_lines_of_seeds_are_their_mean_and_range(histories: list[History]) -> None:
    (steps, time, _, loss, *_) = curves_of(histories, labels(histories))
    for plot in (steps, time, loss):
        assert [line.name for line in plot.series] == ["resist", "local_sgd"]
        assert len({line.dashes for line in plot.series}) == 2
        for line in plot.series:
            assert all(low <= y <= high for low, y, high in zip(line.low, line.y, line.high, strict=True))
    line = steps.series[0]
    assert (line.low[-1], line.y[-1], line.high[-1]) == pytest.approx((90, 91, 92))
    assert time.series[0].x[-1] == pytest.approx((histories[0].seconds[-1] + histories[1].seconds[-1]) / 2)
    (alone, *_) = curves_of(histories[:1], ["full network"])
    assert not alone.series[0].low


def test_further_seeds_come_last_and_folded(histories: list[History]) -> None:
    found = re.findall(r'<details class="run"( open|)><summary><h2>(\S+)', page(histories))
    assert found == [(" open", "resist-0"), (" open", "local_sgd-0"), ("", "resist-1"), ("", "local_sgd-1")]


def test_what_is_equal_is_said_once(histories: list[History]) -> None:
    html = page(histories)
    assert text_of(html).count("a processor") == 1
    assert html.count("<pre") == 1
    names = [name for name, *_ in differing(histories, lambda h: [("seed", str(h.config.run.seed)), ("x", "1")])]
    assert names == ["seed"]
    assert ("torch", "2.14") in common(histories, environment)
    assert len(repeat_all(histories)) == 1 + len(histories)


def test_the_command_is_quoted_and_that_of_the_program(histories: list[History]) -> None:
    command = ["__main__.py", "train", "--out", "my runs/a"]
    history = History(**{**vars(histories[0]), "environment": {"command": command}})
    assert ("command", "resist train --out 'my runs/a'") in environment(history)
    assert "__main__" not in page([history])


def test_runs_that_do_not_compare_well_are_marked(histories: list[History], tmp_path: Path) -> None:
    assert caveats(compare(histories), histories) == []
    other = read_history(make_run(tmp_path / "short", rounds=4, strategy="local_sgd"))
    (other.path / "model.safetensors").unlink()
    other.environment["cores"] = 64
    found = " ".join(caveats(compare([histories[0], other]), [histories[0], other]))
    for text in ("1 of the 2 runs did not finish", "200 to 400 steps", "their times do not compare"):
        assert text in found


def with_wire(history: History, **method: object) -> History:
    config = replace(history.config, method=replace(history.config.method, **method))  # type: ignore[arg-type]
    return replace(history, config=config)


def test_runs_of_different_wires_are_marked_and_compared_with_their_own(histories: list[History]) -> None:
    resist, local_sgd = histories[0], histories[2]
    short, same = with_wire(resist, wire="int8"), with_wire(local_sgd, wire="int8")
    assert labels([resist, local_sgd]) == ["resist", "local_sgd"]
    assert labels([short, local_sgd]) == ["resist, wire int8", "local_sgd, wire fp32"]
    assert labels([short, same]) == ["resist", "local_sgd"]
    streamed = with_wire(same, fragments=5)
    assert labels([short, streamed]) == ["resist, fragments 0", "local_sgd, fragments 5"]
    (found,) = caveats(compare([short, local_sgd]), [short, local_sgd])
    assert "are not the same (int8, fp32)" in found
    runs = [short, local_sgd, same]
    rows = compare(runs)["rows"]
    assert baseline_of(rows[0], rows) is rows[2]
    found = " ".join(caveats(compare(runs), runs))
    assert "ResIST" not in found
    assert "local SGD, wire fp32 and" not in found


def test_a_run_says_how_it_was_sent(histories: list[History]) -> None:
    run = with_wire(histories[0], wire="int8", wire_parts=("shared=int4",), fragments=5)
    rows = dict(headline(run))
    assert rows["wire"] == "int8 shared=int4, 5 fragments"
    sent = [sum(record["bytes"][kind] for record in run.rounds) for kind in ("shared", "blocks")]
    assert rows["… of which"] == f"shared {amount(sent[0])} · blocks {amount(sent[1])}"
    assert rows["synchronizing"].endswith("; waiting for fragments counts as training")
    assert "of weights in the same rounds in the same wire format" in " ".join(local_sgd_sentence(run))
    assert title_of(run.config).endswith("4 workers, int8 shared=int4, 5 fragments")
    assert title_of(histories[0].config).endswith("4 workers")


def test_a_run_says_what_local_sgd_would_have_cost(histories: list[History]) -> None:
    text = text_of(page(histories[:1]))
    rounds, weights = histories[0].rounds, histories[0].rounds[0]["weights"]
    assert "With local SGD each worker would hold all weights" in text
    assert f"{len(rounds) * weights['local_sgd_bytes'] / 1e9:,.1f} GB of weights" in text
    assert "27% of the network's 41,400,000 weights" in text
    assert "With local SGD" not in text_of(page(histories[2:3]))  # it is local SGD
    old = History(**{**vars(histories[0]), "rounds": [{**record, "weights": {}} for record in rounds]})
    assert "With local SGD" not in text_of(page([old]))


def test_the_page_says_where_the_time_went_and_who_tested(histories: list[History]) -> None:
    history = histories[0]
    phases = sum(sum(record["seconds"].values()) for record in history.rounds)
    parts = dict(wall_parts(history))
    assert parts["start-up"] == 6.5
    assert sum(parts.values()) == pytest.approx(phases + 6.5) == pytest.approx(sum(history.wall.values()))
    html = page([history])
    text = text_of(html)
    assert f"wall clock {duration(phases + 6.5)}" in text
    who = "All processes tested the full network, each a share of the images (2 processes compute at once)."
    assert who in text
    bar = re.search(r'<div class="bar" role="img" aria-label="(.*?)">(.*?)</div>', html)
    assert bar is not None
    assert re.match(r"start-up \d+%, compute \d+%", bar[1])
    assert sum(map(float, re.findall(r"width:([\d.]+)%", bar[2]))) == pytest.approx(100, abs=0.1)
    written = markdown([history], "c.png", ["p.png"]).replace("\\", "")
    assert who in written
    assert f"| wall clock | {duration(phases + 6.5)} |" in written
    ended = History(**{**vars(history), "state": {"state": "finished", "closing_s": 2.0}})
    assert sum(dict(wall_parts(ended)).values()) == pytest.approx(phases + 8.5)
    one = [{**record, "evaluation": {"by": "one", "reason": "EVIL <b>"}} for record in history.rounds]
    assert "The process of worker 0 tested the full network (EVIL <b>)" in text_of(
        page([History(**{**vars(history), "rounds": one})])
    )
    old = [{**record, "evaluation": {}, "startup_s": 0.0} for record in history.rounds]
    before = text_of(page([History(**{**vars(history), "rounds": old})]))
    assert "tested the full network" not in before
    assert "start-up" not in before
    assert f"all rounds {duration(phases)}" in before


def test_axes_that_do_not_begin_at_zero_are_marked(histories: list[History]) -> None:
    html = page(histories[:1])
    figures = re.findall(r"<figure.*?</figure>", html, re.S)
    accuracy = next(figure for figure in figures if "Test accuracy against steps" in figure)
    loss = next(figure for figure in figures if "Training loss against steps" in figure)
    assert 'class="break"' in accuracy
    assert "%, not from 0" in accuracy
    assert 'class="break"' not in loss
    assert ">0</span>" in loss


def test_a_run_that_was_tested_once_has_no_curve_of_its_accuracy(tmp_path: Path) -> None:
    once = read_history(make_run(tmp_path / "once", rounds=5, num_evals=1))
    text = text_of(page([once]))
    assert "tested once, after round 5" in text
    assert "Test accuracy against" not in text
    assert "Training loss against steps" in text
    other = read_history(make_run(tmp_path / "other", rounds=5, num_evals=1, strategy="local_sgd"))
    html = page([once, other])
    assert "Test accuracy against steps" in html
    assert 'class="break"' not in html  # a lone point has an axis from 0


def test_pictures_and_tables_have_names_for_screen_readers(histories: list[History]) -> None:
    html = page(histories)
    assert html.count("<svg") == html.count('role="img" aria-label="') + html.count('aria-hidden="true">') - html.count(
        'ticks" aria-hidden="true">'
    ) - html.count('class="bar" role="img"')
    assert all("<title>" in rect for rect in re.findall(r"<rect.*?</rect>", html))
    assert not re.search(r"<th(?![a-z])(?! scope)", html)
    assert all('tabindex="0"' in tag and "aria-label" in tag for tag in re.findall(r'<div class="scroll".*?>', html))


# How those see colors who have no receptors for red, green or blue light (Machado et al., 2009), in linear RGB.
BLIND = {
    "none": np.eye(3),
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color: str) -> np.ndarray:
    values = np.array(list(bytes.fromhex(color[1:]))) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB."""
    x, y, z = np.cbrt(TO_XYZ @ rgb.clip(0, 1) / np.array([0.9505, 1, 1.089]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLIND)
@pytest.mark.parametrize("colors", [COLORS, tuple(PHASES.values())], ids=["workers", "phases"])
def test_the_color_blind_can_distinguish_colors(kind: str, colors: tuple[str, ...]) -> None:
    seen = [lab(np.array(BLIND[kind]) @ linear(color)) for color in colors]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 18
    for color in colors:
        light = float((TO_XYZ @ linear(color))[1])
        assert 1.05 / (light + 0.05) > 2.3, "on white"
        assert (light + 0.05) / 0.0585 > 2.8, "on the dark ground"
