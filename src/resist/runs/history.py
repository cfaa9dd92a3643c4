"""A run directory as numbers: what each round did, added up, and new rounds of a run that goes on elsewhere.

A run may be unfinished, cut off in the middle of a line, resumed, or written by another version: what it does not say
has a default, and `History.notes` tells in words what was left out."""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from resist.errors import UserError
from resist.runs.config import TrainConfig, from_json

# Kinds of traffic that belong to training; assembling the full network to test it is booked apart.
TRAINING = ("shared", "blocks", "state", "gradients", "control")
# Kinds of seconds that belong to training.
TIMED = ("compute", "wait", "sync")
MAX_BLOCKS = 10_000


@dataclass(frozen=True)
class History:
    """One run.

    config:      what it was asked; `given` is the same as the file says it, by part and name.
    rounds:      the records of metrics.jsonl, in order, each with all the keys that `clean` sets.
    seconds:     compute, wait and sync of each round added up, without evaluations: one number for each round.
    bytes:       sent by all workers in training, added up: one number for each round.
    tested:      positions in `rounds` of those after which the full network was tested.
    environment: environment.json, or nothing.
    state:       state.json, or nothing; see `resist.runs.directory.Run.state`.
    readings:    test accuracies of the full network by how it was read, from evaluation.json, or nothing.
    notes:       what was found missing or damaged, a sentence each.
    """

    path: Path
    config: TrainConfig
    rounds: list[dict[str, Any]]
    seconds: list[float]
    bytes: list[int]
    tested: list[int]
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    readings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        """Of the full network, 0 to 1, for each tested round."""
        return [self.rounds[i]["accuracy"] for i in self.tested]

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.rounds]

    @property
    def workers(self) -> int:
        return self.config.method.workers

    @property
    def ended(self) -> str:
        """How it ended: "finished", "interrupted", "failed", or "unfinished" where nobody can tell."""
        said = self.state.get("state")
        if said in ("finished", "interrupted", "failed"):
            return str(said)
        return "finished" if (self.path / "model.safetensors").exists() else "unfinished"

    def total(self, kind: str) -> float:
        """Seconds of one kind over the whole run."""
        return sum(record["seconds"].get(kind, 0.0) for record in self.rounds)

    def reached(self, accuracy: float) -> int | None:
        """The position of the first tested round with at least this accuracy, or None."""
        return next((i for i in self.tested if self.rounds[i]["accuracy"] >= accuracy), None)


def read_history(path: Path) -> History:
    """Read a run. A last line that is cut off is left out; any other damage of metrics.jsonl is a UserError."""
    notes: list[str] = []
    config, given = read_options(path, notes)
    rounds = read_rounds(path / "metrics.jsonl", notes)
    seconds, sent = [0.0], [0]
    for record in rounds:
        seconds.append(seconds[-1] + sum(record["seconds"].get(kind, 0.0) for kind in TIMED))
        sent.append(sent[-1] + sum(record["bytes"].get(kind, 0) for kind in TRAINING))
    environment = _side_file(path, "environment.json", notes)
    readings = {k: v for k, v in _side_file(path, "evaluation.json", notes).items() if _is_share(v)}
    state = _side_file(path, "state.json", notes)
    if not environment:
        notes.append("environment.json is missing, so nothing is known of where it ran.")
    tested = [i for i, record in enumerate(rounds) if record["accuracy"] is not None]
    return History(
        path, config, rounds, seconds[1:], sent[1:], tested, given, environment, state, readings, notes
    )  # fmt: skip


