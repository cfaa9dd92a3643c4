"""The tables and texts of a report, shared by HTML and Markdown."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import stdev
from typing import Any

from resist.planning.methods import METHODS
from resist.report.aggregate import all_reduced, holdings, traffic
from resist.report.colors import PHASES
from resist.report.compare import score_name
from resist.report.provenance import Rows
from resist.report.units import amount, duration
from resist.runs.history import History
from resist.runs.records import EVALUATE, START_UP

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
    score = score_name(history)
    rows = [(f"test {score}", percent(history.accuracies[-1] if history.tested else None))]
    best = max(history.accuracies, default=0.0)
    if history.tested and best > history.accuracies[-1]:
        rows.append((f"best {score}", percent(best)))
    scores = next((record["scores"] for record in reversed(history.rounds) if record["scores"]), {})
    rows += [(f"test {name}", percent(value)) for name, value in list(scores.items())[1:5]]
    loss = history.rounds[-1]["loss"]
    rows += [("training loss, last round", f"{loss:.4f}")] if math.isfinite(loss) else []
    rows.append(("wall clock", wall_clock(history)))
    rows.append(("time, without evaluations", duration(history.seconds[-1])))
    if images and history.seconds[-1] > 0:
        rows.append(("images per second", f"{images / history.seconds[-1]:,.0f}"))
    rows.append(("sent by all workers", amount(history.bytes[-1])))
    if len(kinds := bytes_by_kind(history)) > 1:
        rows.append(("… of which", " · ".join(f"{kind} {amount(num_bytes)}" for kind, num_bytes in kinds.items())))
    if (local_sgd := local_sgd_bytes(history)) is not None:
        rows.append(("local SGD would send", amount(local_sgd)))
    if not METHODS[history.config.method.strategy].build(1).every_step:
        rows.append(("wire", history.config.method.wire_text))
        rows.append(("synchronizing", _synchronizing(history)))
    held = [f"{len(h)} of {f.blocks}" for f in holdings(history)[:1] for h in _last_plan(history, f.chain)]
    if held:
        rows.append(("blocks held by a worker", " · ".join(dict.fromkeys(held))))
    return rows


def bytes_by_kind(history: History) -> dict[str, int]:
    """Bytes that all workers sent in training, by traffic kind, as they were on the wire."""
    total: Counter[str] = Counter()
    for record in history.rounds:
        total.update(record["bytes"])
    return {kind: num_bytes for kind, num_bytes in total.items() if num_bytes and kind != EVALUATE}


def _synchronizing(history: History) -> str:
    """Seconds in which training stood still for synchronizations, and their share."""
    seconds = history.total("sync")
    share = f" ({seconds / history.seconds[-1]:.0%} of the time)" if history.seconds[-1] > 0 else ""
    fragments = "; waiting for fragments counts as training" if history.config.method.fragments else ""
    return f"{duration(seconds)}{share}{fragments}"


def local_sgd_bytes(history: History) -> int | None:
    """Weights that local SGD would have sent in the same rounds; None for a run that holds all, or was not recorded."""
    weights = [record["weights"] for record in history.rounds]
    if not all({"all", "largest", "local_sgd_bytes"} <= each.keys() for each in weights):
        return None
    if weights[-1]["largest"] >= weights[-1]["all"]:
        return None
    return sum(each["local_sgd_bytes"] for each in weights)


def local_sgd_sentence(history: History) -> list[str]:
    """A sentence on what local SGD would have held and sent; empty where that is unknown or the run holds all."""
    local_sgd, weights = local_sgd_bytes(history), history.rounds[-1]["weights"]
    if local_sgd is None:
        return []
    wire = " in the same wire format" if history.config.method.wire_text != "fp32" else ""
    ratio = f" ({local_sgd / history.bytes[-1]:.2f} times as much)" if history.bytes[-1] else ""
    return [
        f"The largest worker held {weights['largest'] / weights['all']:.0%} of the network's {weights['all']:,} "
        f"weights, and all workers together sent {amount(history.bytes[-1])}. With local SGD each worker would hold "
        f"all weights, and they would have sent {amount(local_sgd)} of weights in the same rounds{wire}{ratio}."
    ]


def members_sentence(history: History) -> list[str]:
    """A sentence on members that have come and gone; empty where none have."""
    generations = history.generations
    if not generations:
        return []
    left, came = (sum(len(generation[name]) for generation in generations) for name in ("left", "came"))
    pause = duration(sum(generation["pause_s"] for generation in generations))
    return [
        f"The members changed {_often(len(generations))} ({left} left, {came} came), which took {pause} in all; steps "
        f"are counted as {history.workers} workers would have done them."
    ]


def member_rows(history: History) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of the changes of members."""
    head = ["generation", "after round", "left", "came", "workers", "round repeated", "pause"]
    return head, [
        [
            *(str(generation[name]) for name in ("number", "round")),
            *(", ".join(map(str, generation[name])) or "–" for name in ("left", "came")),
            str(generation["workers"]), "yes" if generation["repeated"] else "no", duration(generation["pause_s"]),
        ]
        for generation in history.generations
    ]  # fmt: skip


