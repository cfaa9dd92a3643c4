"""Detection on PascalVOC with two workers: whether it learns at all, and how far it comes on a few photographs.

    python benchmarks/detection.py overfit --data-dir DIR    # trained on 16 photographs and tested on the same
    python benchmarks/detection.py train --data-dir DIR      # trained on trainval, tested on test, whatever lies there

`overfit` shows that boxes, labels, folding, scale and evaluation are right: target, AP50 above 60 %. `train` starts
from nothing and is far too short for a good detector; it is reported as it is. Both are the real command, `resist
train`, with a narrow preact_small and photographs of 128 pixels, which two cores can do. `--run RUN` reads a run that
was trained before with the same options, instead of training.

One line of JSON with the run's own provenance is appended to benchmarks/results/detection.jsonl. `section` is what
docs/results.md says of it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from resist.cli.plan import PlanConfig, plan_facts
from resist.planning.schedule import allreduce_bytes
from resist.runs.history import read_history

Record = dict[str, Any]
RESULTS = Path(__file__).parent / "results" / "detection.jsonl"
TARGET = 0.6  # AP50 of `overfit`
PHOTOGRAPHS = 16
COMMON = [
    "--task", "detection", "--data", "voc2007", "--workers", "2", "--min-depth", "0", "--image-size", "128",
    "--sections", "1", "1", "9", "1", "--width", "8", "--local-steps", "20", "--lr", "0.02", "--lr-warmup-steps", "20",
    "--lr-schedule", "cosine", "--weight-decay", "1e-4", "--data-workers", "0",
]  # fmt: skip
SETTINGS = {
    "overfit": ["--epochs", "80", "--batch-size", "2", "--num-evals", "8", "--splits", "sixteen", "sixteen"],
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
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record, indent=1))


def trained(setting: str, data_dir: Path, scratch: Path) -> Path:
    """The directory of a run, trained now."""
    if setting == "overfit":
        data_dir = few(data_dir, scratch / "data")
    command = ["resist", "train", *COMMON, *SETTINGS[setting], "--data-dir", data_dir, "--out", scratch / "run"]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True)
    return scratch / "run"


def few(data_dir: Path, made: Path) -> Path:
    """A data directory with a set of the first photographs of trainval, the files being those of `data_dir`."""
    theirs, ours = (folder.absolute() / "VOCdevkit" / "VOC2007" for folder in (data_dir, made))
    (ours / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("JPEGImages", "Annotations"):
        (ours / name).symlink_to(theirs / name)
    names = (theirs / "ImageSets" / "Main" / "trainval.txt").read_text().splitlines()[:PHOTOGRAPHS]
    (ours / "ImageSets" / "Main" / "sixteen.txt").write_text("\n".join(names) + "\n")
    return made


def summary(run: Path) -> Record:
    """What a run did, and where."""
    history = read_history(run)
    config, rounds = history.config, history.rounds
    facts = plan_facts(PlanConfig(network=config.network, method=config.method, seed=config.run.seed))
    here = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    kinds = sorted({kind for r in rounds for kind in r["bytes"]} - {"evaluate"})
    return {
        "model": config.network.model,
        "sections": config.network.sections,
        "width": config.network.width,
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
        "parameters": facts["parameters"],
        "held_by_worker": facts["held_by_worker"],
        "bytes": {kind: sum(r["bytes"].get(kind, 0) for r in rounds) for kind in kinds},
        "local_sgd_bytes": len(rounds)
        * config.method.workers
        * allreduce_bytes(4 * facts["parameters"], config.method.workers),
        "train_s": round(sum(r["seconds"][kind] for r in rounds for kind in ("compute", "sync", "wait")), 1),
        "date": datetime.fromisoformat(here["started"]).strftime("%Y-%m-%d"),
        "commit": here["commit"],
        "machine": here["processor"],
        "cores": here["cores"],
        "gpu": (here["gpus"] or [None])[0],
        "torch": here["torch"],
        "python": here["python"],
    }


def section(records: list[Record], table: Callable[..., str], provenance: Callable[..., str]) -> str:
    """Of docs/results.md."""
    names = {"overfit": f"{PHOTOGRAPHS} photographs, tested on the same", "train": "trainval, tested on test"}
    names = {r["setting"]: f"{names[r['setting']]}, batch {r['batch_size']}" for r in records}
    scores = list(records[0]["curve"][-1][2])
    rows, curves = [], []
    for r in records:
        name, last = names[r["setting"]], r["curve"][-1][2]
        sent = [sum(r["bytes"].values()), r["local_sgd_bytes"]]
        rows.append([
            name, r["rounds"], r["steps"], f"{r['last_loss']:.3f}", *(f"{100 * last[score]:.2f}" for score in scores),
            f"{max(r['held_by_worker']) / r['parameters']:.0%}", *(f"{num_bytes / 1e6:.1f}" for num_bytes in sent),
        ])  # fmt: skip
        curve = [f"{100 * said[scores[0]]:.1f} % after {at} rounds" for at, _, said in r["curve"]]
        curves.append(f"{name}: {', '.join(curve)}")
    one, verdict = records[0], ""
    for r in records:
        if r["setting"] == "overfit":
            reached = "reached" if r["curve"][-1][2][scores[0]] > TARGET else "**missed**"
            verdict = f" Target of the {PHOTOGRAPHS} photographs: above {TARGET:.0%}: {reached}."
    blocks = " ".join(map(str, one["sections"]))
    setting = (
        f"Faster R-CNN with a feature pyramid over {one['model']}, sections {blocks}, width {one['width']}; "
        f"S = {one['workers']}, l = {one['local_steps']}, photographs of {one['image_size']} pixels, "
        "from fresh weights."
    )
    return "\n\n".join(
        [
            f"## Detection on PascalVOC\n\n{setting} AP50 of the full, scaled network, in percent, by the measures of "
            "VOC 2007 (11 points) and of later years (area). `held` is a worker's share of the weights: neck and heads are "
            "most of so small a network, and they are shared. `sent` is by all workers, momentum included; beside it what "
            f"local SGD sends of weights alone.{verdict}",
            table(["", "rounds", "steps", "last loss", *scores, "held", "sent, MB", "local SGD, MB"], rows),
            f"{scores[0]} on the way: {'; '.join(curves)}.",
            provenance(*records, n=lambda r: f"n = 1 run ({r['setting']})"),
        ]
    )


if __name__ == "__main__":
    main()
