"""Rebuild docs/results.md: the paper's tables next to ours, and every other figure, with provenance.

    python benchmarks/tables.py            # reads benchmarks/results/*.jsonl, writes docs/results.md
    python benchmarks/tables.py --check    # write nothing; exit status 1 if the page is out of date

The latest line of each benchmark and setting is used. Figures that follow from formulas, and the byte counts of a job
that trains nothing, are computed here. No verdict is written by hand: it is computed from the figures.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

import detection
import reliability
import resist
from namespaces import parse_rate
from resist.cost import Link, Speed, Traffic, predict
from resist.cost.footprint import build_on_meta, sizes_of
from resist.cost.traffic import mean_traffic, paper_bytes, round_traffic
from resist.models import build
from resist.subnet.batchnorm import use_batch_statistics
from resist.subnet.chains import choose_chains
from resist.sync.local import Local

Record = dict[str, Any]
Build = Callable[[], nn.Module]
HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "results.md"
PAPER_GB = {("local_sgd", 2): 0.662, ("local_sgd", 4): 1.325, ("local_sgd", 8): 2.649,
            ("resist", 2): 0.454, ("resist", 4): 0.720, ("resist", 8): 1.289}  # fmt: skip
# Table 3: data set, S, seconds of local SGD and of ResIST.
PAPER_S = (("CIFAR-10", 4, 5486, 1532), ("CIFAR-10", 8, 10072, 2671),
           ("CIFAR-100", 4, 5528, 1545), ("CIFAR-100", 8, 10058, 2639))  # fmt: skip
MAX_GB, MAX_LINK = 0.47, 1.15  # targets at S = 4: GB in a round; the busiest link over a run, relative to the mean
MAX_TIME_ERROR, MAX_MEMORY_ERROR, MAX_WIRE_ERROR = 15.0, 10.0, 1.0  # percent
MAX_RECORDING = 1.0  # percent of a round
LEVEL = 0.05  # two round times that differ by less than this share are called equal, as in `resist cost`
TIMES_PUBLISHED, TIMES_FLAT = 5, 2
ROUNDS, COUNTED_ROUNDS, COUNTED_WORKERS = 50, 2, (2, 4)
NAMES = {"local_sgd": "local SGD", "resist": "ResIST"}
PAPERS = {"model": "preact_resnet101", "width": 64, "num_classes": 100}  # the network of the paper's tables
SEED = 0
RUN_SETTINGS = ("strategy", "optimizer_state", "workers", "rounds", "local_steps", "min_depth", "chain_lr",
            "local_sgd_first", "local_sgd_last", "seed")  # fmt: skip
PLAIN = "recalibrate, not augmented"
WAYS = {"batch": "batch", "recalibrate": "re-estimated", PLAIN: "re-estimated, plain", "average": "averaged"}
SCALES = {"inclusion": "scaled", "1.0": "no scale"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    text = page(HERE / "results")
    if check:
        sys.exit(0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text else "docs/results.md is out of date")
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")


def page(results: Path, network: Record = PAPERS) -> str:
    """Return the whole page, from the files in `results`; a benchmark without a file is omitted.

    Args:
        results: The folder of the result files.
        network: The network of Table 1: `model`, `width` and `num_classes`.
    """
    wire = latest(results / "wire.jsonl", "rate", "workers", "model", "sections", "width", "num_classes",
                  "local_steps", "compute_s")  # fmt: skip
    memory = latest(results / "memory.jsonl", "model", "width", "num_classes", "workers", "device")
    loopback = latest(results / "exchange.jsonl", "model", "width", "num_classes")
    parts = [
        "# Results\n\nWritten by `benchmarks/tables.py` from `benchmarks/results/`; do not edit. GB are 1e9 bytes, MB "
        "1e6. A commit that ends in `-dirty` had changes that were not committed."
    ]
    parts.append(
        traffic(network, [r for r in wire if all(r[k] == v for k, v in network.items()) and not r["sections"]])
    )
    parts += [round_times(wire)] if wire else []
    parts += [predictions(wire, memory)] if wire or memory else []
    parts += [exchange(record) for record in loopback]
    parts += [memory_table(record) for record in memory]
    parts += [recording(record) for record in latest(results / "recording.jsonl", "benchmark")]
    faults = latest(results / "faults.jsonl", "timeout_s", "forked")
    saves = latest(results / "checkpoints.jsonl", "model", "width", "workers", "local_steps", "batch_size")
    parts += [reliability.section(faults, saves, table, provenance)] if faults or saves else []
    parts += accuracy_sections(results / "cifar10.jsonl")
    parts += photographs(results / "imagenet.jsonl")
    detectors = latest(results / "detection.jsonl", "setting", "model", "workers", "image_size", "seed")
    parts += [detection.section(detectors, table, provenance)] if detectors else []
    return "\n\n".join(parts) + "\n"


def latest(file: Path, *keys: str) -> list[Record]:
    """Return the last line of each combination of `keys`, in the order of their first lines."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({tuple(str(line.get(key)) for key in keys): line for line in lines}.values())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def provenance(*records: Record, n: Callable[[Record], str]) -> str:
    """Describe machine, versions and number of measurements, one line for each distinct description.

    Args:
        records: The records with the figures.
        n: Returns the number of measurements of a record, as text.
    """
    lines = {
        f"{r['date']}, commit {r['commit']}, {r['machine']}, {r['cores']} cores, {r['gpu'] or 'no GPU'}, torch {r['torch']}, "
        f"Python {r['python']}; {n(r)}"
        for r in records
    }
    return "  \n".join(f"*Measured {line}.*" for line in sorted(lines))


