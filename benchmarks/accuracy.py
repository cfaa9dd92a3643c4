"""Accuracy on CIFAR-10 and on photographs in folders, for docs/results.md. Used by tables.py."""

from dataclasses import asdict

from accuracy_figure import points_of
from cifar10_rows import BASE, LOCAL_STEPS, SETTINGS, WORKERS
from page_parts import Record, fill, provenance, table
from paired import summary
from sizes import FIGURE_OF as SIZES_OF
from sizes import size_table

DATA = {"cifar10": "CIFAR-10", "tiny-imagenet-mini": "50 classes of Tiny ImageNet"}
FIGURE_OF = "long"  # the setting of docs/accuracy.svg
PLAIN = "recalibrate, not augmented"
WAYS = {"batch": "batch", "recalibrate": "re-estimated", PLAIN: "re-estimated, plain", "average": "averaged"}
SCALES = {"inclusion": "scaled", "1.0": "no scale"}


def compared(runs: list[Record]) -> str:
    """Write the section on the differences between methods, paired by seed."""
    by_setting: dict[str, list[Record]] = {}
    for run in runs:
        by_setting.setdefault(run["setting"], []).append(run)
    tables = []
    for name, some in by_setting.items():
        known = next((run["settings"] for run in some if "settings" in run), None)  # lines from before have none
        setting = {"data": "cifar10"} | (known or asdict(SETTINGS[name]))
        heading = fill("paired-setting", **setting | {"data": DATA.get(setting["data"], setting["data"])})
        figure = fill("paired-figure") if name == FIGURE_OF and points_of(some) else ""
        sizes = size_table(some) if name == SIZES_OF else ""
        by_size = fill("paired-sizes", table=sizes) if sizes else ""
        tables.append("\n\n".join(filter(None, (heading, figure, summary(some, BASE), by_size))))
    return fill(
        "paired", tables="\n\n".join(tables), workers=WORKERS, local_steps=LOCAL_STEPS, base=BASE,
        provenance=provenance(*runs, n="n-paired"),
    )  # fmt: skip


def curves(runs: list[Record]) -> str:
    """Write the section on the accuracy of the runs on CIFAR-10."""
    marks = sorted({mark for run in runs for mark in run["percent_of_5000"]}, key=int)
    cells = []
    for run in runs:
        way = PLAIN if plain_only(run) else "recalibrate"
        ends = [percent(run, way, num=5000), percent(run, way), percent(run, "average")]
        curve = [show(run["percent_of_5000"].get(mark)) for mark in marks]
        images = "plain" if plain_only(run) else "augmented"
        cells.append([run_name(run), images, *curve, *map(show, ends), f"{run['train_cpu_s']:.0f}"])
    head = ["", "re-estimated on", *(f"{mark} rounds" for mark in marks), "end, 5,000", "end, 10,000",
            "end, averaged, 10,000", "processor s"]  # fmt: skip
    return fill(
        "accuracy",
        table=table(head, cells),
        equal_rounds="\n\n".join(equal_rounds(runs)),
        provenance=provenance(*runs, n="n-accuracy"),
    )


def equal_rounds(runs: list[Record]) -> list[str]:
    """Compare the most accurate runs of ResIST and local SGD after equal rounds (averaged statistics)."""
    groups: dict[tuple[object, ...], dict[str, Record]] = {}
    for run in runs:
        value = percent(run, "average")
        best = groups.setdefault(tuple(run[key] for key in ("workers", "local_steps", "rounds")), {})
        known = best.get(run["strategy"])
        if value is not None and (known is None or value > (percent(known, "average") or 0.0)):
            best[run["strategy"]] = run
    lines = []
    for best in groups.values():
        if len(best) == 2:
            ours, local = best["resist"], best["local_sgd"]
            points = (percent(ours, "average") or 0.0) - (percent(local, "average") or 0.0)
            lines.append(fill("accuracy-equal-rounds", rounds=ours["rounds"], resist=run_name(ours), points=abs(points),
                              order="ahead of" if points > 0 else "behind", local_sgd=run_name(local),
                              share=ours["train_cpu_s"] / local["train_cpu_s"]))  # fmt: skip
    return lines


