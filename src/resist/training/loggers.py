"""Loggers beside metrics.jsonl: TensorBoard and Weights & Biases, given the same records as scalars.

Both packages are optional. A logger that fails while a run goes on is left out, and the run goes on.
"""

import importlib.util
import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from resist.errors import UserError
from resist.runs.config import TrainConfig

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}  # option -> package


class Logger(Protocol):
    def write(self, record: Mapping[str, Any]) -> str:
        """Log a round. Returns "", or in one line why that was not possible."""
        ...

    def close(self) -> None: ...


def check_loggers(config: TrainConfig) -> None:
    """Raise UserError where a package is missing that a logger needs."""
    for option, package in PACKAGES.items():
        if getattr(config.machine, option) and importlib.util.find_spec(package) is None:
            raise UserError(f"--{option} needs the package {package}; pip install 'resist[{option}]', or leave it out")


def open_loggers(config: TrainConfig, path: Path, past: Sequence[Mapping[str, Any]]) -> list[Logger]:
    """The loggers that were asked for. path: the run directory; past: records of the rounds before a resumption."""
    check_loggers(config)
    loggers: list[Logger] = []
    if config.machine.tensorboard:
        loggers.append(TensorBoard(path, past))
    if config.machine.wandb:
        loggers.append(WandB(config, path))
    return loggers


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """A record as numbers by name, as in loss, seconds/sync, bytes/blocks, worker 2/compute_s."""
    found: dict[str, Any] = {}
    for name, value in record.items():
        if name == "workers":
            for worker in value:
                own = {k: v for k, v in worker.items() if k != "worker"}
                found |= {f"worker {worker['worker']}/{kind}": number for kind, number in own.items()}
        elif name in ("seconds", "bytes", "wait_s", "scores"):
            found |= {f"{name}/{kind}": number for kind, number in value.items()}
        elif name != "step":
            found[name] = value
    return {name: value for name, value in found.items() if isinstance(value, int | float)}  # a loss may be no number


class TensorBoard:
    """Events in RUN/tensorboard, by step. Events of steps after the one that a run goes on from are hidden."""

    def __init__(self, path: Path, past: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # optional

        purge = past[-1]["step"] + 1 if past else None
        try:
            self._writer = SummaryWriter(str(path / "tensorboard"), purge_step=purge)
        except OSError as error:
            raise UserError(f"--tensorboard: {error.filename}: {error.strerror}; make room, or leave it out") from error

    def write(self, record: Mapping[str, Any]) -> str:
        try:
            for name, value in scalars(record).items():
                self._writer.add_scalar(name, value, record["step"])
            return ""
        except Exception as error:  # whatever its thread ran into: a full disk, for one
            return f"tensorboard: {_one_line(error)}"

    def close(self) -> None:
        try:
            self._writer.close()
        except Exception as error:
            print(f"resist: tensorboard: {_one_line(error)}")


class WandB:
    """A run of Weights & Biases, in RUN/wandb, by round. A resumed run goes on as the same one; a round that is done a
    second time is left as it was. Online or offline is what WANDB_MODE, or wandb's own settings, say."""

    def __init__(self, config: TrainConfig, path: Path) -> None:
        import wandb  # optional

        logging.getLogger("wandb").setLevel(logging.ERROR)
        started = json.loads((path / "environment.json").read_text(encoding="utf-8")).get("started")
        identity = blake2b(f"{path.name} {started}".encode(), digest_size=8).hexdigest()
        settings = wandb.Settings(silent=True, console="off")
        try:
            self._run = wandb.init(
                project="resist", name=path.name, id=identity, resume="allow", dir=str(path), settings=settings,
                config=config.to_json(),
            )  # fmt: skip
        except Exception as error:  # of many kinds: no login, no network, no disk
            raise UserError(f"--wandb: {_one_line(error)}; set WANDB_MODE=offline, or leave it out") from error

    def write(self, record: Mapping[str, Any]) -> str:
        try:
            self._run.log({"step": record["step"], **scalars(record)}, step=record["round"])
            return ""
        except Exception as error:
            return f"wandb: {_one_line(error)}"

    def close(self) -> None:
        try:
            self._run.finish()
        except Exception as error:
            print(f"resist: wandb: {_one_line(error)}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
