"""`resist plan`: what would be trained, and who would hold what, before anything is."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from resist.chains import choose_chains, find_chains
from resist.colours import colour_of
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
        rounds = [of_round[chain["name"]] for of_round in facts["rounds"]]
        for line in partition_lines(chain["blocks"], rounds, console.width, utf8=console.encoding.startswith("utf")):
            console.print(line)


LABELS, SHARED = 21, 2  # columns


def partition_lines(
    num_blocks: int, rounds: Sequence[Sequence[Sequence[int]]], width: int, *, utf8: bool = True
) -> list[Text]:
    """The sub-network of each worker in each round as a line: shared parts at both ends, its blocks, the way past the
    others'.

    Where blocks do not fit into `width` columns, they go on in a further part below.
    """
    held_mark, way, shared = ("■", "─", "━") if utf8 else ("#", "-", "=")
    room = max(8, width - LABELS - 2 * SHARED - 1)
    pitch = 2 if 2 * num_blocks <= room else 1
    lines: list[Text] = []
    for first in range(0, num_blocks, room // pitch):
        part = range(first, min(num_blocks, first + room // pitch))
        lines += [Text()] if first else []
        for digit in range(len(str(num_blocks - 1)), 0, -1):  # numbers stand upright
            digits = (str(block)[-digit] if len(str(block)) >= digit else " " for block in part)
            lines.append(Text(" " * (LABELS + SHARED + pitch - 1) + (" " * (pitch - 1)).join(digits), style="dim"))
        for number, workers in enumerate(rounds):
            for worker, held in enumerate(workers):
                label = f"round {number}" if worker == 0 else ""
                text = Text(f"{label:<10}{f'worker {worker}':<11}")
                marks = "".join(way * (pitch - 1) + (held_mark if block in held else way) for block in part)
                text.append(shared * SHARED + marks + way * (pitch - 1) + shared * SHARED, style=colour_of(worker))
                lines.append(text)
    return lines


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
