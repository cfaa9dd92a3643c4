"""A run directory: what was asked, where it ran, what happened, what came out.

config.json        the configuration
environment.json   versions, commit, hardware, start and end
metrics.jsonl      a line for each round (see `append`)
model.safetensors  the full network at the end, see `resist.checkpoint`
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import torch

from resist.config import TrainConfig, from_json
from resist.errors import UserError


def default_out(config: TrainConfig) -> Path:
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{now}-{config.network.data}-{config.method.strategy}"


def check_free(path: Path) -> None:
    """Raise UserError where a new run directory cannot be made."""
    if path.exists():
        raise UserError(f"--out {path} exists already and is never overwritten; give another directory, or remove it")
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"--out {path} cannot be made: {parent} is not a directory that you may write to")


class Run:
    """A run directory that is being written. Only one process of a job has one."""

    def __init__(self, path: Path, config: TrainConfig) -> None:
        check_free(path)
        try:
            path.mkdir(parents=True)
            self.path = path
            self._write("config.json", config.to_json())
            self._write("environment.json", environment())
            self._metrics = (path / "metrics.jsonl").open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out {path} cannot be written: {error.strerror}; give another directory") from error

    def append(self, record: Mapping[str, object]) -> None:
        """Add a line to metrics.jsonl, at once readable by others."""
        try:
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise UserError(f"{self.path / 'metrics.jsonl'} cannot be written: {error.strerror}; make room") from error

    def close(self) -> None:
        self._metrics.close()

    def _write(self, name: str, content: object) -> None:
        (self.path / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


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
        "processor": _processor(),
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


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
