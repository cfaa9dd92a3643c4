"""A run directory: what was asked, where it ran, what happened, what came out.

config.json        the configuration
environment.json   versions, commit, hardware, start and end
metrics.jsonl      a line for each round (see `append`)
state.json         whether the run goes on, or how it ended (see `state`)
checkpoints/       what a run goes on from, see `resist.runs.checkpoint`
evaluation.json    the full network read in several ways, by resist evaluate --readings
model.safetensors  the full network at the end, see `resist.runs.model_file`
"""

import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from resist.errors import UserError
from resist.runs.config import TrainConfig, from_json

# How long a file that another host has written may take to be seen.
SEEN_S = 5.0


def default_out(config: TrainConfig) -> Path:
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{now}-{config.network.data}-{config.method.strategy}"


def title_of(config: TrainConfig) -> str:
    """What is run, in a few words."""
    network, method = config.network, config.method
    return f"{network.data}, {network.model}, {method.strategy}, {method.workers} worker{'s' * (method.workers > 1)}"


def check_free(path: Path) -> None:
    """Raise UserError where a new run directory cannot be made."""
    if path.exists():
        raise UserError(f"--out {path} exists already and is never overwritten; give another directory, or remove it")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be made: {parent} is not a directory that you may write to")


def mark(path: Path) -> str:
    """A text that tells this run directory from others of the same name; "" where there is none."""
    try:
        return blake2b((path / "environment.json").read_bytes(), digest_size=8).hexdigest()
    except OSError:
        return ""


def seen_after_a_while(path: Path, marked: str) -> bool:
    """Whether the run directory is there with this mark, or comes within seconds: network file systems take some."""
    end = time.monotonic() + SEEN_S
    while (seen := mark(path) == marked) is False and time.monotonic() < end:
        time.sleep(0.2)
    return seen


class Run:
    """A run directory that is being written. Only one process of a job has one.

    resume_round: the round after which the run goes on in a directory that is there already; `past` are the records of
                  the rounds up to that one, and later ones are dropped.
    """

    def __init__(self, path: Path, config: TrainConfig, resume_round: int | None = None) -> None:
        self.path, self.past = path, list[dict[str, Any]]()
        if resume_round is None:
            check_free(path)
        try:
            path.mkdir(parents=True, exist_ok=resume_round is not None)
            here: dict[str, object] = environment()
            if resume_round is not None:
                self.past = past_rounds(path, resume_round)
                here = {**json.loads((path / "environment.json").read_text(encoding="utf-8")), "resumed": here}
            self._write("config.json", config.to_json())
            self._write("environment.json", here)
            self._write("metrics.jsonl", "".join(json.dumps(record) + "\n" for record in self.past))
            self._metrics = (path / "metrics.jsonl").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {path} cannot be written: {error.strerror}; give another directory") from error
        except ValueError as error:
            raise UserError(f"{path / 'environment.json'} is damaged: {error}; remove it") from error

    def append(self, record: Mapping[str, object]) -> None:
        """Add a line to metrics.jsonl, at once readable by others."""
        try:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise UserError(f"{self.path / 'metrics.jsonl'} cannot be written: {error.strerror}; make room") from error

    def state(self, state: str, rounds: int, error: str = "") -> None:
        """Tell those who watch: "running", "finished", "interrupted" or "failed", of how many rounds, and by whom.

        A disk that is full is no reason to lose a run: then the file stays as it was.
        """
        with contextlib.suppress(OSError):
            self._write("state.json", {
                "state": state, "rounds": rounds, "error": error, "host": socket.gethostname(), "process": os.getpid(),
            })  # fmt: skip

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what the disk did not take was said by `append`
            self._metrics.close()

    def _write(self, name: str, content: object) -> None:
        """Write a file so that it is there with its old or its new content, whatever happens."""
        text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
        partial = self.path / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)


def past_rounds(path: Path, last: int) -> list[dict[str, Any]]:
    """The records of metrics.jsonl up to round `last`; lines that are cut or damaged are left out."""
    try:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
            numbers = [record[name] for name in ("round", "step", "epoch", "lr", "images", "loss")]
            numbers += [*record["seconds"].values(), *record["bytes"].values()]
            numbers += [] if record["accuracy"] is None else [record["accuracy"]]
            if all(map(_is_number, numbers)) and record["round"] <= last:
                found.append(record)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < float("inf")


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run. Raises UserError in one line for whatever is wrong with it."""
    file = path / "config.json"
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} is not a run directory: config.json: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}; restore it, or train anew") from error
    config = from_json(data)
    config.check()
    return config


def environment() -> dict[str, object]:
    """Versions, commit and hardware, ready for JSON."""
    import resist

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "resist": resist.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _commit() -> str | None:
    """The git commit of this package's source, where it is run from a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def processor() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