def reached(yes: bool) -> str:
    return "reached" if yes else "**missed**"


def signed(percent: float) -> str:
    return f"{round(percent, 1) + 0.0:+.1f} %"  # + 0.0 turns -0.0 into 0.0


def spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def builder(record: Record) -> Build:
    return partial(
        build, record["model"], num_classes=record["num_classes"], width=record["width"],
        sections=tuple(record.get("sections", ())),
    )  # fmt: skip


def strategy_of(name: str, workers: int, state: str) -> resist.Strategy:
    return (resist.resist if name == "resist" else resist.local_sgd)(workers, 1, optimizer_state=state)


@dataclass(frozen=True)
class Formula:
    """Predicted traffic of a strategy.

    Attributes:
        mean: Mean traffic of a round, as `resist cost` predicts it.
        rounds: Bytes of each round, summed over the workers.
    """

    mean: Traffic
    rounds: list[int]


def formula(build: Build, strategy: resist.Strategy, rounds: int, *, statistics: bool = False) -> Formula:
    """Predict the traffic of the first `rounds` rounds of SGD with momentum, from their plans.

    Args:
        build: Builds the full network.
        strategy: The strategy that makes the plans.
        rounds: Number of rounds.
        statistics: Whether BatchNorm's running statistics are sent too.
    """
    template = build_on_meta(build)
    if not statistics:
        use_batch_statistics(template)
    chains = choose_chains(template)
    sizes = sizes_of(template, chains)
    plans = [strategy.plan(chains, seed=SEED, round=number) for number in range(rounds + 1)]
    run = [
        round_traffic(
            sizes, now, then, workers=strategy.workers, optimizer_state=strategy.optimizer_state, num_states=1
        )
        for now, then in pairwise(plans)
    ]
    paper = paper_bytes(sizes, plans[0], workers=strategy.workers)
    return Formula(mean_traffic(run, strategy.workers, paper), [sum(round_.bytes.values()) for round_ in run])


def count_bytes(build: Build, strategy: resist.Strategy, rounds: int) -> list[int]:
    """Return the bytes that a job counts in each of its first `rounds` synchronizations.

    One process hosts all workers. Nothing is trained, so no optimizer has state to send: `strategy` must reset it.
    """
    assert strategy.optimizer_state == "reset", "without an optimizer there is no state to send"
    job = resist.Job(build, strategy, seed=SEED, batchnorm="batch", transport=Local(strategy.workers))
    job.transport.take()  # discards the messages of building the job
    counted: list[int] = []
    for _ in range(rounds):
        job.synchronize()
        num_bytes = job.transport.take()["bytes"]
        assert isinstance(num_bytes, dict)
        counted.append(sum(num_bytes.values()))
    return counted