def readings(runs: list[Record]) -> str:
    """Write the section on the sources of BatchNorm's statistics and on the scale."""
    columns = [
        (way, scale) for scale in SCALES for way in WAYS if any(percent(r, way, scale) is not None for r in runs)
    ]
    cells = [[run_name(run), *(show(percent(run, *column)) for column in columns)] for run in runs]
    better = 0
    for run in runs:
        reestimated = [value for way in ("recalibrate", PLAIN) if (value := percent(run, way)) is not None]
        averaged = percent(run, "average")
        better += averaged is not None and bool(reestimated) and averaged > max(reestimated)
    return fill(
        "readings",
        table=table(["", *(f"{WAYS[way]}, {SCALES[scale]}" for way, scale in columns)], cells),
        better=better,
        runs=len(runs),
        provenance=provenance(*runs, n="n-accuracy"),
    )


def run_name(run: Record) -> str:
    ends = {"local_sgd_first": "first", "local_sgd_last": "last"}
    more = [f"{run[key]} rounds of local SGD {end}" for key, end in ends.items() if run.get(key)]
    more += [f"min_depth {run['min_depth']}"] if run.get("min_depth") is not None else []
    more += [f"chain's rate x {run['chain_lr']:g}"] if run.get("chain_lr", 1.0) != 1.0 else []
    more += [f"S = {run['workers']}", f"l = {run['local_steps']}", f"{run['rounds']} rounds", f"seed {run['seed']}"]
    return ", ".join([{"resist": "ResIST", "local_sgd": "local SGD"}[run["strategy"]], run["optimizer_state"], *more])


def plain_only(run: Record) -> bool:
    """Return whether a run has statistics of plain images only, under the name "recalibrate".

    The first runs do. Later runs have both, under different names.
    """
    return not any(way.startswith(PLAIN) for way in run["readings"])


def percent(run: Record, way: str, scale: str = "inclusion", num: int = 10000) -> float | None:
    """Return the accuracy for a source of BatchNorm statistics; None if it was not measured."""
    if plain_only(run) and way in ("recalibrate", PLAIN):
        way = "" if way == "recalibrate" else "recalibrate"
    return run["readings"].get(f"{way}, scale {scale}", {}).get(f"of_{num}")


def show(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def photographs(records: list[Record]) -> str:
    """Write the section on the ImageNet path at a small scale."""
    runs = [r for r in records if r["part"] == "train"]
    parts = [_trained(runs)] if runs else []
    for r in records:
        if r["part"] == "resume":
            accuracy = "is the same" if r["same_accuracy"] else "**differs**"
            parts.append(fill("photographs-resume", **r, accuracy=accuracy))
        if r["part"] == "input":
            read = r["read_images_s"]
            rates = ", ".join(f"{read[num]:.0f} with {num}" for num in read)
            times_trained = read["1"] / r["trained_images_s"]
            parts.append(fill("photographs-input", **r, rates=rates, times_trained=times_trained))
    return fill("photographs", parts="\n\n".join(parts), provenance=provenance(*records, n="n-photographs"))


def _trained(runs: list[Record]) -> str:
    epochs = min(len(r["loss_by_epoch"]) for r in runs)
    epochs -= epochs > 6  # beyond the sixth epoch there is only the rest of the last round
    cells = [
        [fill("photographs-run", **r), *(f"{loss:.3f}" for loss in r["loss_by_epoch"][:epochs]),
         show(100 * r["accuracy"]), show(100 * r["top5"]), f"{r['gb_sent']:.3f}"]
        for r in runs
    ]  # fmt: skip
    head = ["local SGD first", *(f"loss, epoch {e + 1}" for e in range(epochs)), "top 1, %", "top 5, %", "GB sent"]
    return fill("photographs-train", table=table(head, cells))
