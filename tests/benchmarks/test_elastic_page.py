"""Tests of the benchmark of members that come and go: figures from events, and the section of the page."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import elastic_figures as figures
import elastic_page

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ORIGIN = {"date": "2020-01-02", "commit": "abc", "machine": "m", "cores": 2, "gpu": None, "torch": "t", "python": "p"}
QUIET, FAULTY = (0.0, 4.0), (4.0, 12.0)


def event(name: str, at: float, pid: int = 1, **values: Any) -> dict[str, Any]:
    return {"event": name, "at": at, "pid": pid, **values}


def rounds_of_a_job() -> list[dict[str, Any]]:
    """Two workers and a round of 2 s; the second one is lost at 5 s, another one comes at 10 s."""
    own = {"worker": 0, "generation": 0, "digest": "a", "workers": 2, "members": [1, 2]}
    left = own | {"generation": 1, "workers": 1, "members": [1]}
    joined = own | {"generation": 2, "members": [1, 3]}
    return [
        *(event("round", 2.0 * n, round=n, step=2 * n, **own) for n in (0, 1, 2)),
        *(event("step", float(n)) for n in range(7)),
        event("round", 6.0, round=3, step=6, **own), event("step", 9.5), event("regroup", 9.0, round=3, step=14,
                                                                               repeated=False, **left),
        event("round", 9.8, round=4, step=16, **left), event("ready", 8.0, 3), event("step", 11.0),
        event("regroup", 10.0, round=4, step=8, repeated=True, **joined), event("member", 10.0, 3),
        event("round", 12.0, round=5, step=10, **joined),
    ]  # fmt: skip


def test_images_are_those_that_all_have_seen_however_many_workers_there_are() -> None:
    kept = figures.kept_images(sorted(rounds_of_a_job(), key=lambda e: e["at"]), batch=10)
    assert [images for _, images in kept] == [0, 40, 80, 120, 140, 160, 160, 200]
    # 20 images a second without faults; with faults 120 in 8 s.
    assert figures.goodput(kept, [QUIET], FAULTY) == 75.0


def test_an_image_of_a_replica_counts_where_its_weights_are_averaged() -> None:
    events = [
        event("round", 1.0, round=1, images=10), event("round", 1.1, 2, round=1, images=10),
        event("failed", 2.0, 2, round=1), event("round", 3.0, 2, round=2, images=20),  # of two rounds of steps
        event("round", 4.0, 3, round=2, images=0),  # it had come, and has what another had
    ]  # fmt: skip
    assert figures.kept_images(events, batch=5) == [(1.1, 20), (4.0, 40)]
    assert figures.repeats(events) == {(1, "failed")}


def test_a_pause_is_beyond_the_usual_and_that_of_the_newcomer_is_apart() -> None:
    events = sorted(rounds_of_a_job(), key=lambda e: e["at"])
    usual_s = figures.usual_gap(events, QUIET)
    assert usual_s == 1.0
    fault = {"kind": "SIGKILL", "at": 6.5, "at_s": 2.5, "pid": 2, "survivors": [1], "replaced": [3], "ended": "ended"}
    cost = figures.judged(fault, events, usual_s, until=20.0)
    assert (cost["pause_s"], cost["join_pause_s"], cost["back_s"], cost["repeated"]) == (2.5, 0.5, 3.5, 1)


def test_two_runs_and_members_that_disagree_are_defects() -> None:
    whole = event("whole", 20.0, complete=True, finite=True, trained=True)
    good = [*rounds_of_a_job(), whole]
    assert figures.defects(good) == []
    assert figures.defects(rounds_of_a_job()) == ["no network at the end"]
    assert figures.defects([*rounds_of_a_job(), whole | {"finite": False}]) == ["the network at the end is not finite"]
    other = event("round", 2.0, 2, round=1, step=2, worker=1, generation=0, workers=2, members=[1, 2], digest="b")
    assert figures.defects([*good, other]) == ["members disagree at ('round', 0, 1)"]
    second = other | {"digest": "a", "members": [2], "worker": 0}
    assert figures.defects([*good, second]) == [
        "two processes are one worker at ('round', 0, 1)", "generation 0 has two lists of members",
    ]  # fmt: skip
    again = other | {"digest": "a", "generation": 7, "members": [7]}
    assert figures.defects([*good, again]) == ["round 1 has ended in generations 0 and 7"]


def row(method: str, goodput: float, kill_s: float, stop_s: float, **other: Any) -> dict[str, Any]:
    faults = [
        {"kind": kind, "at_s": 1.0, "ended": ended, "pause_s": pause, "join_pause_s": 0.2, "back_s": 4.0, "repeated": 0}
        for kind, pause, ended in (
            ("SIGKILL", kill_s, "ended (0.0 s)"), ("SIGKILL", 0.1, "ended (0.0 s)"),
            ("SIGSTOP", stop_s, "left when it woke (0.1 s)"), ("connections cut", 0.3, "ended (0.5 s)"),
        )
    ]  # fmt: skip
    return {
        "method": method, "goodput_percent": goodput, "faults": faults, "repeated": 1, "replacements": 3,
        "absent_percent": 4.5, "round_s": 2.1, "round_mb": 12.34, "peak_mb": 700.0, "late_percent": 0.25, "defects": [],
        **other,
    }  # fmt: skip


def test_each_target_is_reached_or_missed() -> None:
    settings = {
        "members": 4, "depths": [1, 1, 9, 1], "width": 8, "step_s": 0.1, "local_steps": 20, "every": 30.0,
        "seconds": 600.0, "undisturbed": 60.0, "bound_s": 5.0, "missed": 5, "seed": 0, "torchft": "0.2.0",
        "wire": "fp32", "fragments": 0,
    }  # fmt: skip
    record = {**settings, **ORIGIN, "methods": [row("resist", 90.0, 0.4, 5.5), row("torchft", 85.0, 5.0, 5.5)]}
    page = elastic_page.section([record])
    assert "Every 30 s for 600 s one of them is hit, at a moment drawn within a round: 4 faults" in page
    assert "do not decide; 0.2 % of the steps took longer)" in page
    assert "| ResIST, `Membership` | 90.0 | 4.5 | 3 | 1 | 2.10 | 12.3 | 700 |" in page
    assert "| ResIST, `Membership` | 0.25 (max 0.40) | 5.50 (max 5.50) |  | 0.30 (max 0.30) | 0.20 |" in page
    assert page.count(": reached (") == 3
    assert "A process that was stopped: left when it woke. One whose connections were cut: ended." in page
    worse = row("resist", 84.0, 1.2, 6.2, defects=["members disagree at x"], round_mb=None)
    page = elastic_page.section([record | {"methods": [worse, row("torchft", 85.0, 5.0, 5.5)]}])
    assert page.count(": **missed** (") == 3
    assert "**defects: members disagree at x.**" in page
    assert "| ? |" in page
    alone = elastic_page.section([record | {"methods": [row("resist", 90.0, 0.4, 5.5)]}])
    assert "a goodput at least" not in alone
    assert "of the default.\n" in page
    assert "of the default. ResIST sends in int4, the shared part in 4 fragments;" in elastic_page.section(
        [record | {"wire": "int4", "fragments": 4}]
    )


def test_pairs_of_runs_whose_processes_are_killed() -> None:
    def pair(seed: int, quiet: float, disturbed: float) -> dict[str, Any]:
        run = {"rounds": 20, "repeated": 1, "images": 1000, "generations": 4}
        runs = {
            "undisturbed": run | {"percent": quiet, "kills": 0},
            "disturbed": run | {"percent": disturbed, "kills": 2},
        }
        return {**ORIGIN, "seed": seed, "epochs": 0.6, "every": 12.0, **runs}

    one = elastic_page.accuracy([pair(0, 35.0, 34.5)])
    assert "| 0 | 35.00 | 34.50 | -0.50 | 2 | 4 | 1 | +0.00 |" in one
    assert "of undisturbed runs: not known from one seed." in one
    three = elastic_page.accuracy([pair(0, 35.0, 34.5), pair(1, 36.0, 36.1), pair(2, 34.0, 34.1)])
    assert "-0.10 ± 0.20 points" in three
    assert "undisturbed runs (1.00 points): reached." in three
    assert three.count("n = 3 pairs of runs") == 1
    assert "**missed**" in elastic_page.accuracy([pair(0, 35.0, 30.0), pair(1, 36.0, 31.0)])


@pytest.mark.nightly
@pytest.mark.timeout(300)
@pytest.mark.parametrize("options", [(), ("--wire", "int4", "--fragments", "4")])
def test_a_short_run_of_the_benchmark_has_no_defect(options: tuple[str, ...]) -> None:
    short = ["--seconds", "16", "--every", "8", "--undisturbed", "5", "--methods", "resist", "--no-record"]
    command = [sys.executable, str(BENCHMARKS / "elastic.py"), *short, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "DEFECT" not in done.stdout
    assert done.stderr.count("resist: ") == 2  # two faults