def traffic(network: Record, wire: list[Record]) -> str:
    make, rows, links, exact = builder(network), [], [], True
    for name, workers in PAPER_GB:
        sent = {
            state: formula(make, strategy_of(name, workers, state), ROUNDS) for state in ("reset", "travel", "average")
        }
        links += [formula_.mean.link_ratio for formula_ in sent.values()]
        counted = ""
        if workers in COUNTED_WORKERS:
            round_bytes = count_bytes(make, strategy_of(name, workers, "reset"), COUNTED_ROUNDS)
            exact &= round_bytes == sent["reset"].rounds[:COUNTED_ROUNDS]
            counted = f"{sum(round_bytes) / len(round_bytes) / 1e9:.4f}"
        rows.append([
            f"{NAMES[name]}, S = {workers}", f"{PAPER_GB[name, workers]:.3f}",
            f"{sent['reset'].mean.paper_bytes / 1e9:.4f}", *(f"{formula_.mean.total_bytes / 1e9:.3f}" for formula_ in sent.values()),
            counted, f"{sent['reset'].mean.link_ratio:.3f}",
        ])  # fmt: skip
    four, full = (formula(make, strategy_of(name, 4, "reset"), ROUNDS) for name in ("resist", "local_sgd"))
    more = formula(make, strategy_of("resist", 4, "reset"), ROUNDS, statistics=True).mean.total_bytes / 1e9
    dearest = formula(make, strategy_of("resist", 4, "average"), ROUNDS).mean.total_bytes / full.mean.total_bytes
    gb, above = four.mean.total_bytes / 1e9, sum(num_bytes > MAX_GB * 1e9 for num_bytes in four.rounds)
    head = ["", "paper", "its formula", "sent, `reset`", "sent, `travel`", "sent, `average`", "counted, `reset`",
            "busiest link / mean"]  # fmt: skip
    parts = [
        f"## Table 1 of the paper: GB per synchronization, {network['model']}, {network['num_classes']} classes\n\n"
        "The paper counts the traffic of a parameter server; `its formula` is that count by `resist.cost`. `sent` is the number "
        f"of bytes that all workers together really send, float32 parameters, mean over {ROUNDS} rounds of plans, for each "
        "treatment of the momentum (`reset` sends weights only). `counted` is the byte count of a real job whose messages are "
        f"copies in memory, mean of its first {COUNTED_ROUNDS} rounds; "
        + ("it equals the formula of these rounds, to the byte. " if exact else
        "**it does not equal the formula of these rounds.** ") + f"The last column is over {ROUNDS} rounds (`reset`).",
        table(head, rows),
        f"Target at S = 4, weights only: at most {MAX_GB} GB: {reached(gb <= MAX_GB)} in the mean, {gb:.3f} GB (the paper's "
        f"accounting: {PAPER_GB['resist', 4]:.3f}; a ring all-reduce of the full network: {full.mean.total_bytes / 1e9:.3f}). Single "
        f"rounds reach {max(four.rounds) / 1e9:.3f}; {above} of {ROUNDS} are above the target. With BatchNorm's running statistics, which "
        f"are sent except with `--batchnorm batch`: {more:.3f}.\n\nTarget: no link above {MAX_LINK} times the mean over a run: "
        f"{reached(max(links) <= MAX_LINK)}, at most {max(links):.3f} for all rows and policies.\n\n"
        f"A case of small gain: with averaged momentum, ResIST at S = 4 sends {dearest:.2f} of the bytes of local SGD with `reset`."
        "\n\n*Computed.*",
    ]  # fmt: skip
    return "\n\n".join(parts + ([on_wire(wire)] if wire else []))


