"""Comparison of several runs: a row of numbers for each strategy, and the labels and colors of its runs."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from resist.planning.methods import BASELINE, METHODS
from resist.report.colors import STRATEGIES, color_of
from resist.runs.history import History
from resist.runs.records import START_UP

# Options that do not distinguish two runs of a strategy: where they ran, and what the mean is taken over.
IGNORED = {"seed", "out", "resume", "data_dir", "num_evals", "checkpoint_rounds"}

# Options that distinguish runs of different strategies, too.
WIRE = {"wire", "wire_parts", "fragments", "delay"}


def compare(histories: Sequence[History]) -> dict[str, Any]:
    """Compare runs.

    Args:
        histories: The runs, each with at least one round.

    Returns:
        A table, ready for JSON. "rows": one for each label (see `labels`), with means over its runs; the values of
        each run, in the order of "seeds", are under names that end in "_by_run". "equal_accuracy": the smallest final
        accuracy, or None where no run was tested. "speed_up" in each row: the time of a step of local SGD with as many
        workers, divided by that of the row; None where local SGD is not among the runs.
    """
    tested = [h for h in histories if h.tested]
    target = min((h.accuracies[-1] for h in tested), default=None)
    groups: dict[str, list[History]] = {}
    for label, history in zip(labels(histories), histories, strict=True):
        groups.setdefault(label, []).append(history)
    rows = [{"label": label, **_row(group, target)} for label, group in groups.items()]
    for row in rows:
        base = baseline_of(row, rows)
        row["speed_up"] = {
            part: None if base is None or row[f"{part}_s_per_step"] == 0
            else base[f"{part}_s_per_step"] / row[f"{part}_s_per_step"]
            for part in ("time", "compute", "exchange")
        }  # fmt: skip
    return {"equal_accuracy": target, "rows": rows}


def baseline_of(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The first row of local SGD with as many workers, if possible with the same wire, or None."""
    same = [r for r in rows if (r["strategy"], r["workers"]) == (BASELINE, row["workers"])]
    return next((r for r in same if r["wire"] == row["wire"]), same[0] if same else None)


def labels(histories: Sequence[History]) -> list[str]:
    """A label for each run: its strategy, and the options that differ among the runs of that strategy.

    Where runs differ in their wire, the label names it, whatever their strategies: fewer bytes are then not the
    strategy's doing alone. Runs that differ in their seeds alone have the same label.
    """
    all_options = [_options(history) for history in histories]
    names = [history.config.method.strategy for history in histories]
    texts: list[str] = []
    for name, options in zip(names, all_options, strict=True):
        others = [o for other, o in zip(names, all_options, strict=True) if other == name]
        wired = [o for other, o in zip(names, all_options, strict=True) if not _every_step(other)]
        differing = [
            key
            for key in options
            for among in (wired if key in WIRE and not _every_step(name) else others,)
            if any(other[key] != options[key] for other in among)
        ]
        values = {key: "default" if options[key] is None else options[key] for key in differing}
        texts.append(", ".join([name, *(f"{key.replace('_', ' ')} {value}" for key, value in values.items())]))
    return texts


def _every_step(strategy: str) -> bool:
    """True for a strategy that averages gradients in every step, and has no wire formats."""
    return METHODS[strategy].build(1).every_step


def _options(history: History) -> dict[str, Any]:
    data = history.config.to_json()
    flat = {name: value for part in ("network", "method", "optimization", "run") for name, value in data[part].items()}
    return {name: value for name, value in flat.items() if name not in IGNORED}


def colors(names: Sequence[str]) -> dict[str, str]:
    """A color for each label: that of the strategy where all labels are names of strategies."""
    unique = list(dict.fromkeys(names))
    if all(name in STRATEGIES for name in unique):
        return {name: STRATEGIES[name] for name in unique}
    return {name: color_of(number) for number, name in enumerate(unique)}


def score_name(history: History) -> str:
    """The name of the score that the network was tested by: "accuracy", or what the task calls its first score."""
    return next((name for record in reversed(history.rounds) for name in record["scores"]), "accuracy")


def _row(runs: Sequence[History], target: float | None) -> dict[str, Any]:
    final = [h.accuracies[-1] for h in runs if h.tested]
    positions = [(h, None if target is None else h.reached(target)) for h in runs]
    reached = [(h, i) for h, i in positions if i is not None]
    return {
        "strategy": runs[0].config.method.strategy,
        "wire": None if _every_step(runs[0].config.method.strategy) else runs[0].config.method.wire_text,
        "workers": runs[0].workers,
        "runs": [str(h.path) for h in runs],
        "seeds": [h.config.run.seed for h in runs],
        "score": score_name(runs[0]),
        "accuracy": mean(final) if final else None,
        "accuracy_sd": stdev(final) if len(final) > 1 else None,
        "accuracy_by_run": [h.accuracies[-1] if h.tested else None for h in runs],
        "rounds": mean(len(h.rounds) for h in runs),
        "steps": mean(h.steps[-1] for h in runs),
        "time_s": mean(h.seconds[-1] for h in runs),
        "time_s_by_run": [h.seconds[-1] for h in runs],
        "start_up_s": mean(h.wall[START_UP] for h in runs),
        "wall_s": mean(sum(h.wall.values()) for h in runs),
        "compute_s": mean(h.total("compute") for h in runs),
        "wait_s": mean(h.total("wait") for h in runs),
        "exchange_s": mean(h.total("sync") for h in runs),
        "time_s_per_step": mean(h.seconds[-1] / h.steps[-1] for h in runs),
        "time_s_per_step_by_run": [h.seconds[-1] / h.steps[-1] for h in runs],
        "compute_s_per_step": mean(h.total("compute") / h.steps[-1] for h in runs),
        "wait_s_per_step": mean(h.total("wait") / h.steps[-1] for h in runs),
        "exchange_s_per_step": mean(h.total("sync") / h.steps[-1] for h in runs),
        "bytes": mean(h.bytes[-1] for h in runs),
        "bytes_per_step": mean(h.bytes[-1] / h.steps[-1] for h in runs),
        "time_s_to_equal_accuracy": mean(h.seconds[i] for h, i in reached) if reached else None,
        "bytes_to_equal_accuracy": mean(h.bytes[i] for h, i in reached) if reached else None,
    }
