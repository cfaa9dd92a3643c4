"""Loggers in addition to metrics.jsonl: TensorBoard and Weights & Biases, with the same records as scalars.

Both packages are optional. A logger that fails during a run is dropped, and the run continues.
"""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from resist.errors import UserError
from resist.runs.config import TrainConfig
from resist.runs.history import read_table


class Logger(Protocol):
    """A destination of records."""

    def write(self, record: Mapping[str, Any]) -> str:
        """Log a round. Returns "", or the reason in one line where that failed."""
        ...

    def close(self) -> str:
        """Flush and close. Returns "", or the reason in one line where that failed."""
        ...


def check_loggers(config: TrainConfig) -> None:
    """Raise UserError where the package of a requested logger is missing."""
    for name in config.machine.log:  # also the name of the package
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"`log={name}` needs the package {name}; pip install 'torch-resist[{name}]', or leave it out"
            )


def open_loggers(config: TrainConfig, path: Path, past: Sequence[Mapping[str, Any]]) -> list[Logger]:
    """The loggers that the options name.

    Args:
        config: the configuration of the run.
        path: the run directory.
        past: records of the rounds before a resumption.

    Raises:
        UserError: a package is missing, or a logger cannot be opened.
    """
    check_loggers(config)
    loggers: list[Logger] = []
    if "tensorboard" in config.machine.log:
        loggers.append(TensorBoard(path, past))
    if "wandb" in config.machine.log:
        loggers.append(WandB(config, path))
    return loggers


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name, such as loss, seconds/sync, bytes/blocks, worker 2/compute_s."""
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name == "workers":
            for worker in value:
                prefix = f"worker {worker['worker']}"
                values |= {f"{prefix}/{key}": number for key, number in worker.items() if key != "worker"}
        elif name in ("seconds", "bytes", "wait_s", "scores"):
            values |= {f"{name}/{key}": number for key, number in value.items()}
        elif name != "step":
            values[name] = value
    # A worker's loss is None where it became NaN or inf.
    return {name: value for name, value in values.items() if isinstance(value, int | float)}


class TensorBoard:
    """Events in RUN/tensorboard, by step. A resumed run hides the events of steps that it repeats.

    Args:
        path: the run directory.
        past: records of the rounds before a resumption.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, path: Path, past: Sequence[Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # optional

        purge_step = past[-1]["step"] + 1 if past else None
        try:
            self._writer = SummaryWriter(str(path / "tensorboard"), purge_step=purge_step)
        except OSError as error:
            raise UserError(
                f"`log=tensorboard`: {error.filename}: {error.strerror}; make room, or leave it out"
            ) from error

    def write(self, record: Mapping[str, Any]) -> str:
        try:
            for name, value in scalars(record).items():
                self._writer.add_scalar(name, value, record["step"])
            return ""
        except Exception as error:  # raised by its thread: a full disk, for example
            return f"tensorboard: {_one_line(error)}"

    def close(self) -> str:
        try:
            self._writer.close()
            return ""
        except Exception as error:
            return f"tensorboard: {_one_line(error)}"


class WandB:
    """A run of Weights & Biases, in RUN/wandb, by round.

    A resumed run continues the same one; a round that is repeated keeps its first values. Online or offline follows
    WANDB_MODE and the settings of wandb.

    Args:
        config: the configuration of the run.
        path: the run directory.

    Raises:
        UserError: wandb cannot start.
    """

    def __init__(self, config: TrainConfig, path: Path) -> None:
        import wandb  # optional

        logging.getLogger("wandb").setLevel(logging.ERROR)
        started = read_table(path / "environment.json").get("started")
        identity = blake2b(f"{path.name} {started}".encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
        try:
            self._run = wandb.init(
                project="resist",
                name=path.name,
                id=identity,
                resume="allow",
                dir=str(path),
                settings=wandb.Settings(silent=True, console="off"),
                config=config.to_json(),
            )
        except Exception as error:  # many types: no login, no network, no disk
            raise UserError(f"`log=wandb`: {_one_line(error)}; set WANDB_MODE=offline, or leave it out") from error

    def write(self, record: Mapping[str, Any]) -> str:
        try:
            self._run.log({"step": record["step"], **scalars(record)}, step=record["round"])
            return ""
        except Exception as error:
            return f"wandb: {_one_line(error)}"

    def close(self) -> str:
        try:
            self._run.finish()
            return ""
        except Exception as error:
            return f"wandb: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