def on_wire(wire: list[Record]) -> str:
    rows, over = [], []
    for record in wire:
        for m in record["methods"]:
            payload, source = (m["ledger_bytes"], "counted") if m["ledger_bytes"] else (m["formula_bytes"], "formula")
            sent = sum(m["wire_bytes"])
            over += [100 * (sent / sum(payload) - 1)] if m["ledger_bytes"] else []
            cells = (
                ["", ""]
                if not payload
                else [f"{sum(payload) / m['n'] / 1e9:.4f} ({source})", f"{sent / sum(payload):.4f}"]
            )
            rows.append([f"S = {record['workers']}, {record['rate']}, {_short(m)}", f"{sent / m['n'] / 1e9:.4f}", *cells,
                         f"{m['busiest_host_over_mean']:.3f}"])  # fmt: skip
    return (
        "On the wire: interface counters of emulated hosts, headers included, GB of the mean measured round. DDP "
        "communicates in every step.\n\n"
        + table(["", "interfaces", "payload", "ratio", "busiest host / mean"], rows)
        + (
            f"\n\nTarget: byte count and interfaces within {MAX_WIRE_ERROR:.0f} %: {reached(max(map(abs, over)) <= MAX_WIRE_ERROR)}, "
            f"at most {max(map(abs, over)):.2f} % apart."
            if over
            else ""
        )
        + f"\n\n{provenance(*wire, n=_measured_rounds)}"
    )


def _measured_rounds(record: Record) -> str:
    return f"n = {record['rounds']} rounds ({record['rate']})"


def _short(m: Record) -> str:
    return ", ".join(part.strip() for part in m["method"].replace("optimizer_state=", "").split(","))


def round_times(wire: list[Record]) -> str:
    rows = [[f"{data}, S = {s}", base, ours, f"{base / ours:.2f}"] for data, s, base, ours in PAPER_S]
    parts = [
        "## Table 3 of the paper: the parts of the time of a round\n\nThe paper's training times:",
        table(["", "local SGD, s", "ResIST, s", "ratio"], rows),
        "Ours, one round on **emulated** hosts: network namespaces connected by a bridge, each link limited by `tc tbf`, gloo, "
        f"one process per host. Speed-ups are against our local SGD in the same run. Round times that differ by less than {LEVEL:.0%} are "
        "called equal.",
    ]
    return "\n\n".join([*parts, *(_rounds_of(record) for record in wire)])


def _rounds_of(record: Record) -> str:
    methods = {m["method"]: m for m in record["methods"]}
    base = next((m for name, m in methods.items() if name.startswith("local_sgd")), None)
    head = ["", "compute s", "exchange s", "round s", "max - min"]
    rows = []
    for m in methods.values():
        seconds = [m[part]["median"] for part in ("round_s", "compute_s", "exchange_s")]
        columns = (seconds[1], seconds[2], seconds[0])
        row = [_short(m), *(f"{value:.2f}" for value in columns), f"{spread(m['round_s']['all']):.2f}"]
        if base is not None:
            base_s = [base[part]["median"] for part in ("round_s", "compute_s", "exchange_s")]
            row += [f"{a / b:.2f}" if b else "" for a, b in zip(base_s, seconds, strict=True)]
        rows.append(row)
    head += [] if base is None else ["speed-up", "of compute", "of exchange"]
    slept = "Compute is real"
    if record["compute_s"]:
        slept = (
            f"Compute is emulated by sleeping, {record['compute_s'][0]:g} s per step of a sub-network and {record['compute_s'][1]:g} s of the full "
            f"network ({record['compute_note'] or 'no device named'}): the speed-up of compute is an input, only the exchange is measured"
        )
    title = f"### {record['model']}, S = {record['workers']}, l = {record['local_steps']}, {record['rate']}"
    note = f"{slept}. DDP: {record['ddp_steps']} of {record['local_steps']} steps measured in each round, scaled up."
    parts = [title, table(head, rows), note, *([_gains(record, methods, base)] if base is not None else [])]
    return "\n\n".join([*parts, provenance(record, n=lambda r: f"n = {r['rounds']} rounds, medians")])


