"""Measure detection on PascalVOC with two workers: learning 16 photographs, and training on trainval.

    python benchmarks/detection.py overfit --data-dir DIR    # train on 16 photographs and test on the same
    python benchmarks/detection.py train --data-dir DIR      # train on trainval, test on test, with the files in DIR

`overfit` shows that boxes, labels, averaging, scale and evaluation are correct: target, AP50 above 60 %. `train` starts
from fresh weights and is far too short for a good detector. Both run `resist train` with a narrow preact_small and
photographs of 128 pixels, which two cores can train. `--run RUN` reads an existing run with the same options, instead
of training.

One line of JSON with the run's provenance is appended to benchmarks/results/detection.jsonl. `section` writes the
section of docs/results.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from page_parts import Record, fill, provenance, reached, table
from resist.cli.plan import PlanConfig, describe_plan
from resist.models import read_model_args
from resist.planning.schedule import allreduce_bytes
from resist.runs.history import read_history
from sources import SOURCES, hashes

RESULTS = Path(__file__).parent / "results" / "detection.jsonl"
TARGET = 0.6  # AP50 of `overfit`
PHOTOGRAPHS = 16
COMMON = [
    "--data", "voc2007", "--workers", "2", "--min-depth", "0", "--image-size", "128",
    "--model-args", "depths=1,1,9,1", "width=8", "--local-steps", "20", "--lr", "0.02", "--lr-warmup-steps", "20",
    "--lr-schedule", "cosine", "--weight-decay", "1e-4", "--data-workers", "0",
]  # fmt: skip
SETTINGS = {
    "overfit": ["--epochs", "80", "--batch-size", "2", "--num-evals", "8"],
    "train": ["--epochs", "15", "--batch-size", "2", "--num-evals", "5"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--run", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = args.run or trained(args.setting, args.data_dir, Path(scratch))
        record = {"benchmark": "detection", "setting": args.setting, **summary(run)}
        if args.run is None:  # by the code that is here
            record["sources"] = hashes(SOURCES["detection"])
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


def trained(setting: str, data_dir: Path, scratch: Path) -> Path:
    """Train a run and return its directory."""
    command = ["resist", "train", *COMMON, *SETTINGS[setting], "--out", scratch / "run"]
    if setting == "overfit":
        data_dir = few(data_dir, scratch / "data")
        config = scratch / "config.json"
        config.write_text(json.dumps({"network": {"splits": ["sixteen", "sixteen"]}}))
        command += ["--config", config]
    command += ["--data-dir", data_dir]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)
    return scratch / "run"


def few(data_dir: Path, made: Path) -> Path:
    """Make a data directory `made` with the first photographs of trainval, linked to `data_dir`."""
    source, target = (folder.absolute() / "VOCdevkit" / "VOC2007" for folder in (data_dir, made))
    (target / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (target / name).symlink_to(source / name)
    names = (source / "ImageSets" / "Main" / "trainval.txt").read_text().splitlines()[:PHOTOGRAPHS]
    (target / "ImageSets" / "Main" / "sixteen.txt").write_text("\n".join(names) + "\n")
    return made


def summary(run: Path) -> Record:
    """Summarize a run: options, scores, bytes, seconds and provenance."""
    history = read_history(run)
    config, rounds = history.config, history.rounds
    plan = describe_plan(PlanConfig(network=config.network, method=config.method, seed=config.run.seed))
    shape = read_model_args(config.network.model, config.network.model_args)
    here = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    traffic_kinds = sorted({traffic_kind for r in rounds for traffic_kind in r["bytes"]} - {"evaluate"})
    return {
        "model": config.network.model,
        "sections": shape["depths"],
        "width": shape["width"],
        "image_size": config.network.image_size,
        "workers": config.method.workers,
        "local_steps": config.method.local_steps,
        "batch_size": config.optimization.batch_size,
        "epochs": config.optimization.epochs,
        "rounds": len(rounds),
        "steps": rounds[-1]["step"],
        "images": sum(r["images"] for r in rounds),
        "seed": config.run.seed,
        "curve": [[r["round"], r["loss"], r["scores"]] for r in rounds if r["accuracy"] is not None],
        "last_loss": rounds[-1]["loss"],
        "parameters": plan["parameters"],
        "held_by_worker": plan["held_by_worker"],
        "bytes": {name: sum(r["bytes"].get(name, 0) for r in rounds) for name in traffic_kinds},
        "local_sgd_bytes": len(rounds)
        * config.method.workers
        * allreduce_bytes(4 * plan["parameters"], config.method.workers),
        "train_s": round(sum(r["seconds"][part] for r in rounds for part in ("compute", "sync", "wait")), 1),
        "date": datetime.fromisoformat(here["started"]).strftime("%Y-%m-%d"),
        "commit": here["commit"],
        "machine": here["processor"],
        "cores": here["cores"],
        "gpu": (here["gpus"] or [None])[0],
        "torch": here["torch"],
        "python": here["python"],
    }


def section(records: list[Record]) -> str:
    """Write the section of docs/results.md."""
    first, target = records[0], ""
    scores = list(first["curve"][-1][2])
    cells, curves = [], []
    for r in records:
        name, last = fill(f"detection-{r['setting']}", **r, photographs=PHOTOGRAPHS), r["curve"][-1][2]
        sent = [sum(r["bytes"].values()), r["local_sgd_bytes"]]
        cells.append([
            name, r["rounds"], r["steps"], f"{r['last_loss']:.3f}", *(f"{100 * last[score]:.2f}" for score in scores),
            f"{max(r['held_by_worker']) / r['parameters']:.0%}", *(f"{num_bytes / 1e6:.1f}" for num_bytes in sent),
        ])  # fmt: skip
        curve = [fill("detection-curve", percent=100 * values[scores[0]], rounds=at) for at, _, values in r["curve"]]
        curves.append(f"{name}: {', '.join(curve)}")
        if r["setting"] == "overfit":
            verdict = reached(last[scores[0]] > TARGET)
            target = fill("detection-target", photographs=PHOTOGRAPHS, target=TARGET, reached=verdict)
    head = ["", "rounds", "steps", "last loss", *scores, "held", "sent, MB", "local SGD, MB"]
    depths = " ".join(map(str, first["sections"]))
    values = first | {"depths": depths, "target": target, "table": table(head, cells), "score": scores[0]}
    return fill("detection", **values, curves="; ".join(curves), provenance=provenance(*records, n="n-detection"))


if __name__ == "__main__":
    main()
