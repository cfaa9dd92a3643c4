"""Test the network that a run left behind, again from its directory."""

from dataclasses import replace
from pathlib import Path

import torch

from resist.batchnorm import use_batch_statistics
from resist.chains import choose_chains
from resist.full import FILE, load_full
from resist.runs import read_config
from resist.tasks import open_task


def evaluate_run(path: Path, *, data_dir: Path | None = None, device: torch.device | str = "cpu") -> dict[str, float]:
    """The scores, 0 to 1, of the network that a finished run left behind; the one that counts comes first."""
    config = read_config(path)
    # What the network began with is of no matter any more, and need not be there.
    network = replace(config.network, data_dir=data_dir or config.network.data_dir, pretrained=None, backbone=None)
    task = open_task(network)
    model = task.network()  # with weights: buffers that are not saved, as tables of positions, have to be right
    if config.method.batchnorm == "batch":
        use_batch_statistics(model)
    load_full(model, choose_chains(model, config.network.chain), path / FILE)
    return task.to(device).test(model.to(device))
