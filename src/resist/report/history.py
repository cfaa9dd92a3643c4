"""A run directory as numbers: what each round did, added up."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resist.config import TrainConfig
from resist.errors import UserError
from resist.runs import read_config

# Kinds of traffic that belong to training; assembling the full network to test it is booked apart.
TRAINING = ("shared", "blocks", "state", "gradients", "control")


@dataclass(frozen=True)
class History:
    """One run.

    rounds:   the records of metrics.jsonl, in order.
    seconds:  compute, wait and sync of each round added up, without evaluations: one number for each round.
    bytes:    sent by all workers in training, added up: one number for each round.
    tested:   positions in `rounds` of those after which the full network was tested.
    """

    path: Path
    config: TrainConfig
    rounds: list[dict[str, Any]]
    seconds: list[float]
    bytes: list[int]
    tested: list[int]

    @property
    def accuracies(self) -> list[float]:
        """Of the full network, 0 to 1, for each tested round."""
        return [self.rounds[i]["accuracy"] for i in self.tested]

    @property
    def steps(self) -> list[int]:
        return [record["step"] for record in self.rounds]

    def total(self, kind: str) -> float:
        """Seconds of one kind over the whole run."""
        return sum(record["seconds"][kind] for record in self.rounds)

    def reached(self, accuracy: float) -> int | None:
        """The position of the first tested round with at least this accuracy, or None."""
        return next((i for i in self.tested if self.rounds[i]["accuracy"] >= accuracy), None)


def read_history(path: Path) -> History:
    """Read a run, finished or not. A last line that is cut off is left out; any other damage is a UserError."""
    config, file = read_config(path), path / "metrics.jsonl"
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; is {path} a run directory?") from error
    rounds: list[dict[str, Any]] = []
    seconds, sent = [0.0], [0]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            seconds.append(seconds[-1] + sum(float(record["seconds"][k]) for k in ("compute", "wait", "sync")))
            sent.append(sent[-1] + sum(int(record["bytes"].get(kind, 0)) for kind in TRAINING))
            accuracy = record["accuracy"]
            _ = int(record["step"]), float(record["loss"]), None if accuracy is None else float(accuracy)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(lines):
                break
            raise UserError(f"line {number} of {file} is damaged ({type(error).__name__}); remove it") from error
        rounds.append(record)
    if not rounds:
        raise UserError(f"{file} holds no round; the run did not come to the end of its first one")
    tested = [i for i, record in enumerate(rounds) if record["accuracy"] is not None]
    return History(path, config, rounds, seconds[1 : len(rounds) + 1], sent[1 : len(rounds) + 1], tested)
