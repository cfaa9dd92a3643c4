"""Reader of run directories: the configuration, the record of each round, the environment, how the run ended.

All JSON files of a run but config.json (`config_file.py`) are parsed here, for reports, the live display, resuming,
evaluation and export. A run may be unfinished, cut off within a line, resumed, or written by another version: a missing
entry gets a default, and `History.notes` names what was left out.

A damaged line of metrics.jsonl is left out where it is the last one (the process was killed while it wrote); anywhere
else it is an error. So is a round that is there twice or not at all, because no total is right then: two processes have
written, or lines are lost. Gaps that a resumption has recorded in environment.json are noted.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from resist.errors import UserError
from resist.runs.config import TrainConfig
from resist.runs.config_file import read_options
from resist.runs.records import (
    Record,
    closing_seconds,
    num_workers,
    parse_record,
    training_bytes,
    training_seconds,
    wall_parts,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class History:
    """One run, as its directory describes it.

    Attributes:
        path: The run directory.
        config: The configuration of the run.
        rounds: The records of metrics.jsonl in order, each with all the keys that `clean` sets.
        seconds: Training seconds up to the end of each round, without evaluations.
        bytes: Training bytes up to the end of each round, sent by all workers.
        tested: Positions in `rounds` after which the full network was tested.
        given: config.json as it is in the file, by part and name.
        environment: environment.json, or an empty table.
        state: state.json, or an empty table; see `resist.runs.directory.Run.state`.
        readings: Test accuracies (0 to 1) of the full network by the way it was read, from evaluation.json.
        notes: One sentence for each thing that is missing or damaged.
    """

    path: Path
    config: TrainConfig
    rounds: list[Record]
    seconds: list[float]
    bytes: list[int]
    tested: list[int]
    given: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    readings: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        method = self.config.method.strategy
        return f"<{self.path}: {method}, {self.workers} workers, {len(self.rounds)} rounds, {self.ended}>"

    @property
    def accuracies(self) -> list[float]:
        """Accuracy of the full network, 0 to 1, for each tested round."""
        return [self.rounds[i]["accuracy"] for i in self.tested]

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of a worker up to the end of each round.

        Where members have come and gone: as many as the workers that the run was to have would have done.
        """
        if not self.generations:
            return [record["step"] for record in self.rounds]
        return [round(record["step"] * num_workers(record, self.workers) / self.workers) for record in self.rounds]

    @property
    def generations(self) -> list[dict[str, Any]]:
        """Changes of members, as their records have them."""
        return [generation for record in self.rounds for generation in record["generations"]]

    @property
    def workers(self) -> int:
        return self.config.method.workers

    @property
    def ended(self) -> str:
        """The end of the run: "finished", "interrupted", "failed", or "unfinished" where it is unknown."""
        state = self.state.get("state")
        if state in ("finished", "interrupted", "failed"):
            return str(state)
        return "finished" if (self.path / "model.safetensors").exists() else "unfinished"

    @property
    def wall(self) -> dict[str, float]:
        """Seconds of the wall clock by part: start-up, training, waiting, evaluation, checkpoints."""
        return wall_parts(self.rounds, closing_seconds(self.state))

    def total(self, phase: str) -> float:
        """Seconds of one phase over the whole run."""
        return sum(record["seconds"].get(phase, 0.0) for record in self.rounds)

    def reached(self, accuracy: float) -> int | None:
        """Position of the first tested round with at least this accuracy, or None."""
        return next((i for i in self.tested if self.rounds[i]["accuracy"] >= accuracy), None)


def read_history(path: Path) -> History:
    """Read a run directory.

    Args:
        path: The run directory.

    Returns:
        The run, with notes on what is missing.

    Raises:
        UserError: `path` is not a run directory, is damaged, holds no round, lacks one or has one twice, or is of an
            incompatible version.
    """
    notes: list[str] = []
    config, given = read_options(path, notes)
    environment = read_table(path / "environment.json", notes)
    known = environment.get("missing_rounds")
    rounds = [record for _, record in _read_records(path / "metrics.jsonl", notes)]
    if not rounds:
        raise UserError(
            f"{path / 'metrics.jsonl'} holds no complete round; the run ended before its first one did, or the file is "
            "damaged; restore it, or train again"
        )
    numbers = [record["round"] for record in rounds]
    check_sequence(path, numbers, known)
    if gaps := missing_rounds(numbers):
        notes.append(f"metrics.jsonl has no record of {_range_text(gaps)}; totals do not include what is missing.")
    seconds, sent = [0.0], [0]
    for record in rounds:
        seconds.append(seconds[-1] + training_seconds(record))
        sent.append(sent[-1] + training_bytes(record))
    readings = {k: v for k, v in read_table(path / "evaluation.json", notes).items() if _is_share(v)}
    state = read_table(path / "state.json", notes)
    if not environment:
        notes.append("environment.json is missing; the hardware and the versions of this run are unknown.")
    tested = [i for i, record in enumerate(rounds) if record["accuracy"] is not None]
    return History(path, config, rounds, seconds[1:], sent[1:], tested, given, environment, state, readings, notes)


