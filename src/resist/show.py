"""`resist plan`: what would be trained, and who would hold what, before anything is."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from resist.chains import choose_chains, find_chains
from resist.config import TrainConfig
from resist.plan import Plan


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
        "rounds": [{name: plan.blocks for name, plan in of_round.items()} for of_round in plans],
    }


def print_plan(facts: dict[str, Any], console: Console) -> None:
    """The same for people: each round is a row of blocks, each block marked with the workers that hold it."""
    table = Table.grid(padding=(0, 3), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("parameters", f"{facts['parameters']:,}")
    table.add_row("shared by all workers", f"{facts['shared']:,}")
    for chain in facts["chains"]:
        each = f"{chain['blocks']} blocks of {chain['parameters_of_a_block']:,}"
        table.add_row(f"chain {chain['name']}", each)
        table.add_row("  blocks held by each worker", " ".join(map(str, chain["capacities"])))
        if chain["attributes_that_differ"]:
            table.add_row("  goes with each block", " ".join(chain["attributes_that_differ"]))
    share = " ".join(f"{held / facts['parameters']:.0%}" for held in facts["held_by_worker"])
    table.add_row("a worker's share of the network", share)
    if facts["other_chains"]:
        table.add_row("not partitioned, could be", " ".join(facts["other_chains"]) + "  (name chains with --chain)")
    console.print(table)
    for chain in facts["chains"]:
        if chain["caveat"]:
            console.print(f"\nnote: {chain['caveat']}")
    for chain in facts["chains"]:
        console.print(f"\nWho holds which block of {chain['name']}")
        console.print(_map(chain["blocks"], len(facts["held_by_worker"]), [r[chain["name"]] for r in facts["rounds"]]))


def _map(num_blocks: int, workers: int, rounds: Sequence[Sequence[Sequence[int]]]) -> str:
    """A line for each worker of each round, a column for each block."""
    width = len(str(num_blocks - 1))
    lines = [" " * 21 + " ".join(f"{block:>{width}}" for block in range(num_blocks))]
    for number, held in enumerate(rounds):
        for worker in range(workers):
            label = f"round {number}" if worker == 0 else ""
            marks = " ".join(f"{'#' if block in held[worker] else '.':>{width}}" for block in range(num_blocks))
            lines.append(f"{label:<10}{f'worker {worker}':<11}{marks}")
    return "\n".join(lines)


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
