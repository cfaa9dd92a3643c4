"""Test the full network: as it comes out of a job, or again from a run directory."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from resist.chains import choose_chains
from resist.config import NetworkConfig
from resist.data import Images, Loader, load
from resist.full import FILE, load_full
from resist.models import build
from resist.runs import read_config
from resist.subnet import use_batch_statistics
from resist.tasks.classification import accuracy

# Training images on which BatchNorm statistics are estimated anew.
CALIBRATION_IMAGES = 5000
# The paper tests with batches of 100, which matters where the network uses the statistics of the test batch.
TEST_BATCH = 100


def calibration_batches(train: Images, seed: int = 0) -> Iterator[Tensor]:
    """Images to estimate BatchNorm statistics on: augmented, as in training, since weights have got used to those."""
    size = min(250, len(train))
    loader = Loader(train, batch_size=size, seed=seed, worker=-1, workers=1)  # no worker's own batches
    for step in range(-(-CALIBRATION_IMAGES // size)):
        yield loader.batch(step)[0]


def test_accuracy(model: nn.Module, test: Images) -> float:
    """The share, 0 to 1, of test images that a full network classifies correctly."""
    return accuracy(model.eval(), test.batches(TEST_BATCH))


def network(config: NetworkConfig, data: Images) -> nn.Module:
    """The full network of a configuration, for this data set, with fresh weights."""
    return build(
        config.model,
        num_classes=data.num_classes,
        sections=config.sections,
        width=config.width,
        final_norm=config.final_norm,
    )


def evaluate_run(path: Path, *, data_dir: Path | None = None, device: torch.device | str = "cpu") -> float:
    """The test accuracy, 0 to 1, of the network that a finished run left behind."""
    config = read_config(path)
    _, test = load(config.network.data, data_dir or config.network.data_dir)
    with torch.device("meta"):
        model = network(config.network, test)
    if config.method.batchnorm == "batch":
        use_batch_statistics(model)
    load_full(model, choose_chains(model, config.network.chain), path / FILE)
    return test_accuracy(model.to(device), test.to(device))
