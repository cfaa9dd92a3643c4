"""`resist plan`: what would be trained, shown without training it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from resist.config import MethodConfig, NetworkConfig, TrainConfig
from resist.cost.footprint import build_on_meta
from resist.draw import partition_svg
from resist.errors import UserError
from resist.foreign import try_network
from resist.show import describe, print_plan
from resist.tasks import network_builder


@dataclass(frozen=True)
class PlanConfig:
    """Show what would be trained: parameters, chains, who holds which block. Trains nothing."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    num_classes: int | None = None
    """Classes of the head. Default: those of --data."""
    seed: int = 0
    """Seed of the plans."""
    rounds: int = 3
    """Rounds to show."""
    json: bool = False
    """Print JSON."""
    svg: Path | None = None
    """Draw the rounds into this file too, which must not exist yet."""


def plan_facts(config: PlanConfig) -> dict[str, Any]:
    network = config.network
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds} is too small; give at least 1")
    if config.method.warmup_epochs:
        raise UserError("--warmup-epochs are rounds only where there are data; show a plan with --warmup-rounds")
    whole = TrainConfig(network=network, method=config.method)
    whole.check()
    return describe(build_on_meta(network_builder(network, config.num_classes)), whole, config.rounds)


def run_plan(config: PlanConfig, arguments: list[str]) -> int:
    facts = plan_facts(config)
    try_network(config.network, config.num_classes)
    if config.svg is not None:
        try:
            with config.svg.open("x", encoding="utf-8") as file:
                file.write(partition_svg(facts))
        except OSError as error:
            raise UserError(f"--svg {config.svg} cannot be written: {error.strerror}; give another file") from error
    if config.json:
        print(json.dumps(facts))
    else:
        print_plan(facts, Console(highlight=False, soft_wrap=True))
    return 0