def read_past(path: Path, last_round: int, known_gaps: object = None) -> list[tuple[bytes, Record]]:
    """The records of a run that resumes after `last_round`.

    Args:
        path: The run directory. Without a metrics.jsonl the run has no records.
        last_round: The last round to keep; later ones are left out.
        known_gaps: Gaps that earlier resumptions left, the entry "missing_rounds" of environment.json.

    Returns:
        The lines of metrics.jsonl up to that round, each with its record.

    Raises:
        UserError: A line is damaged, a round is there twice, or the rounds have a gap that is not known.
    """
    file = path / "metrics.jsonl"
    if not file.exists():
        return []
    past = [(line, record) for line, record in _read_records(file, [], last_round) if record["round"] <= last_round]
    check_sequence(path, [record["round"] for _, record in past], known_gaps, "delete it to resume without its records")
    return past


def warn_of_rounds(path: Path) -> None:
    """Log a warning where metrics.jsonl lacks a round or has one twice, before the network of a run is used.

    A run without this file has no rounds: the network can be used without it.
    """
    try:
        lines = (path / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return
    known = read_table(path / "environment.json", []).get("missing_rounds")
    try:
        check_sequence(path, [record["round"] for record in map(parse_record, lines) if record is not None], known)
    except UserError as error:
        log.warning("%s", error)


def check_sequence(
    path: Path, numbers: Sequence[int], known_gaps: object = None, remedy: str = "keep only the lines before it"
) -> None:
    """Raise UserError where a sequence of rounds lacks one, or has one twice.

    Args:
        path: The run directory, for the message.
        numbers: The rounds in the order of metrics.jsonl, which should be 1, 2 and so on.
        known_gaps: The entry "missing_rounds" of environment.json: gaps that are no error.
        remedy: What to do if the file cannot be restored.
    """
    file = path / "metrics.jsonl"
    for line, (before, number) in enumerate(pairwise([0, *numbers]), start=1):
        if number <= before:
            raise UserError(
                f"{file} has round {number} after round {before} (record {line}): two processes have written to it; "
                f"restore the file, or {remedy}"
            )
    known = [(gap[0], gap[1]) for gap in known_gaps if _is_gap(gap)] if isinstance(known_gaps, list) else []
    gaps = missing_rounds(numbers)
    gaps = [(first, last) for first, last in gaps if not any(a <= first and last <= b for a, b in known)]
    if gaps:
        raise UserError(f"{file} has no record of {_range_text(gaps)}; restore the file, or {remedy}")


def missing_rounds(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Gaps in ascending round numbers that should begin at 1, each as (first, last)."""
    gaps: list[tuple[int, int]] = []
    expected = 1
    for number in numbers:
        if number > expected:
            gaps.append((expected, number - 1))
        expected = number + 1
    return gaps


def _is_gap(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)


def _range_text(gaps: list[tuple[int, int]]) -> str:
    """round 7, or rounds 7 to 9 (and 2 other gaps)"""
    first, last = gaps[0]
    text = f"round {first}" if first == last else f"rounds {first} to {last}"
    return text + (f" (and {len(gaps) - 1} other gap{'s' * (len(gaps) > 2)})" if len(gaps) > 1 else "")


def _read_records(file: Path, notes: list[str], last_round: int | None = None) -> list[tuple[bytes, Record]]:
    """Lines and records of a metrics.jsonl. Raises UserError for a damaged line that is not the last.

    With `last_round`, damage after the record of that round is left out: these rounds are done again.
    """
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; is {file.parent} a run directory?") from error
    rounds: list[tuple[bytes, Record]] = []
    damaged = 0
    for number, line in enumerate(lines, start=1):
        record = parse_record(line)
        if record is None:
            damaged = damaged or number
            if last_round is None and number < len(lines):
                raise UserError(f"line {damaged} of {file} is damaged; fix or delete the line")
            continue
        if damaged and record["round"] <= (last_round or 0):
            raise UserError(
                f"line {damaged} of {file} is damaged; restore the file, or delete it to resume without its records"
            )
        rounds.append((line, record))
    if damaged:
        notes.append("The last line of metrics.jsonl is cut off and was left out.")
    return rounds


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def read_table(file: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """A JSON object from a file that may be missing.

    Args:
        file: environment.json, state.json or evaluation.json of a run.
        notes: A sentence is added to it where the file is damaged. Without it damage is an error.

    Returns:
        The object; an empty one where the file is missing or was left out.

    Raises:
        UserError: The file is damaged, and `notes` is None.
    """
    try:
        data = json.loads(file.read_bytes())
    except OSError:
        return {}
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict):
        return data
    if notes is None:
        raise UserError(f"{file} is damaged; restore it, or delete it")
    notes.append(f"{file.name} is damaged and was left out.")
    return {}