def _gains(record: Record, methods: dict[str, Record], base: Record) -> str:
    """Compare each ResIST row with the other methods: slower, equal, faster, and the seconds that it saves."""
    lines = []
    for name, method in methods.items():
        if not name.startswith("resist"):
            continue
        saved = [base[part]["median"] - method[part]["median"] for part in ("compute_s", "exchange_s")]
        ratios = {other: m["round_s"]["median"] / method["round_s"]["median"] for other, m in methods.items()
                  if not other.startswith("resist")}  # fmt: skip
        note = ""
        published = methods.get("published")
        if published is not None and record["compute_s"]:
            # wire.py sleeps a full step for methods that keep the full network; the paper's workers compute less
            ratios["published"] = (method["compute_s"]["median"] + published["exchange_s"]["median"]) / method[
                "round_s"
            ]["median"]
            note = "*"
        ranked = sorted(ratios.items(), key=lambda item: item[1])
        against = ", ".join(
            f"{_short(methods[o])}{note if o == 'published' else ''} {ratio:.2f}" for o, ratio in ranked
        )
        slower = [_short(methods[o]) for o, ratio in ranked if ratio < 1 / (1 + LEVEL)]
        level = [_short(methods[o]) for o, ratio in ranked if 1 / (1 + LEVEL) <= ratio < 1 + LEVEL]
        verdict = f"slower than {', '.join(slower) or 'none'}, equal to {', '.join(level) or 'none'}"
        lines.append(f"- {_short(method)}: {verdict}. Round time of each other method divided by this one: {against}. Compared with "
                     f"local SGD, a round saves {saved[0]:.2f} s of compute and {saved[1]:.2f} s of exchange.")  # fmt: skip
    if any("published*" in line for line in lines):
        lines.append("\n\\* In the table `published` has steps of the full network, which its processes keep; the paper's workers "
                     "compute only their sub-network. Here it has ResIST's compute and its own measured exchange, which sends weights only.")  # fmt: skip
    return "\n".join(lines)


def predictions(wire: list[Record], memory: list[Record]) -> str:
    times = [row for record in wire if record["compute_s"] for row in _time_errors(record)]
    peaks = [row for record in memory for row in _memory_errors(record)]
    parts = ["## Predictions of `resist cost` and measurements"]
    if times:
        parts += [
            f"Round times; target within {MAX_TIME_ERROR:.0f} %: {_missed(times, MAX_TIME_ERROR)}. Compute was emulated by "
            f"sleeping and is an input of the prediction, so the error of the exchange alone is more informative. Predicted: the mean over {ROUNDS} "
            "rounds, at the line rate of the emulated link, without latency.",
            table(["", "round s, predicted", "measured", "max - min", "error", "exchange s, predicted", "measured", "error"],
                  [[r[0], f"{r[2]:.2f}", f"{r[3]:.2f}", f"{r[4]:.2f}", signed(r[1]), f"{r[5]:.2f}", f"{r[6]:.2f}",
                    signed(100 * (r[5] / r[6] - 1))] for r in times]),
            provenance(*(r for r in wire if r["compute_s"]), n=_measured_rounds),
        ]  # fmt: skip
    if peaks:
        parts += [
            f"Peak memory of a training worker; target within {MAX_MEMORY_ERROR:.0f} %: {_missed(peaks, MAX_MEMORY_ERROR)}.",
            table(["", "predicted MB", "measured MB", "max - min", "error"],
                  [[r[0], *(f"{value / 1e6:.1f}" for value in r[2:]), signed(r[1])] for r in peaks]),
            provenance(*memory, n=lambda r: f"largest of n = {r['repetitions']} runs"),
        ]  # fmt: skip
    return "\n\n".join(parts)


def _missed(rows: list[tuple[Any, ...]], bound: float) -> str:
    """Name the rows (name, error in percent, ...) whose error exceeds `bound`."""
    missed = [f"{row[0]} ({signed(row[1])})" for row in rows if abs(row[1]) > bound]
    worst = max(abs(row[1]) for row in rows)
    return f"**missed** by {', '.join(missed)}" if missed else f"reached by all, at most {worst:.1f} % off"


