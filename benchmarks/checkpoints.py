"""Measure the cost of asynchronous checkpoints: rounds with one every K rounds, and without, alternated in one run.

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

from provenance import busy_seconds, provenance
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
    origin = provenance("checkpoints")
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        record = {"benchmark": "checkpoints", **measure(options, folder), **origin}
    finally:
        shutil.rmtree(folder)
    record |= {key: value for key, value in vars(options).items() if key != "folder"}
    with (HERE / "results" / "checkpoints.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


class Training:
    """A job that trains on one batch of random images, and its checkpoints.

    Args:
        options: The options of the command line.
        folder: Where checkpoints are written.
    """

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.rounds = options.checkpoint_rounds
        self.job = Job(
            lambda: build(options.model, num_classes=CLASSES, width=options.width, final_norm=True),
            resist(options.workers, options.local_steps, min_depth=0),
            batchnorm="average",
        )
        self.optimizers = tuple(
            torch.optim.SGD(worker.model.parameters(), lr=0.01, momentum=0.9) for worker in self.job.workers
        )
        self.checkpoints = Checkpoints(folder, self.job.transport)
        self.images = torch.randn(options.batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.labels = torch.randint(CLASSES, (options.batch_size,), generator=torch.Generator().manual_seed(1))

    def round_s(self) -> float:
        """Train for a round. Returns its seconds."""
        begin = time.perf_counter()
        while True:
            for worker, optimizer in zip(self.job.workers, self.optimizers, strict=True):
                step(worker.model, optimizer, self.images, self.labels)
            if self.job.step(*self.optimizers):
                return time.perf_counter() - begin

    def span(self, *, saves: bool) -> dict[str, float]:
        """Train for `checkpoint_rounds` rounds, with or without a checkpoint begun before the first.

        Returns:
            Seconds, of which training waited while the state was copied (`stood_s`) and for the end of the checkpoint
            (`waited_s`); processor seconds; the median of the rounds.
        """
        cpu, begin, stood = time.process_time(), time.perf_counter(), 0.0
        if saves:
            self.checkpoints.begin(self.job, self.optimizers, {})
            stood = time.perf_counter() - begin
        rounds = [self.round_s() for _ in range(self.rounds)]
        at = time.perf_counter()
        self.checkpoints.finish()
        return {
            "s": time.perf_counter() - begin, "stood_s": stood, "waited_s": time.perf_counter() - at,
            "cpu_s": time.process_time() - cpu, "round_s": statistics.median(rounds),
        }  # fmt: skip

    def alone(self) -> dict[str, float]:
        """Write a checkpoint without training at the same time. Returns its seconds and processor seconds."""
        cpu, begin = time.process_time(), time.perf_counter()
        self.checkpoints.begin(self.job, self.optimizers, {})
        self.checkpoints.finish()
        return {"s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure checkpoints alone, then pairs of spans, and summarize them."""
    training = Training(options, folder)
    training.span(saves=True)  # warm
    saves = [training.alone() for _ in range(options.repetitions)]
    pairs = [pair(training, number) for number in range(options.repetitions)]
    last = max(folder.iterdir())
    return {
        "n": len(pairs),
        "percent_wall": summary([100 * (pair["with"]["s"] / pair["without"]["s"] - 1) for pair in pairs]),
        "percent_cpu": summary([100 * (pair["with"]["cpu_s"] / pair["without"]["cpu_s"] - 1) for pair in pairs]),
        "save_s": summary([save["s"] for save in saves]),
        "save_cpu_s": summary([save["cpu_s"] for save in saves]),
        "round_cpu_s": summary([pair["without"]["cpu_s"] / options.checkpoint_rounds for pair in pairs]),
        "stood_s": summary([pair["with"]["stood_s"] for pair in pairs]),
        "round_s": summary([pair["without"]["round_s"] for pair in pairs]),
        "others_share": summary([pair["others"] for pair in pairs]),
        "checkpoint_bytes": sum(file.stat().st_size for file in last.iterdir()),
        "parameters": sum(parameter.numel() for parameter in training.job.full_model().parameters()),  # type: ignore[union-attr]
    }


def pair(training: Training, number: int) -> dict[str, Any]:
    """Measure a span with a checkpoint and one without; every second pair begins with the former."""
    order = (True, False) if number % 2 else (False, True)
    busy, begin = busy_seconds(), time.perf_counter()
    spans = {saves: training.span(saves=saves) for saves in order}
    passed = time.perf_counter() - begin
    cpu = sum(span["cpu_s"] for span in spans.values())
    others = round((busy_seconds() - busy - cpu) / (passed * (os.cpu_count() or 1)), 3)
    print(json.dumps({"with": spans[True]["s"], "without": spans[False]["s"], "others": others}), flush=True)
    return {"with": spans[True], "without": spans[False], "others": others}


def step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    optimizer.step()


def summary(values: list[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    values_of = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 4) for name, value in values_of.items()}


if __name__ == "__main__":
    main()
