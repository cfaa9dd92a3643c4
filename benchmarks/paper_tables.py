"""The paper's tables next to ours: bytes of a synchronization and seconds of a round. Used by tables.py."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise

from torch import nn

import resist
from page_parts import Record, fill, provenance, reached, rows, spread
from resist.blocks.chains import Chain, choose_chains
from resist.cost import Traffic
from resist.cost.footprint import build_on_meta, sgd
from resist.cost.sizes import sizes_of
from resist.cost.states import StateMeter
from resist.cost.traffic import Sizes, mean_traffic, paper_bytes, round_traffic
from resist.models import build
from resist.planning.methods import build_strategy
from resist.subnet.batchnorm import use_batch_statistics
from resist.sync.local import Local

Build = Callable[[], nn.Module]
PAPER_GB = {("local_sgd", 2): 0.662, ("local_sgd", 4): 1.325, ("local_sgd", 8): 2.649,
            ("resist", 2): 0.454, ("resist", 4): 0.720, ("resist", 8): 1.289}  # fmt: skip
# Table 3: data set, S, seconds of local SGD and of ResIST.
PAPER_S = (("CIFAR-10", 4, 5486, 1532), ("CIFAR-10", 8, 10072, 2671),
           ("CIFAR-100", 4, 5528, 1545), ("CIFAR-100", 8, 10058, 2639))  # fmt: skip
MAX_GB, MAX_LINK = 0.47, 1.15  # targets at S = 4: GB in a round; the busiest link over a run, relative to the mean
MAX_WIRE_ERROR = 1.0  # percent
LEVEL = 0.05  # two round times that differ by less than this share are called equal, as in `resist cost`
ROUNDS, COUNTED_ROUNDS, COUNTED_WORKERS = 50, 2, (2, 4)
NAMES = {"local_sgd": "local SGD", "resist": "ResIST"}
SEED = 0


def builder(record: Record) -> Build:
    return partial(
        build, record["model"], num_classes=record["num_classes"], width=record["width"],
        depths=tuple(record.get("sections", ())),
    )  # fmt: skip


def strategy_of(name: str, workers: int, state: str) -> resist.Strategy:
    return build_strategy(name, workers, 1, optimizer_state=state)


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
    template, chains, sizes = _measured(build, statistics)
    plans = [strategy.plan(chains, seed=SEED, round=number) for number in range(rounds + 1)]
    state = StateMeter(sgd).sizes(template, chains, [plans[0].capacities(w) for w in range(strategy.workers)])
    run = [round_traffic(sizes, now, then, strategy=strategy, state=state) for now, then in pairwise(plans)]
    paper = paper_bytes(sizes, plans[0], workers=strategy.workers)
    return Formula(mean_traffic(run, strategy.workers, paper), [sum(round_.bytes.values()) for round_ in run])


@cache
def _measured(build: Build, statistics: bool) -> tuple[nn.Module, tuple[Chain, ...], Sizes]:
    """Return a network on the meta device, its chains, and the sizes of their parts."""
    template = build_on_meta(build)
    if not statistics:
        use_batch_statistics(template)
    chains = choose_chains(template)
    return template, chains, sizes_of(template, chains)


def count_bytes(build: Build, strategy: resist.Strategy, rounds: int) -> list[int]:
    """Return the bytes that a job counts in each of its first `rounds` synchronizations.

    One process hosts all workers. Nothing is trained, so no optimizer has state to send: `strategy` must reset it.
    """
    assert strategy.optimizer_state == "reset", "without an optimizer there is no state to send"
    job = resist.Job(build, strategy, seed=SEED, batchnorm="batch", transport=Local(strategy.workers), example=False)
    job.transport.take()  # discards the messages of building the job
    counted: list[int] = []
    for _ in range(rounds):
        job.synchronize()
        num_bytes = job.transport.take()["bytes"]
        assert isinstance(num_bytes, dict)
        counted.append(sum(num_bytes.values()))
    return counted


def traffic(network: Record, wire: list[Record]) -> str:
    """Write the section on the bytes of a synchronization.

    Args:
        network: The network of the table: `model`, `width` and `num_classes`.
        wire: Lines of wire.jsonl with this network.
    """
    make, cells, links, exact = builder(network), [], [], True
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
        reset, totals = sent["reset"].mean, [formula_.mean.total_bytes for formula_ in sent.values()]
        cells.append([
            f"{NAMES[name]}, S = {workers}", f"{PAPER_GB[name, workers]:.3f}", f"{reset.paper_bytes / 1e9:.4f}",
            *(f"{total / 1e9:.3f}" for total in totals), counted, f"{reset.link_ratio:.3f}",
        ])  # fmt: skip
    four, full = (formula(make, strategy_of(name, 4, "reset"), ROUNDS) for name in ("resist", "local_sgd"))
    statistics = formula(make, strategy_of("resist", 4, "reset"), ROUNDS, statistics=True)
    averaged = formula(make, strategy_of("resist", 4, "average"), ROUNDS)
    gb = four.mean.total_bytes / 1e9
    return fill(
        "traffic", **network, rounds=ROUNDS, counted_rounds=COUNTED_ROUNDS,
        exact=fill("traffic-exact" if exact else "traffic-differs"), rows=rows(cells),
        max_gb=MAX_GB, reached=reached(gb <= MAX_GB), gb=gb, paper_gb=PAPER_GB["resist", 4],
        full_gb=full.mean.total_bytes / 1e9, largest_gb=max(four.rounds) / 1e9,
        above=sum(num_bytes > MAX_GB * 1e9 for num_bytes in four.rounds),
        statistics_gb=statistics.mean.total_bytes / 1e9,
        max_link=MAX_LINK, link_reached=reached(max(links) <= MAX_LINK), link=max(links),
        average_share=averaged.mean.total_bytes / full.mean.total_bytes, wire=on_wire(wire) if wire else "",
    )  # fmt: skip


def on_wire(wire: list[Record]) -> str:
    """Write the table of the bytes that the interfaces of emulated hosts counted."""
    cells, errors = [], []
    for record in wire:
        for m in record["methods"]:
            payload, source = (m["ledger_bytes"], "counted") if m["ledger_bytes"] else (m["formula_bytes"], "formula")
            sent = sum(m["wire_bytes"])
            errors += [abs(100 * (sent / sum(payload) - 1))] if m["ledger_bytes"] else []
            compared = ["", ""]
            if payload:
                compared = [f"{sum(payload) / m['n'] / 1e9:.4f} ({source})", f"{sent / sum(payload):.4f}"]
            cells.append([f"S = {record['workers']}, {record['rate']}, {short(m['method'])}",
                          f"{sent / m['n'] / 1e9:.4f}", *compared, f"{m['busiest_host_over_mean']:.3f}"])  # fmt: skip
    target = ""
    if errors:
        error, bound = max(errors), MAX_WIRE_ERROR
        target = fill("wire-target", max_error=bound, reached=reached(error <= bound), error=error)
    return fill("wire", rows=rows(cells), target=target, provenance=provenance(*wire, n="n-wire"))


def short(method: str) -> str:
    """Return the name of a method without the names of its options."""
    return ", ".join(part.strip() for part in method.replace("optimizer_state=", "").split(","))


def round_times(wire: list[Record]) -> str:
    """Write the section on the seconds of a round."""
    published = [[f"{data}, S = {s}", base, ours, f"{base / ours:.2f}"] for data, s, base, ours in PAPER_S]
    settings = "\n\n".join(_rounds_of(record) for record in wire)
    return fill("times", rows=rows(published), level=LEVEL, settings=settings)


def _rounds_of(record: Record) -> str:
    methods = {m["method"]: m for m in record["methods"]}
    base = next((m for name, m in methods.items() if name.startswith("local_sgd")), None)
    cells = []
    for name, m in methods.items():
        parts = ("compute_s", "exchange_s", "round_s")
        row = [short(name), *(f"{m[part]['median']:.2f}" for part in parts), f"{spread(m['round_s']['all']):.2f}"]
        for part in ("round_s", "compute_s", "exchange_s"):
            seconds = m[part]["median"]
            row.append(f"{base[part]['median'] / seconds:.2f}" if base is not None and seconds else "")
        cells.append(row)
    device = record["compute_note"] or "no device named"
    compute = fill("times-slept", **record, device=device) if record["compute_s"] else fill("times-real")
    compared = base is not None and any(name.startswith("resist") for name in methods)
    asterisk = compared and "published" in methods and bool(record["compute_s"])
    return fill(
        "times-setting", **record, rows=rows(cells), compute=compute,
        gains=_gains(record, methods, base) if base is not None else "",
        published=fill("times-published") if asterisk else "",
        provenance=provenance(record, n="n-times"),
    )  # fmt: skip


def _gains(record: Record, methods: dict[str, Record], base: Record) -> str:
    """Compare each ResIST row with the other methods: slower, equal, faster, and the seconds that it saves."""
    lines = []
    for name, method in methods.items():
        if not name.startswith("resist"):
            continue
        saved = {part: base[part]["median"] - method[part]["median"] for part in ("compute_s", "exchange_s")}
        names = {other: short(other) for other in methods}
        ratios = {other: m["round_s"]["median"] / method["round_s"]["median"] for other, m in methods.items()
                  if not other.startswith("resist")}  # fmt: skip
        published = methods.get("published")
        if published is not None and record["compute_s"]:
            # wire.py sleeps a full step for methods that keep the full network; the paper's workers compute less
            seconds = method["compute_s"]["median"] + published["exchange_s"]["median"]
            ratios["published"] = seconds / method["round_s"]["median"]
            names["published"] = "published*"
        ranked = sorted(ratios.items(), key=lambda item: item[1])
        slower = [short(other) for other, ratio in ranked if ratio < 1 / (1 + LEVEL)]
        equal = [short(other) for other, ratio in ranked if 1 / (1 + LEVEL) <= ratio < 1 + LEVEL]
        texts = {
            "slower": ", ".join(slower) or "none",
            "equal": ", ".join(equal) or "none",
            "ratios": ", ".join(f"{names[other]} {ratio:.2f}" for other, ratio in ranked),
        }
        lines.append(fill("times-gain", name=short(name), **texts, **saved))
    return "\n".join(lines)