def _often(times: int) -> str:
    return {1: "once", 2: "twice"}.get(times, f"{times} times")


def wall_clock(history: History) -> str:
    """What the user waited, and its parts."""
    parts = ", ".join(f"{part} {duration(seconds)}" for part, seconds in history.wall.items() if seconds)
    return f"{duration(sum(history.wall.values()))} ({parts})"


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


def wall_parts(history: History) -> list[tuple[str, float]]:
    """Parts of the wall clock of a run: the start, where it was recorded, and each phase of its rounds, in seconds."""
    start_up = history.wall[START_UP]
    parts = {phase: history.total(phase) for phase in phases_of(history)}
    if "checkpoint" in parts:  # the last one is completed after the last record
        parts["checkpoint"] = max(parts["checkpoint"], history.wall["checkpoints"])
    return [*([(START_UP, start_up)] if start_up else []), *parts.items()]


def seconds_by_phase(history: History) -> Rows:
    """Seconds of each part of the wall clock, and its share of all."""
    parts = wall_parts(history)
    total = sum(seconds for _, seconds in parts)
    rows = [(part, f"{duration(seconds)} ({seconds / (total or 1.0):.0%})") for part, seconds in parts]
    return [*rows, (wall_name(history), duration(total))]


def wall_name(history: History) -> str:
    """The name of the sum of `wall_parts`: older runs have no record of their start."""
    return "wall clock" if history.wall[START_UP] else "all rounds"


def tests_sentence(history: History) -> str:
    """A sentence on a run that has no curve of its accuracy."""
    if not history.tested:
        return "The full network was not tested."
    number = history.rounds[history.tested[0]]["round"]
    return f"The full network was tested once, after round {number}; there is a curve where num_evals is 2 or more."


def tester_sentence(history: History) -> list[str]:
    """A sentence on who tested the full network; empty where that was not recorded."""
    choices = [record["evaluation"] for record in history.rounds if record["evaluation"].get("by") in ("all", "one")]
    if not choices:
        return []
    who = (
        "All processes tested the full network, each a share of the images"
        if choices[-1]["by"] == "all"
        else "The process of worker 0 tested the full network"
    )
    return [f"{who} ({choices[-1].get('reason', 'no reason was recorded')})."]


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
    """Head and rows of the table of a comparison (see `resist.report.compare.compare`), a column for each label.

    The speed-up comes first, so that a narrow screen shows it.
    """
    rows, target = comparison["rows"], comparison["equal_accuracy"]
    wall = "wall clock" if all(row["start_up_s"] for row in rows) else "all rounds"
    lines: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("speed‑up", lambda row: _times(row["speed_up"]["time"])),
        ("… in compute", lambda row: _times(row["speed_up"]["compute"])),
        ("… in exchange", lambda row: _times(row["speed_up"]["exchange"])),
        ("test " + " / ".join(dict.fromkeys(row["score"] for row in rows)), _accuracy),
        ("sent by all workers", lambda row: amount(row["bytes"])),
        ("time", lambda row: _spread(row["time_s"], row["time_s_by_run"])),
        *((name, lambda row, key=f"{name}_s": duration(row[key])) for name in ("compute", "wait", "exchange")),
        (wall, lambda row: duration(row["wall_s"])),
        ("steps of a worker", lambda row: f"{row['steps']:,.0f}"),
        ("runs", lambda row: str(len(row["runs"]))),
        ("seeds", lambda row: ", ".join(map(str, row["seeds"]))),
    ]
    if target is not None:
        to = f"to {100 * target:.2f} %"
        lines.insert(6, (f"time {to}", lambda row: _if(row["time_s_to_equal_accuracy"], duration)))
        lines.insert(7, (f"sent {to}", lambda row: _if(row["bytes_to_equal_accuracy"], amount)))
    if all(row["speed_up"]["time"] is None for row in rows):
        lines = lines[3:]
    return ["", *(row["label"] for row in rows)], [[name, *map(text, rows)] for name, text in lines]


def _times(ratio: float | None) -> str:
    return _if(ratio, lambda value: f"{value:.2f} x")


def _if(value: float | None, text: Callable[[float], str]) -> str:
    return "–" if value is None else text(value)


def _accuracy(row: dict[str, Any]) -> str:
    spread = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.2f}"
    return "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %{spread}"


def _spread(mean: float, values: Sequence[float]) -> str:
    """A duration, ± its standard deviation where there are several."""
    if len(values) < 2:
        return duration(mean)
    spread = stdev(values)
    return f"{duration(mean)} ± {f'{spread:.1f} s' if mean >= 1 and spread < 100 else duration(spread)}"


COMPARISON_NOTE = (
    "Means over the runs of a column, ± their standard deviation. Times do not include evaluations, but for the "
    "wall clock. Speed-up: time of a step of local SGD with as many workers, divided by that of the column."
)
WORKERS_NOTE = (
    "Blocks: mean over the rounds. Sent and received: blocks and optimizer state from worker to worker, and a worker's "
    "part of the all-reduces."
)
MEMBERS_NOTE = "Processes that left and came, by the numbers that they were given as they came, from 1."
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