def _time_errors(record: Record) -> Iterable[tuple[Any, ...]]:
    """Yield name, error in percent, round s predicted, measured, spread, exchange s predicted, measured."""
    for m in record["methods"]:
        name, _, state = m["method"].partition(",optimizer_state=")
        if name not in ("resist", "local_sgd", "ddp") or "," in state:
            continue
        report = predict(
            builder(record), strategies=[name], workers=[record["workers"]], optimizer_state=state or "reset",
            batchnorm="batch", batch_size=2, local_steps=record["local_steps"], rounds=ROUNDS,
            link=Link(parse_rate(record["rate"]) / 1e9), speed=Speed(2 / record["compute_s"][1]),
        )  # fmt: skip
        seconds = report.rows[0].seconds
        assert seconds is not None
        measured = m["round_s"]["median"]
        yield (
            f"{record['rate']}, {_short(m)}", 100 * (seconds.round / measured - 1), seconds.round, measured,
            spread(m["round_s"]["all"]), seconds.exchange, m["exchange_s"]["median"],
        )  # fmt: skip


def _memory_errors(record: Record) -> Iterable[tuple[Any, ...]]:
    """Yield name, error in percent, peak bytes predicted, measured, spread."""
    for row in record["training"]:
        report = predict(builder(record), strategies=[row["strategy"]], workers=[record["workers"]], rounds=1,
                         batch_size=row["batch"])  # fmt: skip
        peak, measured = max(n.memory.peak for n in report.rows[0].networks), row["training_peak_bytes"]
        held = "sub-network" if row["strategy"] == "resist" else "full network"
        yield f"{held}, batch {row['batch']}", 100 * (peak / measured - 1), peak, measured, row["spread_bytes"]


def exchange(record: Record) -> str:
    parts = [
        f"## One synchronization over loopback\n\nSeconds for {record['model']}, gloo, one process per worker, one thread each, "
        "weights only except where a row says otherwise. `times` is the median of the ratios to ResIST within a repetition.\n\n"
        "`published` is the paper's pattern, a process group for every block in every round and a collective for every "
        "tensor, in the most favorable form that we could make; `flat` is one all-reduce of all parameters."
    ]
    for workers, result in record["results"].items():
        methods = result["methods"]
        rows = [[_short({"method": name}), f"{m['median_s']:.3f}", f"{m['quartile_low_s']:.3f} to {m['quartile_high_s']:.3f}",
                 f"{m['times_resist']:.2f}"] for name, m in methods.items()]  # fmt: skip
        verdicts = [f"{name} {methods[name]['times_resist']:.2f} times, target {bound}: {reached(methods[name]['times_resist'] >= bound)}"
                for name, bound in (("published", TIMES_PUBLISHED), ("flat", TIMES_FLAT)) if name in methods]  # fmt: skip
        sent = [
            formula(builder(record), strategy_of(name, int(workers), "reset"), ROUNDS).mean.total_bytes
            for name in NAMES
        ]
        parts += [
            table([f"S = {workers}", "median s", "quartiles", "times"], rows),
            f"S = {workers}: {'; '.join(verdicts)}. From the bytes alone, `flat` would take {sent[0] / sent[1]:.2f} times as long.",
        ]

    def counts(r: Record) -> str:
        texts = [f"S = {s}: n = {result['n']} of {result['measured']} repetitions, other programs took at most "
                 f"{result['others_share']['max']:.1%} of the processors" for s, result in r["results"].items()]  # fmt: skip
        return "; ".join(texts)

    return "\n\n".join([*parts, provenance(record, n=counts)])


