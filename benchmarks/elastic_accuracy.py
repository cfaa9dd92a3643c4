"""Accuracy of an elastic run whose processes are killed, beside one that nobody disturbs, seed by seed.

    python benchmarks/elastic_accuracy.py --data-dir DIR --seeds 0 1 2

`resist train --elastic 2:4` on CIFAR-10, four processes of one thread. In the disturbed run one of them, drawn at
random, gets SIGKILL every `--every` seconds; the launcher starts it again. Both runs see equally many images in all.
A table is printed; one line of JSON for each seed is appended to benchmarks/results/elastic_accuracy.jsonl.
"""

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from provenance import provenance

RESULTS = Path(__file__).parent / "results" / "elastic_accuracy.jsonl"
OPTIONS = shlex.split(
    "--data cifar10 --model preact_small --model-args depths=1,1,9,1 width=8 --elastic 2:4 --local-steps 25 "
    "--min-depth 0 --batch-size 32 --lr 0.05 --lr-schedule cosine --optimizer-state average --batchnorm average "
    "--num-evals 1 --checkpoint-rounds 1000"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=float, default=0.6, help="passes of each of four workers")
    parser.add_argument("--every", type=float, default=12.0, help="seconds between two kills")
    parser.add_argument("--no-record", action="store_true", help="append nothing to the results")
    args = parser.parse_args()
    differences: list[float] = []
    for seed in args.seeds:
        quiet, disturbed = (trained(args, seed, every) for every in (None, args.every))
        differences.append(disturbed["percent"] - quiet["percent"])
        print(f"seed {seed}: {quiet['percent']:.2f} % undisturbed, {disturbed['percent']:.2f} % with "
              f"{disturbed['kills']} kills, {disturbed['repeated']} rounds repeated", flush=True)  # fmt: skip
        line = {"benchmark": "elastic_accuracy", "seed": seed, "epochs": args.epochs, "every": args.every,
                "undisturbed": quiet, "disturbed": disturbed, **provenance("elastic_accuracy")}  # fmt: skip
        if not args.no_record:
            with RESULTS.open("a") as file:
                file.write(json.dumps(line) + "\n")
    error = f" ± {statistics.stdev(differences) / len(differences) ** 0.5:.2f}" if len(differences) > 1 else ""
    print(f"difference {statistics.mean(differences):+.2f}{error} points, n = {len(differences)}")


def trained(args: argparse.Namespace, seed: int, every: float | None) -> dict[str, Any]:
    """Train once, and kill a process every so many seconds; None: never."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "resist", "train", *OPTIONS, "--data-dir", args.data_dir, "--seed", str(seed),
                   "--epochs", str(args.epochs), "--out", str(out)]  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        kills, draw = 0, random.Random(seed)
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as launcher:
            while launcher.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    launcher.wait(1.0 if every is None else every)
                    continue
                members = children(launcher.pid)[1:]  # the first child is the store, which has to outlive them
                if every is not None and (out / "metrics.jsonl").exists() and members:
                    os.kill(draw.choice(members), signal.SIGKILL)
                    kills += 1
            assert launcher.stderr is not None
            error = launcher.stderr.read().decode()
        if launcher.returncode != 0:
            raise SystemExit(f"seed {seed}: status {launcher.returncode}\n{error}")
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    changes = [change for record in records for change in record.get("generations", ())]
    return {
        "percent": round(100 * records[-1]["accuracy"], 2), "rounds": len(records), "kills": kills,
        "generations": len(changes), "repeated": sum(change["repeated"] for change in changes),
        "images": sum(record["images"] for record in records),
    }  # fmt: skip


def children(process: int) -> list[int]:
    """Return the processes that a process has started and that still run, the oldest first (Linux)."""
    return sorted(int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split())


if __name__ == "__main__":
    main()
