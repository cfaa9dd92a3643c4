"""Records of metrics.jsonl: one line for each round, its checked form, and what in it counts as training.

The reader, the live display, the limits of `RunConfig.until`, the loggers and the reports all use these functions, so
that they agree.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Record = dict[str, Any]

# The phases of a round that belong to training. Evaluations and checkpoints are counted apart.
TRAINING_PHASES = ("compute", "wait", "sync")
# The parts of the wall clock of a run, and the phases of a round in each. The start of the command until its first step
# is not in a round.
START_UP = "start-up"
PARTS = {
    "training": ("compute", "sync"),
    "waiting": ("wait",),
    "evaluation": ("evaluate",),
    "checkpoints": ("checkpoint",),
}
# The traffic kind that does not belong to training: blocks sent to assemble the full network.
EVALUATE = "evaluate"
ALLREDUCED = ("shared", "gradients")  # traffic kinds that no pair of workers is recorded for
MAX_BLOCKS = 10_000  # a picture is drawn for each block
DAMAGE = (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError)


def training_seconds(record: Mapping[str, Any]) -> float:
    """Seconds of a round that belong to training."""
    return sum(record["seconds"].get(phase, 0.0) for phase in TRAINING_PHASES)


def wall_parts(records: Iterable[Mapping[str, Any]], closing_s: float = 0.0) -> dict[str, float]:
    """Seconds of the wall clock of a run, in all its parts; their sum is what the user waited.

    Args:
        records: its records. Those of a run that was continued have a start-up for each time.
        closing_s: seconds from the last record to the end, see `resist.runs.directory.Run.state`.
    """
    parts = {START_UP: 0.0} | dict.fromkeys(PARTS, 0.0)
    for record in records:
        parts[START_UP] += record.get("startup_s", 0.0)
        for part, phases in PARTS.items():
            parts[part] += sum(record["seconds"].get(phase, 0.0) for phase in phases)
    parts["checkpoints"] += closing_s
    return parts


def closing_seconds(state: Mapping[str, Any]) -> float:
    """Seconds from the last record of a run to its end, from the content of state.json."""
    value = state.get("closing_s")
    return float(value) if isinstance(value, int | float) and 0 <= value < math.inf else 0.0


def training_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a round that belong to training, sent by all workers: all traffic kinds but "evaluate"."""
    return sum(num for traffic_kind, num in record["bytes"].items() if traffic_kind != EVALUATE)


def allreduced_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a round that all workers together sent in all-reduces."""
    return sum(record["bytes"].get(traffic_kind, 0) for traffic_kind in ALLREDUCED)


def num_workers(record: Mapping[str, Any], usual: int) -> int:
    """Number of workers that the steps of a record count for: those that are there when its round has ended.

    Args:
        record: the record, as `clean` returns it.
        usual: the number if the record does not say.
    """
    generations = record.get("generations")
    return (generations[-1]["workers"] if generations else len(record["workers"])) or usual


def parse_record(line: bytes) -> Record | None:
    """The record of one line of metrics.jsonl, or None where the line is damaged."""
    try:
        return clean(json.loads(line))
    except DAMAGE:
        return None


def clean(record: Any) -> Record:
    """A record with all the keys that reports and displays read, of the right types.

    "round" and "step" are required; everything else has a default.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, OverflowError: the value is not a record.
    """
    accuracy, number, step = record.get("accuracy"), _count(record["round"]), _count(record["step"])
    if number < 1 or step < 1:
        raise ValueError(f"round {number}, step {step}")
    return {
        "round": number,
        "step": step,
        "epoch": _number(record.get("epoch")),
        "lr": _number(record.get("lr")),
        "loss": _number(record.get("loss")),
        "accuracy": None if accuracy is None or not math.isfinite(accuracy) else _number(accuracy),
        "scores": _table(record.get("scores"), _number),
        "last": bool(record.get("last")),
        "images": _count(record.get("images", 0)),
        "seconds": _table(record.get("seconds"), _seconds),
        "startup_s": _seconds(record.get("startup_s", 0.0)),
        "bytes": _table(record.get("bytes"), _count),
        "pairs": [(int(source), int(target), int(n)) for source, target, n in record.get("pairs") or ()],
        "plan": {
            str(chain): tuple(tuple(_block(block) for block in held) for held in plan)
            for chain, plan in (record.get("plan") or {}).items()
        },
        "workers": [_table(worker, _number) for worker in record.get("workers") or ()],
        "weights": _table(record.get("weights"), _count),
        "evaluation": _table(record.get("evaluation"), str),
        "dropped": len(record.get("dropped") or ()),
        "generations": [_generation(generation) for generation in record.get("generations") or ()],
    }


def _generation(entry: Any) -> dict[str, Any]:
    """A change of members that a record has, from before its round ended: who left and came, and what it took.

    "number" of the generation, "round" and "step" done, "workers", "left" and "came" (the numbers of members),
    "repeated" (whether the round under way was begun again), "pause_s" of the main process.
    """
    counts = {name: _count(entry.get(name, 0)) for name in ("number", "round", "step", "workers")}
    members = {name: [_count(member) for member in entry.get(name) or ()] for name in ("left", "came")}
    return {
        **counts, **members, "repeated": bool(entry.get("repeated")), "pause_s": _seconds(entry.get("pause_s", 0.0)),
    }  # fmt: skip


def _table(value: Any, convert: Callable[[Any], Any]) -> dict[str, Any]:
    return {str(name): convert(entry) for name, entry in (value or {}).items()}


def _number(value: Any) -> float:
    """A worker's loss is null where it became NaN or inf."""
    return math.nan if value is None else float(value)


def _count(value: Any) -> int:
    if int(value) < 0:
        raise ValueError(f"count {value}")
    return int(value)


def _seconds(value: Any) -> float:
    if value < 0:
        raise ValueError(f"seconds {value}")
    return float(value) if math.isfinite(value) else 0.0


def _block(value: Any) -> int:
    if not 0 <= int(value) < MAX_BLOCKS:
        raise ValueError(f"block {value}")
    return int(value)
