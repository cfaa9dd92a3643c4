"""What asynchronous checkpoints cost: rounds with one every K rounds against rounds without, alternated in one run.

    python benchmarks/checkpoints.py --repetitions 8

One job trains the network of `benchmarks/cifar10.py` (sections 3,4,23,3 at a small width, S = 4) on random images, in
one process that hosts all workers, one thread for training; spans of K rounds take turns, with a checkpoint begun in
their first round and without. A span with a checkpoint ends when it is complete, so that nothing is left out. Where
the processor has no core to spare, the thread in the background takes its time from training, and that is measured.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from provenance import provenance
from resist.job import Job
from resist.models import build
from resist.planning.strategy import resist
from resist.runs.checkpoint import Checkpoints

HERE = Path(__file__).parent
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preact_resnet101")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--local-steps", type=int, default=25)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--checkpoint-rounds", type=int, default=10)
    parser.add_argument("--repetitions", type=int, default=8, help="pairs of spans; saves alone")
    parser.add_argument("--folder", type=Path, help="where to write checkpoints; default: a temporary folder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        record = {"benchmark": "checkpoints", **measure(options, folder), **origin}
    finally:
        shutil.rmtree(folder)
    record |= {key: value for key, value in vars(options).items() if key != "folder"}
    with (HERE / "results" / "checkpoints.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    job = Job(
        lambda: build(options.model, num_classes=CLASSES, width=options.width, final_norm=True),
        resist(options.workers, options.local_steps, min_depth=0), batchnorm="average",
    )  # fmt: skip
    optimizers = tuple(torch.optim.SGD(worker.model.parameters(), lr=0.01, momentum=0.9) for worker in job.workers)
    checkpoints = Checkpoints(folder, job.transport)
    images = torch.randn(options.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(CLASSES, (options.batch_size,), generator=torch.Generator().manual_seed(1))

    def round_s() -> float:
        begin = time.perf_counter()
        while True:
            for worker, optimizer in zip(job.workers, optimizers, strict=True):
                step(worker.model, optimizer, images, labels)
            if job.step(*optimizers):
                return time.perf_counter() - begin

    def span(*, saves: bool) -> dict[str, float]:
        """One span: seconds in all, of which the training loop stood still, and processor seconds."""
        cpu, begin, stood = time.process_time(), time.perf_counter(), 0.0
        rounds = []
        for number in range(options.checkpoint_rounds):
            if saves and number == 0:
                at = time.perf_counter()
                checkpoints.begin(job, optimizers, {})
                stood = time.perf_counter() - at
            rounds.append(round_s())
        at = time.perf_counter()
        checkpoints.finish()
        return {
            "s": time.perf_counter() - begin, "stood_s": stood, "waited_s": time.perf_counter() - at,
            "cpu_s": time.process_time() - cpu, "round_s": statistics.median(rounds),
        }  # fmt: skip

    def alone() -> dict[str, float]:
        """A checkpoint without training at the same time."""
        cpu, begin = time.process_time(), time.perf_counter()
        checkpoints.begin(job, optimizers, {})
        checkpoints.finish()
        return {"s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}

    span(saves=True)  # warm
    saves = [alone() for _ in range(options.repetitions)]
    pairs = []
    for number in range(options.repetitions):
        order = (True, False) if number % 2 else (False, True)
        busy, begin = others_s(), time.perf_counter()
        found = {saves: span(saves=saves) for saves in order}
        passed = time.perf_counter() - begin
        own = sum(one["cpu_s"] for one in found.values())
        others = (others_s() - busy - own) / (passed * (os.cpu_count() or 1))
        pairs.append({"with": found[True], "without": found[False], "others": round(others, 3)})
        print(json.dumps({key: pairs[-1][key]["s"] for key in ("with", "without")} | {"others": others}), flush=True)
    wall = [100 * (pair["with"]["s"] / pair["without"]["s"] - 1) for pair in pairs]
    cpu = [100 * (pair["with"]["cpu_s"] / pair["without"]["cpu_s"] - 1) for pair in pairs]
    last = max(folder.iterdir())
    return {
        "n": len(pairs),
        "percent_wall": summary(wall),
        "percent_cpu": summary(cpu),
        "save_s": summary([one["s"] for one in saves]),
        "save_cpu_s": summary([one["cpu_s"] for one in saves]),
        "round_cpu_s": summary([pair["without"]["cpu_s"] / options.checkpoint_rounds for pair in pairs]),
        "stood_s": summary([pair["with"]["stood_s"] for pair in pairs]),
        "round_s": summary([pair["without"]["round_s"] for pair in pairs]),
        "others_share": summary([pair["others"] for pair in pairs]),
        "checkpoint_bytes": sum(file.stat().st_size for file in last.iterdir()),
        "parameters": sum(parameter.numel() for parameter in job.full_model().parameters()),  # type: ignore[union-attr]
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def summary(values: list[float]) -> dict[str, float]:
    """Median, least and most."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def others_s() -> float:
    """Seconds that all processors together have worked so far; 0 where the system does not count them."""
    try:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
