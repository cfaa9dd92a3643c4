"""The tables and texts of a report, shared by HTML and Markdown."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from resist.planning.methods import METHODS
from resist.report.aggregate import all_reduced, holdings, traffic
from resist.report.colors import PHASES
from resist.report.units import amount, duration
from resist.runs.history import History

Rows = list[tuple[str, str]]
ENDS = {
    "finished": "finished",
    "interrupted": "interrupted; can be resumed",
    "failed": "failed",
    "unfinished": "not finished",
}


def percent(value: float | None) -> str:
    return "not tested" if value is None else f"{100 * value:.2f} %"


def sentence(history: History) -> str:
    """A sentence on the run: model, data, strategy, workers, rounds and steps."""
    c, rounds = history.config, history.rounds[-1]["round"]
    each = f"{c.method.local_steps} local steps" if c.method.local_steps != 1 else "one local step"
    return (
        f"{c.network.model} on {c.network.data}, trained by {METHODS[c.method.strategy].label} with "
        f"{c.method.workers} worker{'s' if c.method.workers > 1 else ''} and {each} a round: {rounds:,} rounds, "
        f"{history.steps[-1]:,} steps of each worker."
    )


def headline(history: History) -> Rows:
    """The most important numbers of a run."""
    images = sum(record["images"] for record in history.rounds)
    rows = [("test accuracy", percent(history.accuracies[-1] if history.tested else None))]
    best = max(history.accuracies, default=0.0)
    if history.tested and best > history.accuracies[-1]:
        rows.append(("best accuracy", percent(best)))
    scores = next((record["scores"] for record in reversed(history.rounds) if record["scores"]), {})
    rows += [(f"test {name}", percent(value)) for name, value in list(scores.items())[1:5]]
    loss = history.rounds[-1]["loss"]
    rows += [("training loss, last round", f"{loss:.4f}")] if math.isfinite(loss) else []
    rows.append(("time, without evaluations", duration(history.seconds[-1])))
    if images and history.seconds[-1] > 0:
        rows.append(("images per second", f"{images / history.seconds[-1]:,.0f}"))
    rows.append(("sent by all workers", amount(history.bytes[-1])))
    held = [f"{len(h)} of {f.blocks}" for f in holdings(history)[:1] for h in _last_plan(history, f.chain)]
    if held:
        rows.append(("blocks held by a worker", " · ".join(dict.fromkeys(held))))
    return rows


def notes(history: History) -> list[str]:
    """Notes to read before the numbers: an unfinished run, missing files, dropped workers."""
    texts = list(history.notes)
    planned = history.state.get("rounds")
    if history.ended != "finished":
        of = f" of {planned}" if isinstance(planned, int) else ""
        texts.insert(0, f"The run is not complete: {history.rounds[-1]['round']}{of} rounds are done.")
    dropped = sum(record["dropped"] > 0 for record in history.rounds)
    if dropped:
        rounds = f"{dropped} round{'s' * (dropped > 1)}"
        texts.append(f"In {rounds} workers were left out because their loss or weights became NaN or inf.")
    if history.ended == "failed" and history.state.get("error"):
        texts.insert(1, str(history.state["error"]))
    return texts


def _last_plan(history: History, chain: str) -> tuple[tuple[int, ...], ...]:
    return next(record["plan"][chain] for record in reversed(history.rounds) if record["plan"].get(chain))


def repeat(history: History) -> list[str]:
    """The commands that reproduce the run."""
    commit = history.environment.get("commit")
    checkout = [f"git checkout {shlex.quote(str(commit).removesuffix('-dirty'))}"] if commit else []
    return [*checkout, shlex.join(["resist", "train", "--config", str(history.path.absolute() / "config.json")])]


def options(history: History) -> Rows:
    """Every option of the run, by name."""
    rows: Rows = []
    for part, values in history.given.items():
        for name, value in values.items():
            shown = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            rows.append((f"{part}.{name}", shown))
    return rows


def environment(history: History) -> Rows:
    """Versions, commit and hardware of the run."""
    rows: Rows = []
    for name, value in history.environment.items():
        if name == "resumed" and isinstance(value, dict):
            rows += [(f"resumed: {key}", _shown(entry)) for key, entry in value.items()]
        else:
            rows.append((name, _shown(value)))
    commit = str(history.environment.get("commit") or "")
    if commit.endswith("-dirty"):
        rows.append(("remark", "the source had changes that were not committed"))
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return shlex.join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


def seconds_by_phase(history: History) -> Rows:
    """Seconds of each phase over the whole run, and its share of all."""
    phases = phases_of(history)
    total = sum(map(history.total, phases)) or 1.0
    return [(phase, f"{duration(history.total(phase))} ({history.total(phase) / total:.0%})") for phase in phases]


def phases_of(history: History) -> list[str]:
    """The phases that seconds were recorded for, in the order of a round."""
    recorded = dict.fromkeys(phase for record in history.rounds for phase in record["seconds"])
    return [phase for phase in PHASES if phase in recorded] + [phase for phase in recorded if phase not in PHASES]


def worker_rows(history: History) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of the workers: blocks held, time, bytes sent and received."""
    sent, _ = traffic(history)
    workers, shared = len(sent), all_reduced(history)
    chains = holdings(history)
    seconds = [0.0] * workers
    for record in history.rounds:
        for worker in record["workers"]:
            if 0 <= worker.get("worker", -1) < workers:
                seconds[int(worker["worker"])] += worker.get("compute_s", 0.0)
    head = ["worker", *(f"blocks of {c.chain}" for c in chains), "computing", "sent", "received"]
    rows: list[list[str]] = []
    for worker in range(workers):
        held = [f"{sum(c.shares[worker]):.1f}" if worker < c.workers else "" for c in chains]
        received = sum(row[worker] for row in sent)
        traffic_cells = [amount(sum(sent[worker]) + shared), amount(received + shared)]
        rows.append([str(worker), *held, duration(seconds[worker]), *traffic_cells])
    return head, rows


