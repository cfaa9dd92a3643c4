"""Measure the ImageNet path without a GPU: photographs in folders, warm-up, resuming, and the input pipeline.

    python benchmarks/imagenet.py --data-dir DIR

DIR holds train/CLASS/* and val/CLASS/*; the recorded figures are of the first 50 classes of Tiny ImageNet (5,000
training and 1,250 test images of 64x64). Setting: S = 2 in two processes, bottleneck network with ImageNet stem,
depths 2,2,9,2, width 8, images cut to 64, batch 32 per worker, 25 local steps, 6 epochs, SGD with lr 0.05 (cosine),
momentum 0.9, weight decay 5e-4, label smoothing 0.1, one reading process for each worker, min_depth 4 of 8 blocks.

Parts (one line of JSON each, with the provenance, in benchmarks/results/imagenet.jsonl):
train    `resist train` without warm-up, and with 2 epochs of local SGD first: loss of each epoch, test accuracy.
resume   the second run again, ended by SIGTERM in the middle and resumed: the greatest difference of a round's loss.
input    images/s read, decoded and augmented with 0, 1 and 2 processes, compared with images/s that the network trains
         on one thread (with a ready batch); then both together: the share of time spent waiting for data.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from provenance import provenance
from resist.data import Photographs, Sampler, load
from resist.models import build

RESULTS = Path(__file__).parent / "results" / "imagenet.jsonl"
NETWORK = {"depths": (2, 2, 9, 2), "width": 8}
SIZE, BATCH, LOCAL_STEPS, WARMUP_EPOCHS = 64, 32, 25, 2.0
CONFIG = {"optimization": {"label_smoothing": 0.1}}
OPTIONS = (
    f"--data folder --model preact_resnet50_imagenet --model-args depths=2,2,9,2 width=8 --image-size {SIZE} "
    f"--data-workers 1 --workers 2 --min-depth 4 --local-steps {LOCAL_STEPS} --epochs 6 --batch-size {BATCH} --lr 0.05 "
    "--lr-schedule cosine --num-evals 2 --checkpoint-rounds 10"
).split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--parts", nargs="+", default=["input", "train", "resume"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if "input" in args.parts:
            keep({"part": "input", **pipeline(args.data_dir)})
        if "train" in args.parts or "resume" in args.parts:
            undisturbed = Path(folder) / "warmup"
            results = train(args.data_dir, undisturbed, WARMUP_EPOCHS)
            if "train" in args.parts:
                keep({"part": "train", "warmup_epochs": WARMUP_EPOCHS, **results})
                keep({"part": "train", "warmup_epochs": 0.0, **train(args.data_dir, Path(folder) / "cold", 0.0)})
            if "resume" in args.parts:
                keep({"part": "resume", **resume(args.data_dir, Path(folder) / "resumed", undisturbed)})


def keep(results: dict[str, object]) -> None:
    record = {"benchmark": "imagenet", **results, **provenance("imagenet")}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print(json.dumps(record), flush=True)


def command(data_dir: Path, out: Path, warmup_epochs: float) -> list[str]:
    images = sum(1 for _ in (data_dir / "train").glob("*/*"))
    rounds = math.ceil(warmup_epochs * images / (BATCH * LOCAL_STEPS))
    config = out.with_suffix(".json")
    config.write_text(json.dumps(CONFIG))
    options = ["--data-dir", str(data_dir), "--out", str(out), *OPTIONS, "--warmup-rounds", str(rounds)]
    return [sys.executable, "-m", "resist", "train", "--config", str(config), *options]


def rounds_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def train(data_dir: Path, out: Path, warmup_epochs: float) -> dict[str, object]:
    subprocess.run(command(data_dir, out, warmup_epochs), check=True)
    rounds = rounds_of(out)
    epochs: dict[int, list[float]] = {}
    for record in rounds:
        epoch = min(int(record["epoch"] - 1e-9), 5)  # the last round may end later
        epochs.setdefault(epoch, []).append(record["loss"])
    scores = rounds[-1]["scores"]
    return {
        "loss_by_epoch": [round(sum(losses) / len(losses), 4) for losses in epochs.values()],
        "accuracy": scores["accuracy"],
        "top5": scores["top5"],
        "rounds": len(rounds),
        "warmup_rounds": json.loads((out / "config.json").read_text())["method"]["warmup_rounds"],
        "gb_sent": round(sum(n for r in rounds for name, n in r["bytes"].items() if name != "evaluate") / 1e9, 4),
    }


def resume(data_dir: Path, out: Path, undisturbed: Path) -> dict[str, object]:
    """End a run by SIGTERM in the middle, resume it, and compare with the uninterrupted run."""
    whole = rounds_of(undisturbed)
    with subprocess.Popen(command(data_dir, out, WARMUP_EPOCHS)) as process:
        while not (out / "metrics.jsonl").exists() or len(rounds_of(out)) < len(whole) // 2:
            time.sleep(1)
            if process.poll() is not None:
                raise SystemExit(f"ended too early, with status {process.returncode}")
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    interrupted = len(rounds_of(out))
    subprocess.run([sys.executable, "-m", "resist", "train", "--resume", str(out)], check=True)
    again = rounds_of(out)
    return {
        "status": status,
        "interrupted_after": interrupted,
        "rounds": len(again),
        "greatest_difference": max(abs(a["loss"] - b["loss"]) for a, b in zip(whole, again, strict=True)),
        "same_accuracy": whole[-1]["scores"] == again[-1]["scores"],
    }


def pipeline(data_dir: Path) -> dict[str, object]:
    rates: dict[str, float] = {}
    for data_workers in (0, 1, 2):
        data, _ = load("folder", data_dir, image_size=SIZE, data_workers=data_workers)
        assert isinstance(data, Photographs)
        loader = data.loader(Sampler(len(data), batch_size=BATCH, seed=0, worker=0, workers=1))
        for step in range(5):
            loader.batch(step)
        start, steps = time.perf_counter(), 60
        for step in range(5, 5 + steps):
            loader.batch(step)
        rates[str(data_workers)] = round(steps * BATCH / (time.perf_counter() - start), 1)
        loader.stream.close()
    model = build("preact_resnet50_imagenet", num_classes=50, **NETWORK)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def trained(batches: object, steps: int) -> float:
        start = time.perf_counter()
        for step in range(steps):
            images, labels = batches(step) if callable(batches) else batches
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return steps * BATCH / (time.perf_counter() - start)

    data, _ = load("folder", data_dir, image_size=SIZE, data_workers=1)
    loader = data.loader(Sampler(len(data), batch_size=BATCH, seed=0, worker=0, workers=1))
    ready = loader.batch(0)
    trained(ready, 3)
    alone = trained(ready, 40)
    loader.stream.wait_s, start = 0.0, time.perf_counter()
    together = trained(lambda step: loader.batch(step + 1), 40)
    waited = loader.stream.wait_s / (time.perf_counter() - start)
    return {
        "read_images_s": rates,
        "trained_images_s": round(alone, 1),
        "both_images_s": round(together, 1),
        "waited_share": round(waited, 4),
        "load": round(os.getloadavg()[0], 1),
    }


if __name__ == "__main__":
    main()
