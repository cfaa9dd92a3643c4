"""Rebuild docs/results.md: the paper's tables with ours beside them, and every other figure, with provenance.

    python benchmarks/tables.py            # reads benchmarks/results/*.jsonl, writes docs/results.md
    python benchmarks/tables.py --check    # writes nothing; exit status 1 where the page is not what it would write

Of each benchmark and setting the latest line counts. What follows from formulas, and the ledger of a job that trains
nothing, is computed here. No verdict is written by hand: whether a target was reached is read from the figures.
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
LEVEL = 0.05  # two round times that are closer than this share are called level, as `resist cost` does
TIMES_PUBLISHED, TIMES_FLAT = 5, 2
ROUNDS, LEDGER_ROUNDS, LEDGER_WORKERS = 50, 2, (2, 4)
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
    """The whole page, from the files in `results`; a benchmark without a file is left out. network: of Table 1."""
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
    """The last line for each combination of `keys`, in the order in which these came first."""
    if not file.exists():
        return []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list({tuple(str(line.get(key)) for key in keys): line for line in lines}.values())


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def provenance(*records: Record, n: Callable[[Record], str]) -> str:
    """Where figures come from, and how often they were measured; a line for each different answer."""
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
    """mean: as `resist cost` gives it. rounds: bytes of each round, summed over workers."""

    mean: Traffic
    rounds: list[int]


def formula(build: Build, strategy: resist.Strategy, rounds: int, *, statistics: bool = False) -> Formula:
    """The first `rounds` rounds under SGD with momentum, from their plans; statistics: BatchNorm's travel too."""
    template = build_on_meta(build)
    if not statistics:
        use_batch_statistics(template)
    chains = choose_chains(template)
    sizes = sizes_of(template, chains)
    plans = [
        {chain.name: strategy.assign(chain.num_blocks, chain.name, SEED, number) for chain in chains}
        for number in range(rounds + 1)
    ]
    run = [
        round_traffic(
            sizes, now, then, workers=strategy.workers, optimizer_state=strategy.optimizer_state, num_states=1
        )
        for now, then in pairwise(plans)
    ]
    paper = paper_bytes(sizes, plans[0], strategy.workers)
    return Formula(mean_traffic(run, strategy.workers, paper), [sum(one.bytes.values()) for one in run])


def ledger(build: Build, strategy: resist.Strategy, rounds: int) -> list[int]:
    """Bytes that a job books in each of its first `rounds` synchronizations. One process hosts all workers, and
    nothing is trained, so that no optimizer has state to send: `strategy` has to reset it."""
    assert strategy.optimizer_state == "reset", "without an optimizer there is no state to book"
    job = resist.Job(build, strategy, seed=SEED, batchnorm="batch", transport=Local(strategy.workers))
    job.transport.take()  # what was said while the job was built
    booked: list[int] = []
    for _ in range(rounds):
        job.synchronize()
        num_bytes = job.transport.take()["bytes"]
        assert isinstance(num_bytes, dict)
        booked.append(sum(num_bytes.values()))
    return booked


