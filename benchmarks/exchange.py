"""Measure the seconds of one synchronization over loopback: ResIST, local SGD and the published pattern.

    python benchmarks/exchange.py                    # the paper's ResNet101 with 100 classes, S = 2 and 4
    python benchmarks/exchange.py --width 8 --repetitions 3 --workers 2       # takes seconds, as a test

One process per worker, one thread each, gloo over the loopback interface. In every repetition each method synchronizes
once, in a rotating order; a barrier comes before each, and the slowest process counts. All methods send fp32 parameters
only (optimizer_state=reset), except where the row says that momentum is sent too, or names a wire format: loopback is
so fast that encoding costs more than the bytes. For the methods see competitors.py.

Other programs may use the machine. The share of the processors that they took is measured in each repetition (Linux).
A repetition with a share above `--quiet` is repeated for all methods, up to four times the number of repetitions; then
the quietest are kept. The table has this share, and the processor seconds of all workers together, which other
programs disturb less.

A table is printed; one line of JSON with the provenance is appended to benchmarks/results/exchange.jsonl.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from competitors import Method, make
from provenance import busy_seconds, provenance
from resist.models import build

RESULTS = Path(__file__).parent / "results" / "exchange.jsonl"
METHODS = (
    "resist,optimizer_state=reset",
    "resist,optimizer_state=travel",
    "resist,optimizer_state=reset,wire=bf16",
    "resist,optimizer_state=reset,wire=int8",
    "local_sgd,optimizer_state=reset",
    "flat",
    "averager",
    "published",
    "published-kept",
)
HEADLINE = METHODS[0]
TIDIED = "published, groups taken down"  # as a run of hundreds of rounds must: the groups hold sockets and threads
Repetition = dict[str, Any]  # "seconds", "cpu_seconds" by method; "others": other programs' share of the processors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preact_resnet101")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--quiet", type=float, default=0.1, help="share of the processors that other programs may take")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--no-record", action="store_true", help="do not append to the results")
    args = parser.parse_args()
    if HEADLINE not in args.methods:
        args.methods.insert(0, HEADLINE)
    results = {}
    for workers in args.workers:
        results[str(workers)] = result = summary(measure(args, workers), args.repetitions)
        print(table(workers, result), flush=True)
    settings = {key: getattr(args, key) for key in ("model", "width", "num_classes", "repetitions", "quiet")}
    record = {"benchmark": "exchange", **settings, "results": results, **provenance("exchange")}
    if not args.no_record:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(record) + "\n")


def measure(args: argparse.Namespace, workers: int) -> list[Repetition]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker_main, args=(workers, folder, args), nprocs=workers)  # type: ignore[attr-defined]
        return json.loads((Path(folder) / "repetitions.json").read_text())


def worker_main(rank: int, workers: int, folder: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)

    def network() -> torch.nn.Module:
        return build(args.model, num_classes=args.num_classes, width=args.width)

    methods = [make(spec, network, workers, local_steps=2) for spec in args.methods]
    repetitions: list[Repetition] = []
    for number in range(-2, 4 * args.repetitions):  # two to warm up
        turn = number % len(methods)
        repetition = repeat(methods[turn:] + methods[:turn])
        if number >= 0:
            repetitions.append(repetition)
        if sum(one["others"] <= args.quiet for one in repetitions) == args.repetitions:
            break
    if rank == 0:
        (Path(folder) / "repetitions.json").write_text(json.dumps(repetitions))
    dist.barrier()
    dist.destroy_process_group()


def repeat(methods: list[Method]) -> Repetition:
    """Synchronize once with each method; every process returns the same result."""
    seconds, cpu_seconds = {}, {}
    own, busy, start = time.process_time(), busy_seconds(), time.perf_counter()
    for method in methods:
        dist.barrier()
        cpu, begin = time.process_time(), time.perf_counter()
        method.synchronize()
        slowest = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        together = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        dist.all_reduce(together)
        seconds[method.name], cpu_seconds[method.name] = float(slowest), float(together)
        cpu, begin = time.process_time(), time.perf_counter()
        method.tidy()
        if method.name == "published":
            tidying = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
            together = torch.tensor(time.process_time() - cpu, dtype=torch.float64)
            dist.all_reduce(tidying, dist.ReduceOp.MAX)
            dist.all_reduce(together)
            seconds[TIDIED] = seconds["published"] + float(tidying)
            cpu_seconds[TIDIED] = cpu_seconds["published"] + float(together)
    took = torch.tensor(time.process_time() - own, dtype=torch.float64)
    dist.all_reduce(took)
    available = (time.perf_counter() - start) * (os.cpu_count() or 1)
    others = torch.tensor((busy_seconds() - busy - float(took)) / available, dtype=torch.float64)
    dist.broadcast(others, 0)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "others": float(others)}


def summary(repetitions: list[Repetition], wanted: int) -> dict[str, object]:
    """Summarize the `wanted` quietest repetitions: median, quartiles, extremes, median ratio to ResIST."""
    kept = sorted(repetitions, key=lambda one: one["others"])[:wanted]
    rows: dict[str, dict[str, float]] = {}
    for name in kept[0]["seconds"]:
        values = [one["seconds"][name] for one in kept]
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        rows[name] = {
            "median_s": median,
            "quartile_low_s": low,
            "quartile_high_s": high,
            "min_s": min(values),
            "max_s": max(values),
            "cpu_s": statistics.median(one["cpu_seconds"][name] for one in kept),
            "times_resist": statistics.median(one["seconds"][name] / one["seconds"][HEADLINE] for one in kept),
        }
    return {
        "n": len(kept),
        "measured": len(repetitions),
        "others_share": {
            "median": round(statistics.median(one["others"] for one in kept), 3),
            "max": round(kept[-1]["others"], 3),
        },
        "methods": {name: {key: round(value, 4) for key, value in row.items()} for name, row in rows.items()},
    }


def table(workers: int, result: dict[str, Any]) -> str:
    others, width = result["others_share"], max(map(len, result["methods"]))
    lines = [
        f"S = {workers}: seconds of one synchronization, n = {result['n']} of {result['measured']} repetitions; "
        f"other programs took {others['median']:.0%} of the processors (at most {others['max']:.0%})",
        f"{'method':{width}} {'median':>8} {'quartiles':>16} {'min':>7} {'max':>7} {'cpu':>7} {'x resist':>9}",
    ]
    for name, row in sorted(result["methods"].items(), key=lambda item: item[1]["median_s"]):
        quartiles = f"{row['quartile_low_s']:.3f} to {row['quartile_high_s']:.3f}"
        lines.append(
            f"{name:{width}} {row['median_s']:8.3f} {quartiles:>16} {row['min_s']:7.3f} {row['max_s']:7.3f} "
            f"{row['cpu_s']:7.3f} {row['times_resist']:9.2f}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
