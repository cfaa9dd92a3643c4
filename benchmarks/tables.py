"""Rebuild docs/results.md: the paper's tables next to ours, and every other figure, with provenance.

    python benchmarks/tables.py            # reads benchmarks/results/, writes docs/results.md and its drawings
    python benchmarks/tables.py --check    # write nothing; exit status 1 if one of them is out of date
    python benchmarks/tables.py --changed  # write nothing; list the figures of code that has changed since

Figures stay when the code moves on, and the page marks them, by the hashes in their lines (sources.py). The marks are
those of the day when the page was written: `--check` does not compare them, and `--changed` has those of today.

The text is in benchmarks/pages/results.md. The latest line of each benchmark and setting is used. Figures that follow
from formulas, and the byte counts of a job that trains nothing, are computed here. No verdict is written by hand: it is
computed from the figures.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch

import detection
import elastic_page
import reliability
from accuracy import FIGURE_OF, compared, curves, photographs, readings
from accuracy_figure import figure, points_of
from format_tables import formats
from page_parts import Record, fill, mark, provenance, reached, rows, signed, spread, without_marks
from paper_tables import NAMES, ROUNDS, builder, formula, round_times, short, strategy_of, traffic
from predictions import predictions
from sizes import FIGURE_OF as SIZES_OF
from sizes import size_figure

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
MAX_RECORDING = 1.0  # percent of a round
MAX_WIRED = 25.0  # percent of memory that a wire format may add
TIMES_PUBLISHED = 3.6
FLAT_SHARE = 0.85  # of what the bytes allow against `flat`
PAPERS = {"model": "preact_resnet101", "width": 64, "num_classes": 100}  # the network of the paper's tables
RUN_SETTINGS = ("strategy", "optimizer_state", "workers", "rounds", "local_steps", "min_depth", "chain_lr",
            "local_sgd_first", "local_sgd_last", "seed")  # fmt: skip
# The file of each benchmark, and what makes two of its lines different measurements: of equal ones the last counts.
SETTINGS: dict[str, tuple[str, ...]] = {
    "wire": ("rate", "workers", "model", "sections", "width", "num_classes", "local_steps", "compute_s"),
    "formats": (
        "rate",
        "workers",
        "model",
        "sections",
        "width",
        "num_classes",
        "local_steps",
        "full_step_s",
        "methods",
    ),
    "memory": ("model", "width", "num_classes", "workers", "device"),
    "elastic": ("members", "local_steps", "step_s", "seconds", "every", "bound_s", "wire", "fragments", "seed"),
    "elastic_accuracy": ("epochs", "every", "seed"),
    "exchange": ("model", "width", "num_classes"),
    "recording": ("benchmark",),
    "faults": ("timeout_s", "forked"),
    "checkpoints": ("model", "width", "workers", "local_steps", "batch_size"),
    "accuracy": ("setting", "row", "seed"),
    "cifar10": RUN_SETTINGS,
    "imagenet": ("part", "warmup_epochs"),
    "detection": ("setting", "model", "workers", "image_size", "seed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--changed", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.changed:
        print(of_other_code(selected(HERE / "results")))
        return
    files = {PAGE: page(HERE / "results")}
    files |= {PAGE.with_name(name): text for name, text in pictures(HERE / "results").items()}
    if args.check:
        written = {file: file.read_text(encoding="utf-8") if file.exists() else "" for file in files}
        old = [file.name for file, text in files.items() if without_marks(written[file]) != without_marks(text)]
        sys.exit(f"out of date in docs: {', '.join(old)}" if old else 0)
    for file, text in files.items():
        if text:
            file.write_text(text, encoding="utf-8")
            print(f"wrote {file}")


def pictures(results: Path) -> dict[str, str]:
    """Return the drawings of docs/ by name, from the files in `results`; empty where too few rows have runs."""
    runs = selected(results)["accuracy"]
    costs, sizes = ([run for run in runs if run["setting"] == name] for name in (FIGURE_OF, SIZES_OF))
    return {"accuracy.svg": figure(costs) if points_of(costs) else "", "sizes.svg": size_figure(sizes)}


def page(results: Path, network: Record = PAPERS) -> str:
    """Return the whole page, from the files in `results`; a benchmark without a file is omitted.

    Args:
        results: The folder of the result files.
        network: The network of Table 1: `model`, `width` and `num_classes`.
    """
    known = selected(results)
    wire, memory, runs = known["wire"], known["memory"], known["cifar10"]
    faults, saves = known["faults"], known["checkpoints"]
    same_network = [r for r in wire if all(r[k] == v for k, v in network.items()) and not r["sections"]]
    parts = [
        fill("head"),
        traffic(network, same_network),
        round_times(wire) if wire else "",
        formats(known["formats"]) if known["formats"] else "",
        predictions(wire, memory) if wire or memory else "",
        *map(exchange, known["exchange"]),
        *map(memory_table, memory),
        *map(recording, known["recording"]),
        elastic_page.section(known["elastic"]) if known["elastic"] else "",
        elastic_page.accuracy(known["elastic_accuracy"]) if known["elastic_accuracy"] else "",
        reliability.section(faults, saves) if faults or saves else "",
        compared(known["accuracy"]) if known["accuracy"] else "",
        *((curves(runs), readings(runs)) if runs else ()),
        photographs(known["imagenet"]) if known["imagenet"] else "",
        detection.section(known["detection"]) if known["detection"] else "",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def selected(results: Path) -> dict[str, list[Record]]:
    """Return the records that the page shows, by benchmark."""
    return {name: latest(results / f"{name}.jsonl", *keys) for name, keys in SETTINGS.items()}


def of_other_code(known: Mapping[str, list[Record]]) -> str:
    """List the measurements whose source files have changed since."""
    lines: Counter[str] = Counter()
    for name, records in known.items():
        for record in records:
            if text := mark(record):
                lines[
                    f"{name}, {record['date']}, commit {record['commit']}.{text.replace('*', '').replace('`', '')}"
                ] += 1
    total, number = sum(map(len, known.values())), sum(lines.values())
    listed = [f"{line} ({n} lines)" if n > 1 else line for line, n in lines.items()]
    return "\n".join([*listed, f"{number} of {total} measurements on docs/results.md are of other code than this"])


def latest(file: Path, *keys: str) -> list[Record]:
    """Return the last line of each combination of `keys`, in the order of their first lines."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({tuple(str(line.get(key)) for key in keys): line for line in lines}.values())