def memory_table(record: Record) -> str:
    keys = ("weights_bytes", "held_after_building_bytes", "building_peak_bytes", "training_peak_bytes", "spread_bytes")
    rows = [[f"{NAMES[row['strategy']]}, batch {row['batch']}", *(f"{row[key] / 1e6:.1f}" for key in keys)]
            for row in record["training"]]  # fmt: skip
    later = [
        [f"{NAMES[row['strategy']]}, {row['state']}", f"{row['first_bytes'] / 1e6:.1f}", f"{row['later_bytes'] / 1e6:.1f}",
         f"{row['later_bytes_spread'] / 1e6:.1f}", f"{row['later_bytes'] / row['weights_bytes']:.2f}"]
        for row in record["exchange"]
    ]  # fmt: skip
    return "\n\n".join([
        f"## Memory of a worker\n\n{record['model']}, S = {record['workers']}, {record['device']}, MB above an idle process. While a "
        "job is built, each process builds the full network once, in CPU memory.",
        table(["", "weights", "after building", "peak, building", "peak, training", "max - min"], rows),
        "Additional memory at the peak of a synchronization, MB:",
        table(["", "first", "later ones", "max - min", "later / worker's weights"], later),
        provenance(record, n=lambda r: f"largest of n = {r['repetitions']} runs"),
    ])  # fmt: skip


def recording(record: Record) -> str:
    """Write the section on the cost of recording and displaying a round."""
    ways = record["ways"]
    rows = [
        [name, f"{1e3 * way['cpu_s']:.2f}", f"{way['percent']:.3f}", f"{1e3 * spread(way['all']):.2f}"]
        for name, way in ways.items()
    ]
    most = max([way["percent"] for way in ways.values()] + [record["drawing"]["percent"]])
    return "\n\n".join([
        f"## The cost of recording a run\n\nProcessor time to record a round, with threads and child processes, compared with the "
        f"{record['round_cpu_s']:.2f} s of a small round: handwritten digits, {record['workers']} workers in one process, "
        f"{record['local_steps']} local steps, batch {record['batch_size']}. In addition, the live display is drawn every second, which "
        f"takes {record['drawing']['percent']:.2f} % of a core.",
        table(["", "ms", "% of the round", "max - min, ms"], rows),
        f"Target: under {MAX_RECORDING:.0f} % of a round: {reached(most < MAX_RECORDING)}, at most {most:.2f} %.",
        provenance(record, n=lambda r: f"medians of n = {r['repetitions']} repetitions of {r['rounds']} rounds"),
    ])  # fmt: skip


def accuracy_sections(file: Path) -> list[str]:
    """Return the two sections on accuracy, or nothing without runs."""
    runs = latest(file, *RUN_SETTINGS)
    return [curves(runs), readings(runs)] if runs else []


def photographs(file: Path) -> list[str]:
    """Return the section on the ImageNet path at a small scale, or nothing without results."""
    records = latest(file, "part", "warmup_epochs")
    runs = [r for r in records if r["part"] == "train"]
    parts = [
        "## Photographs in folders: the ImageNet path, at a size that two cores can train\n\n50 classes of Tiny ImageNet, S = 2 "
        "in two processes; for the setting see `benchmarks/imagenet.py`. This shows that the path works, not the accuracy on ImageNet. "
        "Chance is 2 %. With 1,250 test images the uncertainty of a result near 15 % is about 2 points, so smaller differences "
        "between the rows mean nothing."
    ]
    if runs:
        epochs = min(len(r["loss_by_epoch"]) for r in runs)
        epochs -= epochs > 6  # beyond the sixth epoch there is only the rest of the last round
        rows = [
            [f"{r['warmup_epochs']:g} epochs ({r['warmup_rounds']} of {r['rounds']} rounds)",
             *(f"{loss:.3f}" for loss in r["loss_by_epoch"][:epochs]),
             show(100 * r["accuracy"]), show(100 * r["top5"]), f"{r['gb_sent']:.3f}"]
            for r in runs
        ]  # fmt: skip
        head = ["local SGD first", *(f"loss, epoch {e + 1}" for e in range(epochs)), "top 1, %", "top 5, %", "GB sent"]
        parts += ["Mean loss (labels smoothed by 0.1) of the rounds that end in an epoch; test accuracy of the scaled full network.",
                  table(head, rows)]  # fmt: skip
    for r in records:
        if r["part"] == "resume":
            parts.append(
                f"Ended by SIGTERM after round {r['interrupted_after']} of {r['rounds']} (status {r['status']}) and resumed: the loss of "
                f"a round differs from that of the uninterrupted run by at most {r['greatest_difference']:g}; the test accuracy "
                + ("is the same." if r["same_accuracy"] else "**differs**.")
            )
        if r["part"] == "input":
            read, trained = r["read_images_s"], r["trained_images_s"]
            rates = ", ".join(f"{read[n]:.0f} with {n}" for n in read)
            parts.append(
                f"Input pipeline, images/s read, decoded and augmented: {rates} processes (with 1 process {read['1'] / trained:.1f} times the "
                f"training speed on one thread, {trained:.0f} images/s). Reading and training together: {r['both_images_s']:.0f} images/s; "
                f"{r['waited_share']:.1%} of the time was spent waiting for data. Other programs ran too: load {r['load']:g}."
            )
    return (
        ["\n\n".join([*parts, provenance(*records, n=lambda r: "n = 1 of each, so no spread is known")])]
        if records
        else []
    )


