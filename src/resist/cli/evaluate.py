"""`resist evaluate`: test the saved network of a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class EvaluateConfig:
    """Test the saved network of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data_dir: Path | None = None
    """Directory of the data set. Default: as in training."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    readings: bool = False
    """Test it with and without scale and with each type of BatchNorm statistics, and keep the accuracies for
    resist report."""


def run_evaluate(config: EvaluateConfig, given: frozenset[str]) -> int:
    """Test the network of a run and print its scores. Returns the exit status."""
    from resist.training.device import take_device
    from resist.training.evaluate import evaluate_run, readings_of_run

    if config.readings:
        readings = readings_of_run(config.run, data_dir=config.data_dir, device=take_device(config.device))
        for name, score in readings.items():
            print(f"{name:24}{100 * score:6.2f} %")
        return 0
    scores = evaluate_run(config.run, data_dir=config.data_dir, device=take_device(config.device))
    for name, score in scores.items():
        print(f"test {name} {100 * score:.2f} %")
    return 0
