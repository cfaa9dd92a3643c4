"""`resist plan`: what would be trained, shown without training it."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from resist.cost.footprint import build_on_meta
from resist.errors import UserError
from resist.planning.plan import Plan
from resist.report.plan_view import partition_svg, print_plan
from resist.runs.config import MethodConfig, NetworkConfig, TrainConfig
from resist.subnet.chains import choose_chains, find_chains
from resist.tasks import network_builder
from resist.tasks.preflight import try_network


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


def describe(model: nn.Module, config: TrainConfig, rounds: int) -> dict[str, Any]:
    """Counts, chains, capacities and the plans of the first `rounds` rounds, ready for JSON.

    model: the full network; it may be on the meta device. Raises UserError where no plan is possible.
    """
    chains, strategy = choose_chains(model, config.network.chain), config.strategy()
    block = {chain.name: _numel(model.get_submodule(chain.block_name(0))) for chain in chains}
    total = _numel(model)
    shared = total - sum(chain.num_blocks * block[chain.name] for chain in chains)
    plans: list[dict[str, Plan]] = []
    for number in range(rounds):
        assign = strategy.at(number).assign
        plans.append({c.name: assign(c.num_blocks, c.name, config.run.seed, number) for c in chains})
    last = strategy.at(max(rounds, config.method.warmup_rounds))
    capacities = {c.name: last.assign(c.num_blocks, c.name, config.run.seed, rounds).capacities for c in chains}
    held = [
        shared + sum(capacities[chain.name][worker] * block[chain.name] for chain in chains)
        for worker in range(strategy.workers)
    ]
    return {
        "parameters": total,
        "shared": shared,
        "held_by_worker": held,
        "chains": [
            {
                "name": chain.name,
                "blocks": chain.num_blocks,
                "parameters_of_a_block": block[chain.name],
                "capacities": capacities[chain.name],
                "attributes_that_differ": [f"{one.module}.{one.name}".lstrip(".") for one in chain.varying],
                "caveat": chain.caveat,
            }
            for chain in chains
        ],
        "other_chains": [run.name for run in find_chains(model) if run.name not in block],
        "rounds": [
            {"round": number, "plan": {name: plan.blocks for name, plan in of_round.items()}}
            for number, of_round in enumerate(plans, start=1)
        ],
    }


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