def run_name(run: Record) -> str:
    more = [f"{run[key]} {what}" for key, what in
            (("local_sgd_first", "rounds of local SGD first"), ("local_sgd_last", "rounds of local SGD last")) if run.get(key)]  # fmt: skip
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


def curves(runs: list[Record]) -> str:
    marks = sorted({mark for run in runs for mark in run["percent_of_5000"]}, key=int)
    rows = []
    for run in runs:
        way = PLAIN if plain_only(run) else "recalibrate"
        ends = [percent(run, way, num=5000), percent(run, way), percent(run, "average")]
        curve = [show(run["percent_of_5000"].get(mark)) for mark in marks]
        images = "plain" if plain_only(run) else "augmented"
        rows.append([run_name(run), images, *curve, *map(show, ends), f"{run['train_cpu_s']:.0f}"])
    head = ["", "re-estimated on", *(f"{mark} rounds" for mark in marks), "end, 5,000", "end, 10,000",
            "end, averaged, 10,000", "processor s"]  # fmt: skip
    return "\n\n".join([
        "## Accuracy on CIFAR-10, at a width that two cores can train\n\nPercent of test images; for the setting see "
        "`benchmarks/cifar10.py`. The word after the strategy is the treatment of the momentum at a synchronization. During "
        "training: the first 5,000 test images, BatchNorm statistics re-estimated on 5,000 training images (plain, or augmented as "
        "in training), inclusion scale. Processor seconds: training and synchronization of all workers.",
        table(head, rows),
        *equal_rounds(runs),
        provenance(*runs, n=lambda r: "n = 1 run of each row, so no spread is known"),
    ])  # fmt: skip


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
            lines.append(
                f"After {ours['rounds']} rounds the best ResIST run ({run_name(ours)}) is {abs(points):.2f} points "
                f"{'ahead of' if points > 0 else 'behind'} the best local SGD run ({run_name(local)}), averaged statistics, in "
                f"{ours['train_cpu_s'] / local['train_cpu_s']:.2f} of its processor time."
            )
    return lines


def readings(runs: list[Record]) -> str:
    columns = [
        (way, scale) for scale in SCALES for way in WAYS if any(percent(r, way, scale) is not None for r in runs)
    ]
    rows = [[run_name(run), *(show(percent(run, *column)) for column in columns)] for run in runs]
    better = 0
    for run in runs:
        reestimated = [value for way in ("recalibrate", PLAIN) if (value := percent(run, way)) is not None]
        averaged = percent(run, "average")
        better += averaged is not None and bool(reestimated) and averaged > max(reestimated)
    return "\n\n".join([
        "## BatchNorm statistics and scale of the full network\n\nPercent of the 10,000 test images at the end, for each source of "
        "BatchNorm's statistics: each test batch, re-estimated on the full network (on augmented or on plain images), or averaged "
        "over the holders; with the inclusion scale on the chain's branches, and without.",
        table(["", *(f"{WAYS[way]}, {SCALES[scale]}" for way, scale in columns)], rows),
        f"With the scale, averaged statistics were better than re-estimated ones in {better} of {len(runs)} runs.",
        provenance(*runs, n=lambda r: "n = 1 run of each row, so no spread is known"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