def comparison_rows(comparison: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of a comparison, see `resist.report.compare.compare`."""
    target = comparison["equal_accuracy"]
    equal = "equal accuracy" if target is None else f"{100 * target:.2f} %"
    head = ["", "runs", "test %", "steps", "time", "compute", "wait", "exchange", "sent"]
    head += [f"time to {equal}", f"sent to {equal}", "speed‑up", "in compute", "in exchange"]
    return head, [_comparison_row(row) for row in comparison["rows"]]


def _comparison_row(row: dict[str, Any]) -> list[str]:
    spread = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.2f}"
    times = [duration(row[key]) for key in ("time_s", "compute_s", "wait_s", "exchange_s")]
    reached, sent = row["time_s_to_equal_accuracy"], row["bytes_to_equal_accuracy"]
    speed_ups = [row["speed_up"][part] for part in ("time", "compute", "exchange")]
    accuracy = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}"
    return [
        *(row["label"], str(len(row["runs"])), accuracy, f"{row['steps']:,.0f}", *times, amount(row["bytes"])),
        *("–" if reached is None else duration(reached), "–" if sent is None else amount(sent)),
        *("–" if speed_up is None else f"{speed_up:.2f} x" for speed_up in speed_ups),
    ]


COMPARISON_NOTE = (
    "Means over the runs of a row, ± their standard deviation. Times do not include evaluations. Speed-up: time of a "
    "step of local SGD with as many workers, divided by that of the row; also for compute and exchange separately. "
    "Equal accuracy: the smallest of the final ones."
)
WORKERS_NOTE = (
    "Blocks: mean over the rounds. Sent and received: blocks and optimizer state from worker to worker, and a worker's "
    "part of the all-reduces."
)
READINGS_NOTE = "Test accuracy by the scale of the chain's branches, and by the source of BatchNorm's statistics."


def reading_rows(history: History) -> Rows:
    """Test accuracy for each way in which the full network was read."""
    return [(name, percent(value)) for name, value in history.readings.items()]


def names_of(histories: Sequence[History]) -> list[str]:
    """A short name for each run: its directory, with as much of the path as makes the names different."""
    paths = [history.path.absolute() for history in histories]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]