def traffic(network: Record, wire: list[Record]) -> str:
    make, rows, links, exact = builder(network), [], [], True
    for name, workers in PAPER_GB:
        sent = {
            state: formula(make, strategy_of(name, workers, state), ROUNDS) for state in ("reset", "travel", "average")
        }
        links += [one.mean.link_ratio for one in sent.values()]
        booked = ""
        if workers in LEDGER_WORKERS:
            found = ledger(make, strategy_of(name, workers, "reset"), LEDGER_ROUNDS)
            exact &= found == sent["reset"].rounds[:LEDGER_ROUNDS]
            booked = f"{sum(found) / len(found) / 1e9:.4f}"
        rows.append([
            f"{NAMES[name]}, S = {workers}", f"{PAPER_GB[name, workers]:.3f}",
            f"{sent['reset'].mean.paper_bytes / 1e9:.4f}", *(f"{one.mean.total_bytes / 1e9:.3f}" for one in sent.values()),
            booked, f"{sent['reset'].mean.link_ratio:.3f}",
        ])  # fmt: skip
    four, full = (formula(make, strategy_of(name, 4, "reset"), ROUNDS) for name in ("resist", "local_sgd"))
    more = formula(make, strategy_of("resist", 4, "reset"), ROUNDS, statistics=True).mean.total_bytes / 1e9
    dearest = formula(make, strategy_of("resist", 4, "average"), ROUNDS).mean.total_bytes / full.mean.total_bytes
    gb, above = four.mean.total_bytes / 1e9, sum(one > MAX_GB * 1e9 for one in four.rounds)
    head = ["", "paper", "its formula", "sent, `reset`", "sent, `travel`", "sent, `average`", "ledger, `reset`",
            "busiest link / mean"]  # fmt: skip
    parts = [
        f"## Table 1 of the paper: GB per synchronization, {network['model']}, {network['num_classes']} classes\n\n"
        "The paper counts what a parameter server would see; `its formula` is that count by `resist.cost`. `sent` is what "
        f"all workers together really send, float32 parameters, mean over {ROUNDS} rounds of plans, by what becomes of the "
        "momentum (`reset` sends weights only). `ledger` is what a real job over local copies books, mean of its first "
        f"{LEDGER_ROUNDS} rounds; " + ("it is the formula of these rounds, to the byte. " if exact else
        "**it is not the formula of these rounds.** ") + f"The last column is over {ROUNDS} rounds (`reset`).",
        table(head, rows),
        f"Target at S = 4, weights only: at most {MAX_GB} GB: {reached(gb <= MAX_GB)} in the mean, {gb:.3f} GB (the paper's "
        f"accounting: {PAPER_GB['resist', 4]:.3f}; a ring all-reduce of the full network: {full.mean.total_bytes / 1e9:.3f}). Single "
        f"rounds reach {max(four.rounds) / 1e9:.3f}; {above} of {ROUNDS} are above the target. With BatchNorm's running statistics, which "
        f"travel unless `--batchnorm batch`: {more:.3f}.\n\nTarget: no link above {MAX_LINK} times the mean over a run: "
        f"{reached(max(links) <= MAX_LINK)}, at most {max(links):.3f} for all rows and policies.\n\n"
        f"Where little is gained: with momentum averaged, ResIST at S = 4 sends {dearest:.2f} of what local SGD sends that resets it."
        "\n\n*Computed.*",
    ]  # fmt: skip
    return "\n\n".join(parts + ([on_wire(wire)] if wire else []))


