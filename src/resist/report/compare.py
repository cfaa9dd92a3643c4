"""Several strategies under the same data, seeds and budget: a table, a picture, and the numbers behind both."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from resist.report.colors import STRATEGIES, color_of
from resist.runs.history import History

MARKS = {"resist": "o", "local_sgd": "s", "diloco": "^", "ddp": "D"}


# Options that do not set two runs of a strategy apart: where they ran, and what the mean is taken over.
BESIDE = {"seed", "out", "resume", "data_dir", "evaluations", "checkpoint_rounds"}


def compare(histories: Sequence[History]) -> dict[str, Any]:
    """A row for each strategy (see `labels`), means over its runs, ready for JSON. Equal accuracy: the least final one.

    Speed-ups are against local SGD with as many workers, where it is among them: round time, and its two parts on
    their own.
    """
    tested = [h for h in histories if h.tested]
    target = min((h.accuracies[-1] for h in tested), default=None)
    groups: dict[str, list[History]] = {}
    for label, history in zip(labels(histories), histories, strict=True):
        groups.setdefault(label, []).append(history)
    rows = [{"label": label, **_row(group, target)} for label, group in groups.items()]
    for row in rows:
        same = (r for r in rows if (r["strategy"], r["workers"]) == ("local_sgd", row["workers"]))
        base = next(same, None)
        row["speed_up"] = {
            kind: None if base is None or row[f"{kind}_s_per_step"] == 0
            else base[f"{kind}_s_per_step"] / row[f"{kind}_s_per_step"]
            for kind in ("time", "compute", "exchange")
        }  # fmt: skip
    return {"equal_accuracy": target, "rows": rows}


def labels(histories: Sequence[History]) -> list[str]:
    """For each run its strategy, and the options that other runs of it have differently, but for seeds."""
    options = [_options(history) for history in histories]
    found: list[str] = []
    for history, own in zip(histories, options, strict=True):
        name = history.config.method.strategy
        others = [o for h, o in zip(histories, options, strict=True) if h.config.method.strategy == name]
        differing = [key for key in own if any(other[key] != own[key] for other in others)]
        found.append(", ".join([name, *(f"{key.replace('_', ' ')} {own[key]}" for key in differing)]))
    return found


def _options(history: History) -> dict[str, Any]:
    data = history.config.to_json()
    flat = {name: value for part in ("network", "method", "optimization", "run") for name, value in data[part].items()}
    return {name: value for name, value in flat.items() if name not in BESIDE}


def colors(names: Sequence[str]) -> dict[str, str]:
    """A color for each label: that of its strategy where labels are just that."""
    unique = list(dict.fromkeys(names))
    if all(name in STRATEGIES for name in unique):
        return {name: STRATEGIES[name] for name in unique}
    return {name: color_of(number) for number, name in enumerate(unique)}


def _row(runs: Sequence[History], target: float | None) -> dict[str, Any]:
    final = [h.accuracies[-1] for h in runs if h.tested]
    positions = [(h, None if target is None else h.reached(target)) for h in runs]
    reached = [(h, i) for h, i in positions if i is not None]
    return {
        "strategy": runs[0].config.method.strategy,
        "workers": runs[0].workers,
        "runs": [str(h.path) for h in runs],
        "seeds": [h.config.run.seed for h in runs],
        "accuracy": mean(final) if final else None,
        "accuracy_sd": stdev(final) if len(final) > 1 else None,
        "rounds": mean(len(h.rounds) for h in runs),
        "steps": mean(h.steps[-1] for h in runs),
        "time_s": mean(h.seconds[-1] for h in runs),
        "compute_s": mean(h.total("compute") for h in runs),
        "wait_s": mean(h.total("wait") for h in runs),
        "exchange_s": mean(h.total("sync") for h in runs),
        "time_s_per_step": mean(h.seconds[-1] / h.steps[-1] for h in runs),
        "compute_s_per_step": mean(h.total("compute") / h.steps[-1] for h in runs),
        "exchange_s_per_step": mean(h.total("sync") / h.steps[-1] for h in runs),
        "bytes": mean(h.bytes[-1] for h in runs),
        "time_s_to_equal_accuracy": mean(h.seconds[i] for h, i in reached) if reached else None,
        "bytes_to_equal_accuracy": mean(h.bytes[i] for h, i in reached) if reached else None,
    }


def print_comparison(facts: dict[str, Any], console: Console) -> None:
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    target = facts["equal_accuracy"]
    equal = "equal" if target is None else f"to {100 * target:.1f}%"
    names = ("test %", "time s", "comp. s", "exch. s", "sent MB", f"s {equal}", f"MB {equal}", "speed-up")
    table.add_column("strategy", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in facts["rows"]:
        spread = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.2f}"
        accuracy = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}"
        table.add_row(
            row["label"], accuracy, f"{row['time_s']:.1f}", f"{row['compute_s']:.1f}",
            f"{row['exchange_s']:.1f}", f"{row['bytes'] / 1e6:.1f}", _or_dash(row["time_s_to_equal_accuracy"]),
            _or_dash(row["bytes_to_equal_accuracy"], 1e-6), _or_dash(row["speed_up"]["time"], digits=2),
        )  # fmt: skip
    console.print(table)
    console.print("speed-up: time of a step against local_sgd; time leaves evaluations out")


def _or_dash(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"


def draw_comparison(histories: Sequence[History], files: Sequence[Path]) -> None:
    """Accuracy against time, against bytes and against steps, one curve a run, into each of `files` (png, svg, pdf)."""
    from matplotlib.figure import Figure  # slow to import, and only needed here

    axes_of: tuple[tuple[str, Callable[[History], Sequence[float]]], ...] = (
        ("time without evaluations, s", lambda h: h.seconds),
        ("sent by all workers, MB", lambda h: [b / 1e6 for b in h.bytes]),
        ("optimizer steps of a worker", lambda h: h.steps),
    )
    names = labels(histories)
    of_label = colors(names)
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    all_axes = figure.subplots(1, 3, sharey=True)
    for axes, (label, values) in zip(all_axes, axes_of, strict=True):
        for name, h in zip(names, histories, strict=True):
            strategy = h.config.method.strategy
            x = [values(h)[i] for i in h.tested]
            axes.plot(
                x, [100 * a for a in h.accuracies], color=of_label[name], marker=MARKS.get(strategy, "."),
                markersize=4, linewidth=1.4, label=name.replace("_", " "),
            )  # fmt: skip
        axes.set_xlabel(label)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if label.startswith("sent"):
            axes.set_xscale("log")  # strategies differ by orders of magnitude
        else:
            axes.set_xlim(left=0)
    all_axes[0].set_ylabel("test accuracy, %")
    handles, texts = all_axes[0].get_legend_handles_labels()
    unique = dict(zip(texts, handles, strict=True))
    all_axes[-1].legend(unique.values(), unique.keys(), frameon=False, loc="lower right")
    for file in files:
        figure.savefig(file, dpi=200)
