"""Test the network that a run left behind, again from its directory."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from resist.errors import UserError
from resist.runs.config import TrainConfig
from resist.runs.history import read_config
from resist.runs.model_file import FILE, load_full
from resist.subnet.batchnorm import has_running_statistics, recalibrate, use_batch_statistics
from resist.subnet.chains import choose_chains
from resist.tasks import Task, open_task

READINGS = "evaluation.json"


def evaluate_run(path: Path, *, data_dir: Path | None = None, device: torch.device | str = "cpu") -> dict[str, float]:
    """The scores, 0 to 1, of the network that a finished run left behind; the one that counts comes first."""
    config, task = _open(path, data_dir)
    return task.to(device).test(_load(path, config, task, scaled=True).to(device))


def readings_of_run(
    path: Path, *, data_dir: Path | None = None, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """The score that counts, 0 to 1, by how the network is read: "recalibrate, scaled", "batch, no scale" and so on.

    BatchNorm's statistics are those that the run kept, those of each test batch, or estimated anew; a run that kept
    none has only the batches' own. Kept in the run directory, where `resist report` finds them.
    """
    config, task = _open(path, data_dir)
    task, kept = task.to(device), config.method.batchnorm
    ways = ["batch"] if kept == "batch" else list(dict.fromkeys([kept, "recalibrate", "batch"]))
    found: dict[str, float] = {}
    for scaled in (True, False):
        for way in ways:
            model = _load(path, config, task, scaled=scaled).to(device)
            if way == "recalibrate" and has_running_statistics(model):
                recalibrate(model, task.calibration(config.run.seed), torch.device(device))
            elif way == "batch":
                use_batch_statistics(model)
            score = next(iter(task.test(model.eval()).values()))
            found[f"{way}, {'scaled' if scaled else 'no scale'}"] = round(score, 6)
    partial = path / f".{READINGS}.partial"
    try:
        partial.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        partial.replace(path / READINGS)
    except OSError as error:
        raise UserError(f"{path / READINGS} cannot be written: {error.strerror}; make room") from error
    return found


def _open(path: Path, data_dir: Path | None) -> tuple[TrainConfig, Task]:
    config = read_config(path)
    # What the network began with is of no matter any more, and need not be there.
    network = replace(config.network, data_dir=data_dir or config.network.data_dir, pretrained=None, backbone=None)
    return config, open_task(network)


def _load(path: Path, config: TrainConfig, task: Task, *, scaled: bool) -> nn.Module:
    """The full network that a run left behind, its chain blocks' branches scaled as in the run, or not at all."""
    model = task.network()  # with weights: buffers that are not saved, as tables of positions, have to be right
    if config.method.batchnorm == "batch":
        use_batch_statistics(model)
    return load_full(model, choose_chains(model, config.network.chain) if scaled else (), path / FILE)
