"""A seeded sweep of faults: kill, stop, delay or raise in one of four processes, at every point of a run.

    python benchmarks/faults.py --number 100 --seed 0 --lanes 2 --scratch /a/folder

tests/faults/injection.py describes what is drawn and what each run has to fulfil. Every outcome is kept in the scratch
folder as it comes, so that a sweep that was broken off goes on; the sum goes to benchmarks/results/faults.jsonl. Times
depend on the timeout, and on what else the machine does.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from provenance import provenance

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests" / "faults"))

from injection import KINDS, POINTS, Fault, draw, suffer, undisturbed  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout-s", type=float, default=30.0)
    parser.add_argument("--lanes", type=int, default=2, help="runs at the same time")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--start", action="store_true", help="start each process instead of forking it")
    parser.add_argument("--lane", type=int, help=argparse.SUPPRESS)  # one of the lanes, a process of its own
    options = parser.parse_args()
    origin = provenance("faults")  # of the code as it is when the sweep begins
    options.scratch.mkdir(parents=True, exist_ok=True)
    reference, warm = options.scratch / "undisturbed", not options.start
    faults = list(enumerate(draw(options.seed, options.number, options.timeout_s)))
    if options.lane is not None:
        for number, fault in faults[options.lane :: options.lanes]:
            one(number, fault, options.scratch, reference, options.timeout_s, warm)
        return
    if not (reference / "model.safetensors").exists():
        shutil.rmtree(reference, ignore_errors=True)
        undisturbed(options.scratch, options.timeout_s, warm=warm)
    again = [sys.executable, *sys.argv]
    lanes = [subprocess.Popen([*again, "--lane", str(number)]) for number in range(options.lanes)]
    if sum(lane.wait() for lane in lanes):
        sys.exit("a lane was broken off; the same command goes on with it")
    outcomes = [json.loads((options.scratch / f"{number:03d}.json").read_text()) for number, _ in faults]
    record = {
        "benchmark": "faults", "seed": options.seed, "timeout_s": options.timeout_s, "lanes": options.lanes,
        "forked": warm, **summary(outcomes), **origin,
    }  # fmt: skip
    with (HERE / "results" / "faults.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def one(number: int, fault: Fault, scratch: Path, reference: Path, timeout_s: float, warm: bool) -> None:
    kept, folder = scratch / f"{number:03d}.json", scratch / f"{number:03d}"
    if kept.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    outcome = suffer(fault, folder, reference, timeout_s, warm=warm)
    kept.write_text(json.dumps(asdict(outcome), indent=1))
    print(number, fault, outcome.statuses, outcome.to_end_s, outcome.total_s, outcome.problems, flush=True)


def summary(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind and by point, how the commands ended, and seconds from a fault to the end of its command."""
    seconds = {
        kind: [one["to_end_s"] for one in outcomes if one["fault"]["kind"] == kind] for kind in KINDS if kind != "delay"
    }
    return {
        "number": len(outcomes),
        "kinds": {kind: sum(one["fault"]["kind"] == kind for one in outcomes) for kind in KINDS},
        "points": {point: sum(one["fault"]["point"] == point for one in outcomes) for point in POINTS},
        "statuses": dict(Counter(" ".join(map(str, one["statuses"])) for one in outcomes)),
        "same_weights": sum(
            one["statuses"][-1] == 0 and "other weights than the undisturbed run" not in one["problems"]
            for one in outcomes
        ),
        "to_end_s": {
            kind: {"median": round(statistics.median(values), 1), "max": max(values)}
            for kind, values in seconds.items()
            if values
        },
        "problems": [{**one["fault"], "problems": one["problems"]} for one in outcomes if one["problems"]],
    }


if __name__ == "__main__":
    main()