def on_wire(wire: list[Record]) -> str:
    rows, over = [], []
    for record in wire:
        for m in record["methods"]:
            payload, source = (m["ledger_bytes"], "ledger") if m["ledger_bytes"] else (m["formula_bytes"], "formula")
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
        "On the wire: interface counters of emulated hosts, headers included, GB in a mean round of those measured. DDP "
        "exchanges in every step.\n\n"
        + table(["", "interfaces", "payload", "ratio", "busiest host / mean"], rows)
        + (
            f"\n\nTarget: ledger and interfaces within {MAX_WIRE_ERROR:.0f} %: {reached(max(map(abs, over)) <= MAX_WIRE_ERROR)}, "
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
    rows = [[f"{data}, S = {s}", own, ours, f"{own / ours:.2f}"] for data, s, own, ours in PAPER_S]
    parts = [
        "## Table 3 of the paper: what the time of a round is made of\n\nThe paper's training times:",
        table(["", "local SGD, s", "ResIST, s", "ratio"], rows),
        "Ours, one round on **emulated** hosts: network namespaces joined by a bridge, each link limited by `tc tbf`, gloo, "
        "one process a host. Speed-ups are against our local SGD in the same run.",
    ]
    return "\n\n".join([*parts, *(_rounds_of(record) for record in wire)])


def _rounds_of(record: Record) -> str:
    methods = {m["method"]: m for m in record["methods"]}
    base = next((m for name, m in methods.items() if name.startswith("local_sgd")), None)
    head = ["", "compute s", "exchange s", "round s", "max - min"]
    rows = []
    for m in methods.values():
        own = [m[kind]["median"] for kind in ("round_s", "compute_s", "exchange_s")]
        row = [_short(m), *(f"{x:.2f}" for x in (own[1], own[2], own[0])), f"{spread(m['round_s']['all']):.2f}"]
        if base is not None:
            theirs = [base[kind]["median"] for kind in ("round_s", "compute_s", "exchange_s")]
            row += [f"{a / b:.2f}" if b else "" for a, b in zip(theirs, own, strict=True)]
        rows.append(row)
    head += [] if base is None else ["speed-up", "of compute", "of exchange"]
    slept = "Compute is real"
    if record["compute_s"]:
        slept = (
            f"Compute is slept, {record['compute_s'][0]:g} s a step of a sub-network and {record['compute_s'][1]:g} s of the full one "
            f"({record['compute_note'] or 'no device named'}): the speed-up of compute is put in, only the exchange is measured"
        )
    title = f"### {record['model']}, S = {record['workers']}, l = {record['local_steps']}, {record['rate']}"
    note = f"{slept}. DDP: {record['ddp_steps']} of {record['local_steps']} steps measured in each round, and scaled."
    parts = [title, table(head, rows), note, *([_gains(record, methods, base)] if base is not None else [])]
    return "\n\n".join([*parts, provenance(record, n=lambda r: f"n = {r['rounds']} rounds, medians")])


def _gains(record: Record, methods: dict[str, Record], base: Record) -> str:
    """Whom ResIST loses to or gains nothing over, by how much it is ahead of the others, and what it saves."""
    said = []
    for name, own in methods.items():
        if not name.startswith("resist"):
            continue
        saved = [base[kind]["median"] - own[kind]["median"] for kind in ("compute_s", "exchange_s")]
        ratios = {other: m["round_s"]["median"] / own["round_s"]["median"] for other, m in methods.items()
                  if not other.startswith("resist")}  # fmt: skip
        note = ""
        published = methods.get("published")
        if published is not None and record["compute_s"]:
            # wire.py lets every method that keeps the full network sleep a full step; the paper's workers compute less
            ratios["published"] = (own["compute_s"]["median"] + published["exchange_s"]["median"]) / own["round_s"][
                "median"
            ]
            note = "*"
        ranked = sorted(ratios.items(), key=lambda item: item[1])
        against = ", ".join(
            f"{_short(methods[o])}{note if o == 'published' else ''} {ratio:.2f}" for o, ratio in ranked
        )
        slower = [_short(methods[o]) for o, ratio in ranked if ratio < 1 / (1 + LEVEL)]
        level = [_short(methods[o]) for o, ratio in ranked if 1 / (1 + LEVEL) <= ratio < 1 + LEVEL]
        verdict = f"loses to {', '.join(slower) or 'none'}, gains nothing over {', '.join(level) or 'none'}"
        said.append(f"- {_short(own)}: {verdict}. Round time of each other, over its own: {against}. Of local SGD's round it saves "
                    f"{saved[0]:.2f} s of compute and {saved[1]:.2f} s of exchange.")  # fmt: skip
    if any("published*" in one for one in said):
        said.append("\n\\* The table charges `published` with steps of the full network, which its processes keep; the paper's "
                    "workers compute their sub-network only. Here it has ResIST's compute and its own measured exchange, which carries weights only.")  # fmt: skip
    return "\n".join(said)


def predictions(wire: list[Record], memory: list[Record]) -> str:
    times = [row for record in wire if record["compute_s"] for row in _time_errors(record)]
    peaks = [row for record in memory for row in _memory_errors(record)]
    parts = ["## What `resist cost` predicts, against what was measured"]
    if times:
        parts += [
            f"Round times; target within {MAX_TIME_ERROR:.0f} %: {_missed(times, MAX_TIME_ERROR)}. Compute was slept, and is given to "
            f"the prediction, so the error of the exchange alone says more. Predicted: the mean over {ROUNDS} rounds, over the "
            "line rate of the emulated link, no latency.",
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
    """rows: name, error in percent, ..."""
    missed = [f"{row[0]} ({signed(row[1])})" for row in rows if abs(row[1]) > bound]
    worst = max(abs(row[1]) for row in rows)
    return f"**missed** by {', '.join(missed)}" if missed else f"reached by all, at most {worst:.1f} % off"


def _time_errors(record: Record) -> Iterable[tuple[Any, ...]]:
    """name, error of the round in percent, round s predicted, measured, its spread, exchange s predicted, measured."""
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
    """name, error in percent, peak bytes predicted, measured, spread."""
    for one in record["training"]:
        report = predict(builder(record), strategies=[one["strategy"]], workers=[record["workers"]], rounds=1,
                         batch_size=one["batch"])  # fmt: skip
        peak, measured = max(n.memory.peak for n in report.rows[0].networks), one["training_peak_bytes"]
        held = "sub-network" if one["strategy"] == "resist" else "full network"
        yield f"{held}, batch {one['batch']}", 100 * (peak / measured - 1), peak, measured, one["spread_bytes"]


def exchange(record: Record) -> str:
    parts = [
        f"## One synchronization over loopback\n\nSeconds for {record['model']}, gloo, one process a worker, one thread each, "
        "weights only unless said otherwise. `times` is the median of the ratios to ResIST within a repetition.\n\n"
        "`published` is the paper's pattern, a process group for every block in every round and a collective for every "
        "tensor, as favorable as we could make it; `flat` is one all-reduce of everything."
    ]
    for workers, found in record["results"].items():
        methods = found["methods"]
        rows = [[_short({"method": name}), f"{m['median_s']:.3f}", f"{m['quartile_low_s']:.3f} to {m['quartile_high_s']:.3f}",
                 f"{m['times_resist']:.2f}"] for name, m in methods.items()]  # fmt: skip
        said = [f"{name} {methods[name]['times_resist']:.2f} times, target {bound}: {reached(methods[name]['times_resist'] >= bound)}"
                for name, bound in (("published", TIMES_PUBLISHED), ("flat", TIMES_FLAT)) if name in methods]  # fmt: skip
        sent = [
            formula(builder(record), strategy_of(name, int(workers), "reset"), ROUNDS).mean.total_bytes
            for name in NAMES
        ]
        parts += [
            table([f"S = {workers}", "median s", "quartiles", "times"], rows),
            f"S = {workers}: {'; '.join(said)}. By bytes alone, `flat` would take {sent[0] / sent[1]:.2f} times as long.",
        ]

    def counts(r: Record) -> str:
        found = [f"S = {s}: n = {one['n']} of {one['measured']} repetitions, others took at most "
                 f"{one['others_share']['max']:.1%} of the processors" for s, one in r["results"].items()]  # fmt: skip
        return "; ".join(found)

    return "\n\n".join([*parts, provenance(record, n=counts)])


def memory_table(record: Record) -> str:
    keys = ("weights_bytes", "held_after_building_bytes", "building_peak_bytes", "training_peak_bytes", "spread_bytes")
    rows = [[f"{NAMES[one['strategy']]}, batch {one['batch']}", *(f"{one[key] / 1e6:.1f}" for key in keys)]
            for one in record["training"]]  # fmt: skip
    later = [
        [f"{NAMES[one['strategy']]}, {one['state']}", f"{one['first_bytes'] / 1e6:.1f}", f"{one['later_bytes'] / 1e6:.1f}",
         f"{one['later_bytes_spread'] / 1e6:.1f}", f"{one['later_bytes'] / one['weights_bytes']:.2f}"]
        for one in record["exchange"]
    ]  # fmt: skip
    return "\n\n".join([
        f"## Memory of a worker\n\n{record['model']}, S = {record['workers']}, {record['device']}, MB above an idle process. While a "
        "job is built, each process builds the full network once, on the host.",
        table(["", "weights", "held when built", "peak, building", "peak, training", "max - min of it"], rows),
        "What a synchronization adds at its peak, MB:",
        table(["", "first", "later ones", "max - min", "later, of the worker's weights"], later),
        provenance(record, n=lambda r: f"largest of n = {r['repetitions']} runs"),
    ])  # fmt: skip


def recording(record: Record) -> str:
    """What it costs to write and show a round's record."""
    ways = record["ways"]
    rows = [
        [name, f"{1e3 * way['cpu_s']:.2f}", f"{way['percent']:.3f}", f"{1e3 * spread(way['all']):.2f}"]
        for name, way in ways.items()
    ]
    most = max([way["percent"] for way in ways.values()] + [record["drawing"]["percent"]])
    return "\n\n".join([
        f"## What recording a run costs\n\nProcessor time of a round's record, threads and child processes counted, beside the "
        f"{record['round_cpu_s']:.2f} s of a small round: handwritten digits, {record['workers']} workers in one process, "
        f"{record['local_steps']} local steps, batch {record['batch_size']}. The live display is drawn again every second besides, which "
        f"takes {record['drawing']['percent']:.2f} % of a core.",
        table(["", "ms", "% of the round", "max - min, ms"], rows),
        f"Target: under {MAX_RECORDING:.0f} % of a round: {reached(most < MAX_RECORDING)}, at most {most:.2f} %.",
        provenance(record, n=lambda r: f"medians of n = {r['repetitions']} repetitions of {r['rounds']} rounds"),
    ])  # fmt: skip


def accuracy_sections(file: Path) -> list[str]:
    """Nothing where there are no runs."""
    runs = latest(file, *RUN_SETTINGS)
    return [curves(runs), readings(runs)] if runs else []


def photographs(file: Path) -> list[str]:
    """The ImageNet path on a small scale; nothing where it was not run."""
    records = latest(file, "part", "warmup_epochs")
    runs = [r for r in records if r["part"] == "train"]
    parts = [
        "## Photographs in folders: the ImageNet path, of a size that two cores can train\n\n50 classes of Tiny ImageNet, S = 2 "
        "in two processes; the setting is told in `benchmarks/imagenet.py`. It shows that the path works, not what ImageNet gives. "
        "Chance is 2 %; on 1,250 test images a share near 15 % is known to about 2 points, so that the rows cannot be told apart "
        "unless they are further from one another."
    ]
    if runs:
        epochs = min(len(r["loss_by_epoch"]) for r in runs)
        epochs -= epochs > 6  # what is beyond the sixth is the rest of a last round
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
                f"Ended by SIGTERM after round {r['interrupted_after']} of {r['rounds']} (status {r['status']}) and gone on with: the loss of "
                f"a round differs from that of the undisturbed run by at most {r['greatest_difference']:g}; the test accuracy "
                + ("is the same." if r["same_accuracy"] else "**differs**.")
            )
        if r["part"] == "input":
            read, trained = r["read_images_s"], r["trained_images_s"]
            rates = ", ".join(f"{read[n]:.0f} with {n}" for n in read)
            parts.append(
                f"Input pipeline, images/s read, decoded and augmented: {rates} processes ({read['1'] / trained:.1f} times with 1 what the "
                f"network trains on one thread, {trained:.0f} images/s). With both at once {r['both_images_s']:.0f} images/s; "
                f"{r['waited_share']:.1%} of the time went into waiting for data. Others were at work too: load {r['load']:g}."
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
    """Whether it is one of the first runs: these re-estimated statistics on images that were not augmented, and called it
    "recalibrate". Later ones read both, and say which is which."""
    return not any(way.startswith(PLAIN) for way in run["readings"])


def percent(run: Record, way: str, scale: str = "inclusion", num: int = 10000) -> float | None:
    """What `way` of reading gave; None where it was not read so."""
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
        "## Accuracy on CIFAR-10, of a width that two cores can train\n\nPercent of test images; the setting is told in "
        "`benchmarks/cifar10.py`. The word after the strategy is what becomes of the momentum at a synchronization. While it "
        "trains: the first 5,000 test images, BatchNorm statistics re-estimated on 5,000 training images (plain, or augmented as "
        "in training), inclusion scale. Processor seconds are those of training and synchronizing all workers.",
        table(head, rows),
        *equal_rounds(runs),
        provenance(*runs, n=lambda r: "n = 1 run of each row, so no spread is known"),
    ])  # fmt: skip