def exchange(record: Record) -> str:
    """Write the section on one synchronization over loopback."""
    parts, counts = [], []
    for workers, result in record["results"].items():
        methods = result["methods"]
        cells = [[short(name), f"{m['median_s']:.3f}", f"{m['quartile_low_s']:.3f} to {m['quartile_high_s']:.3f}",
                  f"{m['times_resist']:.2f}"] for name, m in methods.items()]  # fmt: skip
        local_sgd, ours = (
            formula(builder(record), strategy_of(name, int(workers), "reset"), ROUNDS).mean.total_bytes
            for name in ("local_sgd", "resist")
        )
        allowed, verdicts = local_sgd / ours, []
        for name, target in (("published", TIMES_PUBLISHED), ("flat", FLAT_SHARE * allowed)):
            if name in methods:
                times = methods[name]["times_resist"]
                slower = fill("exchange-slower") if times < 1 else ""
                verdicts.append(fill("exchange-verdict", name=name, times=times, slower=slower, target=target,
                                     reached=reached(times >= target)))  # fmt: skip
        parts.append(fill("exchange-workers", workers=workers, rows=rows(cells), verdicts="; ".join(verdicts),
                          flat=allowed, share=FLAT_SHARE))  # fmt: skip
        counts.append(fill("exchange-counts", **result, workers=workers))
    origin = provenance(record | {"counts": "; ".join(counts)}, n="n-exchange")
    return fill("exchange", model=record["model"], results="\n\n".join(parts), provenance=origin)


def memory_table(record: Record) -> str:
    """Write the section on the memory of a worker."""
    keys = ("weights_bytes", "held_after_building_bytes", "building_peak_bytes", "training_peak_bytes", "spread_bytes")
    training = [[f"{NAMES[row['strategy']]}, batch {row['batch']}", *(f"{row[key] / 1e6:.1f}" for key in keys)]
                for row in record["training"]]  # fmt: skip
    keys = ("first_bytes", "later_bytes", "later_bytes_spread")
    later = [[f"{NAMES[row['strategy']]}, {row['state']}", *(f"{row[key] / 1e6:.1f}" for key in keys),
              f"{row['later_bytes'] / row['weights_bytes']:.2f}"] for row in record["exchange"]]  # fmt: skip
    least = record["wired"][0]["peak_bytes"]
    wired = [[short(row["spec"]), row["batch"], f"{row['peak_bytes'] / 1e6:.1f}", f"{row['spread_bytes'] / 1e6:.1f}",
              signed(100 * (row["peak_bytes"] / least - 1))] for row in record["wired"]]  # fmt: skip
    more = 100 * (max(row["peak_bytes"] for row in record["wired"]) / least - 1)
    return fill(
        "memory",
        **{**record, "wired": rows(wired)},
        wired_verdict=fill("memory-verdict", more=more, bound=MAX_WIRED, reached=reached(more <= MAX_WIRED)),
        training_rows=rows(training),
        exchange_rows=rows(later),
        provenance=provenance(record, n="n-memory"),
    )


def recording(record: Record) -> str:
    """Write the section on the cost of recording and displaying a round."""
    ways = record["ways"]
    cells = [
        [name, f"{1e3 * way['cpu_s']:.2f}", f"{way['percent']:.3f}", f"{1e3 * spread(way['all']):.2f}"]
        for name, way in ways.items()
    ]
    most = max([way["percent"] for way in ways.values()] + [record["drawing"]["percent"]])
    values = {"percent": most, "max_percent": MAX_RECORDING, "reached": reached(most < MAX_RECORDING)}
    return fill("recording", **record, **values, rows=rows(cells), provenance=provenance(record, n="n-recording"))


if __name__ == "__main__":
    main()
