"""`resist evaluate`: the network of a run tested again, from disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from resist.evaluate import evaluate_run
from resist.train import pick_device


@dataclass(frozen=True)
class EvaluateConfig:
    """Test the network that a run left behind, read from its directory."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data_dir: Path | None = None
    """Where the data set lies. Default: as when it was trained."""
    device: str = "auto"
    """cpu, cuda, or auto."""


def run_evaluate(config: EvaluateConfig, arguments: list[str]) -> int:
    accuracy = evaluate_run(config.run, data_dir=config.data_dir, device=pick_device(config.device))
    print(f"test accuracy {100 * accuracy:.2f} %")
    return 0