def read_rounds(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, cleaned. Where round numbers go back, the later records count."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; is {file.parent} a run directory?") from error
    rounds: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = clean(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            if number == len(lines):
                notes.append("The last line of metrics.jsonl is cut off, and left out.")
                break
            raise UserError(f"line {number} of {file} is damaged ({type(error).__name__}); remove it") from error
        while rounds and rounds[-1]["round"] >= record["round"]:
            rounds.pop()
        rounds.append(record)
    if not rounds:
        raise UserError(f"{file} holds no round; the run did not come to the end of its first one")
    return rounds


def clean(record: Any) -> dict[str, Any]:
    """A record with all the keys that reports and displays read, their types as they should be.

    round and step have to be there; what else is missing gets a default. Raises ValueError, KeyError, TypeError,
    AttributeError or OverflowError for what cannot be a record.
    """
    accuracy, number, step = record.get("accuracy"), int(record["round"]), int(record["step"])
    if number < 1 or step < 1:
        raise ValueError(f"round {number}, step {step}")
    return {
        "round": number,
        "step": step,
        "epoch": float(record.get("epoch", math.nan)),
        "lr": float(record.get("lr", math.nan)),
        "loss": float(record.get("loss", math.nan)),
        "accuracy": None if accuracy is None or not math.isfinite(accuracy) else float(accuracy),
        "scores": _table(record.get("scores"), float),
        "images": int(record.get("images", 0)),
        "seconds": _table(record.get("seconds"), _seconds),
        "bytes": _table(record.get("bytes"), int),
        "pairs": [(int(source), int(target), int(n)) for source, target, n in record.get("pairs") or ()],
        "plan": {
            str(chain): tuple(tuple(_block(block) for block in held) for held in plan)
            for chain, plan in (record.get("plan") or {}).items()
        },
        "workers": [_table(worker, _number) for worker in record.get("workers") or ()],
        "dropped": len(record.get("dropped") or ()),
    }


def _table(value: Any, kind: Callable[[Any], Any]) -> dict[str, Any]:
    return {str(name): kind(one) for name, one in (value or {}).items()}


def _number(value: Any) -> float:
    """A worker's loss is null where it was no number."""
    return math.nan if value is None else float(value)


def _seconds(value: Any) -> float:
    return float(value) if math.isfinite(value) else 0.0


def _block(value: Any) -> int:
    if not 0 <= int(value) < MAX_BLOCKS:  # a picture is made for each of them
        raise ValueError(f"block {value}")
    return int(value)


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def read_options(path: Path, notes: list[str]) -> tuple[TrainConfig, dict[str, dict[str, Any]]]:
    """(configuration, what the file says) of a run of this or another version: entries that are not known here, or
    have values that are not, are left out with a note. Raises UserError where there is no configuration."""
    file = path / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"{path} is not a run directory: config.json: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {error}; restore it, or train anew") from error
    if not isinstance(data, dict):
        raise UserError(f"{file} is damaged: it is not a table of names and values; restore it, or train anew")
    known: dict[str, dict[str, Any]] = {f.name: {} for f in fields(TrainConfig)}
    given = {str(part): dict(values) for part, values in data.items() if isinstance(values, Mapping)}
    foreign: list[str] = []
    for part, values in given.items():
        for name, value in values.items():
            try:
                from_json({part: {name: value}})
                known[part][name] = value
            except (UserError, KeyError):
                foreign.append(name)
    if foreign:
        notes.append(f"config.json comes from another version; not understood here: {', '.join(map(str, foreign))}.")
    config = from_json(known)
    if config.method.workers < 1:
        raise UserError(f"{file} is damaged: workers is {config.method.workers}; restore it, or train anew")
    return config, given


def _side_file(path: Path, name: str, notes: list[str]) -> dict[str, Any]:
    """A JSON file that may be missing: then, and where it is damaged, an empty table."""
    try:
        data = json.loads((path / name).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        notes.append(f"{name} is damaged, and left out.")
        return {}
    return data


class Follower:
    """Reads a run directory again and again.

    restarted: whether the last `read` found the file replaced, so that its records are those of the whole run anew.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.restarted = path, False
        self._file, self._offset, self._inode = path / "metrics.jsonl", 0, -1

    def read(self) -> list[dict[str, Any]]:
        """The records that have come since. A line that is not complete yet is left for the next time; a damaged one is
        left out."""
        self.restarted = False
        try:
            with self._file.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self.restarted, self._offset, self._inode = self._inode != -1, 0, facts.st_ino
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        records: list[dict[str, Any]] = []
        for line in whole.splitlines():
            try:
                records.append(clean(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                continue
        return records

    def age_s(self) -> float:
        """Seconds since the run wrote a record, or since it began; by this host's clock."""
        for name in ("metrics.jsonl", "state.json", "config.json"):
            try:
                facts = (self.path / name).stat()
            except OSError:
                continue
            if facts.st_size:
                return time.time() - facts.st_mtime
        return 0.0

    def state(self) -> dict[str, Any]:
        """state.json; of an older run what its files say."""
        try:
            found = json.loads((self.path / "state.json").read_text(encoding="utf-8", errors="replace"))
            if isinstance(found, dict):
                return found
        except (OSError, ValueError, RecursionError):
            pass
        return {"state": "finished"} if (self.path / "model.safetensors").exists() else {}


def rounds_of(state: dict[str, Any]) -> int | None:
    """The number of rounds that a run will have, where it says so."""
    rounds = state.get("rounds")
    return rounds if isinstance(rounds, int) and rounds > 0 else None


def gone(state: dict[str, Any]) -> bool:
    """Whether the process that wrote a "running" state ran on this host and is there no more."""
    process = state.get("process")
    if state.get("state") != "running" or state.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