def equal_rounds(runs: list[Record]) -> list[str]:
    """ResIST against local SGD after equally many rounds, each with its most accurate run (averaged statistics)."""
    groups: dict[tuple[object, ...], dict[str, Record]] = {}
    for run in runs:
        value = percent(run, "average")
        best = groups.setdefault(tuple(run[key] for key in ("workers", "local_steps", "rounds")), {})
        known = best.get(run["strategy"])
        if value is not None and (known is None or value > (percent(known, "average") or 0.0)):
            best[run["strategy"]] = run
    said = []
    for best in groups.values():
        if len(best) == 2:
            ours, theirs = best["resist"], best["local_sgd"]
            points = (percent(ours, "average") or 0.0) - (percent(theirs, "average") or 0.0)
            said.append(
                f"After {ours['rounds']} rounds the best ResIST ({run_name(ours)}) is {abs(points):.2f} points "
                f"{'ahead of' if points > 0 else 'behind'} the best local SGD ({run_name(theirs)}), averaged statistics, in "
                f"{ours['train_cpu_s'] / theirs['train_cpu_s']:.2f} of its processor time."
            )
    return said


def readings(runs: list[Record]) -> str:
    columns = [
        (way, scale) for scale in SCALES for way in WAYS if any(percent(r, way, scale) is not None for r in runs)
    ]
    rows = [[run_name(run), *(show(percent(run, *column)) for column in columns)] for run in runs]
    better = 0
    for run in runs:
        anew = [value for way in ("recalibrate", PLAIN) if (value := percent(run, way)) is not None]
        averaged = percent(run, "average")
        better += averaged is not None and bool(anew) and averaged > max(anew)
    return "\n\n".join([
        "## How the full network is read\n\nPercent of the 10,000 test images at the end, by where BatchNorm's statistics come "
        "from: those of each test batch, re-estimated on the full network (on augmented images, or plain ones), or averaged over "
        "holders; with the inclusion scale on the chain's branches, and without.",
        table(["", *(f"{WAYS[way]}, {SCALES[scale]}" for way, scale in columns)], rows),
        f"With the scale, averaged statistics were better than re-estimated ones in {better} of {len(runs)} runs.",
        provenance(*runs, n=lambda r: "n = 1 run of each row, so no spread is known"),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
