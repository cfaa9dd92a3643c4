"""`resist plan`: show the chains and the plans of a run without training."""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resist.cli.options import as_typed
from resist.errors import UserError
from resist.planning.assign import whole_draws
from resist.planning.plan import Plan, RoundPlan
from resist.runs.atomic import write_new
from resist.runs.bounds import check_size
from resist.runs.config import MethodConfig, NetworkConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from resist.blocks.chain import Chain
    from resist.cost.sizes import Sizes

# Lines that are printed at most, one for each worker and round.
LINES = 20_000


@dataclass(frozen=True)
class PlanConfig:
    """Show parameters, chains, and which worker holds which block. Trains nothing."""

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
    """Also draw the rounds into this file, which must not exist yet."""


def describe_plan(config: PlanConfig) -> dict[str, Any]:
    """Describe the network and the first plans of some options.

    No weights are allocated, but for a network of another library.

    Args:
        config: The options.

    Returns:
        The dictionary of `describe`.

    Raises:
        UserError: For invalid options, or where no plan is possible.
    """
    from resist.cost.footprint import build_on_meta
    from resist.tasks import network_builder
    from resist.tasks.preflight import try_network

    network = config.network
    if config.rounds < 1:
        raise UserError(f"`rounds={config.rounds}` is too small; give at least 1")
    for name, number in (("rounds", config.rounds), ("num_classes", config.num_classes or 1)):
        check_size(name, number)
    whole = TrainConfig(network=network, method=config.method, run=RunConfig(seed=config.seed))
    whole.check()
    most = max(1, LINES // config.method.workers)
    if config.rounds > most:
        raise UserError(
            f"`rounds={config.rounds}` of `workers={config.method.workers}` are more than {LINES:,} lines; "
            f"give at most {most}"
        )
    model, chains = (
        build_on_meta(network_builder(network, config.num_classes)),
        try_network(network, config.num_classes),
    )
    return describe(model, whole, config.rounds, chains)


def run_plan(config: PlanConfig, given: frozenset[str]) -> int:
    """Describe the plans and print them. Returns the exit status."""
    from rich.console import Console

    from resist.report.plan_view import partition_svg, print_plan

    description = describe_plan(config)
    if config.svg is not None:
        try:
            write_new(config.svg, partition_svg(description))
        except OSError as error:
            raise UserError(f"--svg {config.svg} cannot be written: {error.strerror}; give another file") from error
    if config.json:
        print(json.dumps(description))
    else:
        print_plan(description, Console(highlight=False, soft_wrap=True))
    return 0


def describe(
    model: "nn.Module", config: TrainConfig, rounds: int, chains: "Sequence[Chain] | None" = None
) -> dict[str, Any]:
    """Describe a network's chains, capacities and first plans as JSON data.

    Args:
        model: The full network; it may be on the meta device.
        config: The strategy, the chains and the seed.
        rounds: Number of rounds, from the first one, whose plans are returned.
        chains: The chains, if they are known from an example. Default: found by guesses.

    Returns:
        Numbers of parameters (in all, outside the chains, held by each worker), a table of the chains, changes of the
        capacities, notes, for each round and chain the blocks of each worker, and what is sent of the weights after
        each round in the wire formats, up to the next draw of the sub-networks. Capacities, and what a worker holds,
        are those of the first round after the warm-up.

    Raises:
        UserError: Where no plan is possible.
    """
    from resist.blocks.chains import choose_chains, find_chains
    from resist.blocks.holdings import notes_on_holdings, weights_of
    from resist.cost.sizes import sizes_of

    strategy = config.strategy()
    if chains is None:
        chains = choose_chains(model, config.network.chain)
    weights, notes = weights_of(model, chains), notes_on_holdings(model, chains, strategy)
    warmup, counted = config.method.warmup_rounds, whole_draws(rounds, config.method.redraw_every)

    def plan(round: int) -> RoundPlan:
        return strategy.plan(chains, seed=config.run.seed, round=round)

    def held(plan: RoundPlan) -> list[int]:
        return [weights.held(plan.capacities(worker)) for worker in range(strategy.workers)]

    changes = {round: plan(round) for round in strategy.change_rounds if round > warmup}
    return {
        "parameters": weights.total,
        "shared": weights.shared,
        "held_by_worker": held(plan(warmup)),
        "chains": [
            _row(chain, block, own)
            for chain, block, own in zip(chains, weights.blocks, plan(warmup).plans, strict=True)
        ],
        "changes": [
            {"after_rounds": round, "capacities": _by_chain(chains, then, "capacities"), "held_by_worker": held(then)}
            for round, then in changes.items()
        ],
        "other_chains": [run.name for run in find_chains(model) if run not in chains],
        "notes": [as_typed(note) for note in (*notes.warnings, *notes.remarks)],
        "rounds": [
            {"round": number + 1, "plan": _by_chain(chains, plan(number), "blocks")} for number in range(rounds)
        ],
        "wire": _wire(config, sizes_of(model, chains), [plan(number) for number in range(counted + 1)]),
    }


def _row(chain: "Chain", parameters: int, plan: Plan) -> dict[str, Any]:
    """Describe a chain, of whose blocks each has that many parameters."""
    return {
        "name": chain.name,
        "blocks": chain.num_blocks,
        "parameters_of_a_block": parameters,
        "capacities": plan.capacities,
        "attributes_that_differ": [f"{entry.module}.{entry.name}".lstrip(".") for entry in chain.varying],
        "caveat": chain.caveat,
    }


def _by_chain(chains: "Sequence[Chain]", plan: RoundPlan, values: str) -> dict[str, Any]:
    return {chain.name: getattr(own, values) for chain, own in zip(chains, plan.plans, strict=True)}


def _wire(config: TrainConfig, sizes: "Sizes", plans: "Sequence[RoundPlan]") -> dict[str, Any] | None:
    """Describe what the weights are on the wire; None for a strategy that averages gradients in every step."""
    from resist.cost.traffic import round_traffic

    strategy, wire = config.strategy(), config.method.wires()
    if strategy.every_step:
        return None
    rounds = [
        round_traffic(sizes, plan, then, strategy=strategy.at(number), replicate=config.method.replicate, wire=wire)
        for number, (plan, then) in enumerate(pairwise(plans))
    ]
    return {
        "formats": wire.formats,
        "bytes_of_a_block": {
            chain.name: num_bytes for chain, num_bytes in zip(sizes.chains, sizes.block_bytes(wire), strict=True)
        },
        "sent": [{"after_round": number, "bytes": dict(own.bytes)} for number, own in enumerate(rounds, start=1)],
    }
