"""`resist evaluate`: the network of a run tested again, from disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from resist.training.device import pick_device
from resist.training.evaluate import evaluate_run, readings_of_run


@dataclass(frozen=True)
class EvaluateConfig:
    """Test the network that a run left behind, read from its directory."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data_dir: Path | None = None
    """Where the data set lies. Default: as when it was trained."""
    device: str = "auto"
    """cpu, cuda, or auto."""
    readings: bool = False
    """Read it in every way, with and without scale and by each kind of BatchNorm statistics; resist report shows it."""


def run_evaluate(config: EvaluateConfig, arguments: list[str]) -> int:
    if config.readings:
        found = readings_of_run(config.run, data_dir=config.data_dir, device=pick_device(config.device))
        for way, score in found.items():
            print(f"{way:24}{100 * score:6.2f} %")
        return 0
    scores = evaluate_run(config.run, data_dir=config.data_dir, device=pick_device(config.device))
    for name, score in scores.items():
        print(f"test {name} {100 * score:.2f} %")
    return 0
