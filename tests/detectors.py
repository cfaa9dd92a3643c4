"""Options of a small detector, and classification runs that its backbone may start from."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from resist.blocks.chains import choose_chains
from resist.cli import main
from resist.job import build_seeded
from resist.runs.config import NetworkConfig, TrainConfig
from resist.runs.directory import Run
from resist.runs.model_file import FILE, save_full
from resist.subnet.scaling import scale_branches
from resist.tasks import network_builder

SMALL = NetworkConfig(data="voc2007", model_args=("depths=1,1,5,1", "width=4"), image_size=36, data_workers=0)
ARGUMENTS = [
    "--data", "voc2007", "--model-args", "depths=1,1,5,1", "width=4", "--image-size", "36",
    "--workers", "2", "--min-depth", "0", "--batch-size", "2", "--local-steps", "2", "--device", "cpu",
    "--data-workers", "0",
]  # fmt: skip


def cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def classification_run(path: Path, *, batchnorm: str = "average", **network: Any) -> Any:
    """A finished run of ours with weights that are all different from fresh ones; its scaled full network."""
    part = NetworkConfig(**{"model_args": ("depths=1,1,5,1", "width=4"), **network})
    model = build_seeded(network_builder(part), 7).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    if batchnorm == "batch":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = module.running_var = module.num_batches_tracked = None
    chains = choose_chains(model)
    Run(path, TrainConfig(network=part)).close()
    save_full(model, chains, [0.5], path / FILE)
    scale_branches(model, chains, [0.5])
    return model
