"""Measure the cost of recording and displaying a run, compared with training: processor seconds per round.

    python benchmarks/recording.py

A short run gives the processor seconds of a small round (handwritten digits, four workers in one process) and real
records. These are recorded again, `--rounds` times, with each logger; its threads and child processes are counted. The
display is also drawn between records; this is measured per second.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from rich.console import Console

from provenance import provenance
from resist.runs.config import MachineConfig, MethodConfig, OptimizationConfig, RunConfig, TrainConfig
from resist.runs.directory import Run, title_of
from resist.training.loggers import open_loggers
from resist.training.progress import Display
from resist.training.recorder import Recorder
from resist.training.train import train

RESULTS = Path(__file__).parent / "results" / "recording.jsonl"
WAYS = {"metrics.jsonl": (), "display": (), "tensorboard": ("tensorboard",), "wandb": ("wandb",)}  # name: loggers
LOCAL_STEPS = 10
SHORT, LONG = 2, 8  # rounds of the two runs whose difference is the cost of a round
DRAWING_S = 10.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--no-record", action="store_true", help="do not append to the results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    with tempfile.TemporaryDirectory() as folder:
        round_s, records = small_round(Path(folder))
        ways = {}
        for way in WAYS:
            costs = [per_round(Path(folder) / f"{way}-{i}", way, records, args.rounds) for i in range(args.repetitions)]
            ways[way] = {"cpu_s": median(costs), "all": costs, "percent": 100 * median(costs) / round_s}
        drawing = [drawing_per_second(records) for _ in range(args.repetitions)]
    result = {
        "benchmark": "recording", "rounds": args.rounds, "repetitions": args.repetitions, "round_cpu_s": round_s,
        "workers": 4, "local_steps": LOCAL_STEPS, "batch_size": 32, "ways": ways,
        "drawing": {"percent": 100 * median(drawing), "all": [100 * one for one in drawing]}, **provenance("recording"),
    }  # fmt: skip
    print(f"a round: {round_s:.2f} processor seconds")
    for way, cost in ways.items():
        print(f"{way:14} {1e3 * cost['cpu_s']:8.3f} ms  {cost['percent']:.3f} % of the round")
    print(f"{'drawing':14} {result['drawing']['percent']:.3f} % of a core")
    if not args.no_record:
        with RESULTS.open("a") as file:
            file.write(json.dumps(result) + "\n")


def small_round(folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Return the processor seconds of a round without recording, and the records of a run."""
    config = TrainConfig(
        method=MethodConfig(workers=4, local_steps=LOCAL_STEPS),
        optimization=OptimizationConfig(batch_size=32, lr=0.05),
        machine=MachineConfig(device="cpu", processes=1),
    )
    spent: list[float] = []
    for rounds in (SHORT, LONG):
        out, until = folder / f"run-{rounds}", (f"rounds={rounds}",)
        run = RunConfig(out=out, num_evals=1, checkpoint_rounds=1000, until=until)
        start = time.process_time()
        assert train(replace(config, run=run)) == 0
        spent.append(time.process_time() - start)
    lines = (folder / f"run-{LONG}" / "metrics.jsonl").read_text().splitlines()
    return (spent[1] - spent[0]) / (LONG - SHORT), [json.loads(line) for line in lines]


def per_round(path: Path, way: str, records: list[dict[str, Any]], rounds: int) -> float:
    """Return the processor seconds to record a round in one way, with metrics.jsonl, which is always written."""
    config = TrainConfig(machine=MachineConfig(no_progress=True, log=WAYS[way]))
    run = Run(path, config)
    loggers = open_loggers(config, path, [])
    with Recorder(config, rounds, run, loggers) as recorder:
        mute = Display("", recorder.summary, console=silent(False))
        recorder.display = display(recorder) if way == "display" else mute
        recorder.round(records[0] | {"round": 1, "step": 50})
        start = spent()
        for number in range(2, rounds + 2):
            recorder.round(records[number % len(records)] | {"round": number, "step": 50 * number})
    return (spent() - start) / rounds


def drawing_per_second(records: list[dict[str, Any]]) -> float:
    """Return the processor seconds of the live display per second, while nothing happens."""
    config = TrainConfig()
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(config, 100, Run(Path(folder) / "run", config), [])
        shown = display(recorder)
        shown.add(records[0])
        with shown:
            start = time.process_time()
            time.sleep(DRAWING_S)
            return (time.process_time() - start) / DRAWING_S


def display(recorder: Recorder) -> Display:
    return Display(title_of(TrainConfig()), recorder.summary, console=silent(True))


def silent(terminal: bool) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=160, height=40)


def spent() -> float:
    """Return the processor seconds of this process and of its present and past children."""
    this = psutil.Process()
    count: Callable[[psutil.Process], float] = lambda p: p.cpu_times().user + p.cpu_times().system  # noqa: E731
    ended = this.cpu_times().children_user + this.cpu_times().children_system
    return time.process_time() + ended + sum(count(child) for child in this.children(recursive=True))


if __name__ == "__main__":
    main()
