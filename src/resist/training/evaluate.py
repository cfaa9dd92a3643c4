"""Test the final network of a run again, from its directory."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from resist.errors import UserError
from resist.runs.atomic import write_atomically
from resist.runs.config import TrainConfig
from resist.runs.config_file import read_config
from resist.runs.history import warn_of_rounds
from resist.runs.lock import RunLock
from resist.runs.model_file import EMA_FILE, FILE, load_full
from resist.subnet.batchnorm import has_running_statistics, recalibrate, use_batch_statistics
from resist.tasks import Task, open_task
from resist.training.device import autocast

READINGS = "evaluation.json"


def evaluate_run(path: Path, *, data_dir: Path | None = None, device: torch.device | str = "cpu") -> dict[str, float]:
    """Test the final network of a run.

    The average of its weights (EMA) is tested too, if the run has one.

    Args:
        path: Run directory.
        data_dir: Folder of the data set; default: that of the run.
        device: Where to test.

    Returns:
        The scores, 0 to 1, by name; the main one comes first. Those of the average begin with "EMA".

    Raises:
        UserError: The run has not finished, or a file is damaged.
    """
    config, task = _open(path, data_dir)
    task = task.to(device, channels_last=config.machine.channels_last)
    with autocast(device, config.machine.precision):
        scores = task.test(_load(path, config, task, scaled=True).to(device))
    if config.optimization.model_ema_decay is not None:
        average = _load(path, config, task, scaled=True, file=EMA_FILE).to(device)
        with autocast(device, config.machine.precision):
            scores |= {f"EMA {name}": score for name, score in task.test(average).items()}
    return scores


def readings_of_run(
    path: Path, *, data_dir: Path | None = None, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """Test the final network of a run with each choice of statistics and scale.

    BatchNorm's statistics are those of the run, re-estimated ones, or those of each test batch, which are the only ones
    for a run with `batchnorm="batch"`. Branches are scaled as in the run, or not. The scores are written to
    evaluation.json in the run directory, where `resist report` finds them.

    Args:
        path: Run directory.
        data_dir: Folder of the data set; default: that of the run.
        device: Where to test.

    Returns:
        The main score, 0 to 1, by choice: "recalibrate, scaled", "batch, no scale" and so on.

    Raises:
        UserError: The run has not finished, a file is damaged, another process writes into the directory, or
            evaluation.json cannot be written.
    """
    config, task = _open(path, data_dir)
    with RunLock(path, "evaluate"):
        task, chosen = task.to(device, channels_last=config.machine.channels_last), config.method.batchnorm
        choices = ["batch"] if chosen == "batch" else list(dict.fromkeys([chosen, "recalibrate", "batch"]))
        scores: dict[str, float] = {}
        for scaled in (True, False):
            for statistics in choices:
                model = _load(path, config, task, scaled=scaled).to(device)
                with autocast(device, config.machine.precision):
                    if statistics == "recalibrate" and has_running_statistics(model):
                        recalibrate(model, task.calibration(config.run.seed), torch.device(device))
                    elif statistics == "batch":
                        use_batch_statistics(model)
                    score = next(iter(task.test(model.eval()).values()))
                scores[f"{statistics}, {'scaled' if scaled else 'no scale'}"] = round(score, 6)
        try:
            write_atomically(path / READINGS, json.dumps(scores, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{path / READINGS} cannot be written: {error.strerror}; make room") from error
        return scores


def _open(path: Path, data_dir: Path | None) -> tuple[TrainConfig, Task]:
    config = read_config(path)
    warn_of_rounds(path)
    # The initial weights are not needed for the final ones, and their files may be gone.
    network = replace(config.network, data_dir=data_dir or config.network.data_dir, init_from=None)
    return config, open_task(network, config.optimization)


def _load(path: Path, config: TrainConfig, task: Task, *, scaled: bool, file: str = FILE) -> nn.Module:
    """Load the final network of a run, its chain blocks' branches scaled as in the run, or not at all."""
    model = task.network()  # with weights: buffers that are not saved, such as position tables, have to be right
    if config.method.batchnorm == "batch":
        use_batch_statistics(model)
    memory_format = torch.channels_last if config.machine.channels_last else torch.contiguous_format
    return load_full(model, path / file, scaled=scaled).to(memory_format=memory_format)  # as in the run
