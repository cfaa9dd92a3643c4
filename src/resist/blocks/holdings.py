"""Holdings: the share of the weights that a worker holds, and notes on it."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from resist.blocks.chain import Chain
from resist.blocks.chains import try_runs
from resist.blocks.selection import all_chains
from resist.errors import UserError
from resist.planning.capacities import Capacities
from resist.planning.strategy import Strategy

log = logging.getLogger(__name__)

# Runs that are left undivided are worth a note from this multiple of the weights of the chosen chains on, and another
# choice from this gain in the share of a worker on.
UNDIVIDED, GAIN = 1.3, 0.02


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters of a network, by its parts.

    Attributes:
        total: Parameters of the full network.
        blocks: Parameters of one block of each chain.
        num_blocks: Number of blocks of each chain.
    """

    total: int
    blocks: tuple[int, ...]
    num_blocks: tuple[int, ...]

    @property
    def divided(self) -> int:
        """Parameters in the chains."""
        return sum(number * block for number, block in zip(self.num_blocks, self.blocks, strict=True))

    @property
    def shared(self) -> int:
        """Parameters outside the chains."""
        return self.total - self.divided

    def held(self, capacities: Sequence[int]) -> int:
        """Count the parameters of a worker.

        Args:
            capacities: Number of blocks of each chain that it holds.

        Returns:
            The number of parameters, with the shared part.
        """
        return self.shared + sum(number * block for number, block in zip(capacities, self.blocks, strict=True))


def weights_of(model: nn.Module, chains: Sequence[Chain]) -> Weights:
    """Count the parameters of a network.

    Args:
        model: The full network, on any device.
        chains: Its chains.

    Returns:
        The numbers.
    """
    blocks = tuple(sum(_numel(model.get_submodule(name)) for name in chain.members(0)) for chain in chains)
    return Weights(_numel(model), blocks, tuple(chain.num_blocks for chain in chains))


def log_holdings(
    model: nn.Module, chains: Sequence[Chain], strategy: Strategy, runs: Sequence[Chain] | None = None
) -> None:
    """Log the notes on what the workers hold, each once: a warning where a chain is whole.

    Args:
        model: The full network.
        chains: The chains that are partitioned.
        strategy: The strategy.
        runs: As in `notes_on_holdings`.
    """
    notes = notes_on_holdings(model, chains, strategy, runs)
    for text in notes.warnings:
        log.warning("%s", text)
    if notes.share:
        log.info("a worker holds %s of the weights", notes.share)
    for text in notes.remarks:
        log.info("note: %s", text)


@dataclass(frozen=True)
class Notes:
    """Sentences on what the workers hold.

    Attributes:
        warnings: On chains of which every worker holds all blocks because of the minimum depth: that is local SGD.
        share: Share of the weights that a worker holds, as text; from the least to the most if they differ.
        remarks: On other choices, and on chains that cannot be partitioned together with the others.
    """

    warnings: tuple[str, ...] = ()
    share: str = ""
    remarks: tuple[str, ...] = ()


def notes_on_holdings(
    model: nn.Module, chains: Sequence[Chain], strategy: Strategy, runs: Sequence[Chain] | None = None
) -> Notes:
    """Describe what the workers hold in the first round that partitions.

    Another choice is named where the runs that are left undivided hold at least 1.3 times the weights of the chosen
    chains, or where a chain is whole, if it makes the share of a worker smaller.

    Args:
        model: The full network, on any device.
        chains: The chains that are partitioned.
        strategy: The strategy.
        runs: The runs of the network, from `resist.blocks.chains.try_runs`. Default: found by guesses.

    Returns:
        The notes; none if every worker holds every block in all rounds, as in local SGD.
    """
    round = next((round for round in strategy.change_rounds if strategy.at(round).partitions), None)
    if round is None:
        return Notes()
    plans, record = strategy.plan(chains, seed=0, round=round).plans, strategy.at(round).capacities
    everything, left_out = all_chains(try_runs(model) if runs is None else runs, model)
    whole, depth = [], None
    if record is not None and strategy.workers > 1:
        by_rule = [chain for chain in chains if record.depth_of(chain.name, round) is not None]
        whole = [chain for chain, plan in zip(chains, plans, strict=True) if plan.held_by_all and chain in by_rule]
        depth = record.depth_of(whole[0].name, round) if whole else None  # equal for all that follow the rule
    weights, all_weights = weights_of(model, chains), weights_of(model, everything)
    choices: list[tuple[str, Sequence[Chain], Capacities]] = []
    if all_weights.divided - weights.divided >= UNDIVIDED * weights.divided:
        choices = _with_less_depth("`chains=all`", everything, record, round)
    elif whole:
        choices = _with_less_depth("", chains, record, round)[1:]
    shares = _shares(weights, [plan.capacities for plan in plans])
    best, remarks = max(shares), list[str]()
    for words, choice, capacities in choices:
        try:
            held = [capacities.of(c.num_blocks, strategy.workers, chain=c.name, round=round) for c in choice]
        except UserError:  # these capacities do not fit the other chains
            continue
        smaller = _shares(weights_of(model, choice), held)
        if max(smaller) <= best - GAIN:
            best = max(smaller)
            remarks.append(f"with {words} a worker holds {_text(smaller)} of the weights, instead of {_text(shares)}")
    others = [chain for chain in everything if chain not in chains]
    warnings = () if depth is None else (_local_sgd(whole, depth, strategy.workers, others),)
    return Notes(warnings, _text(shares), (*remarks, *(left_out if tuple(chains) == everything else ())))


def _local_sgd(whole: Sequence[Chain], depth: int, workers: int, others: Sequence[Chain]) -> str:
    """Sentence on chains that the minimum depth makes whole."""
    lower = min(max(-(-chain.num_blocks // workers), chain.num_blocks // 2) for chain in whole)
    longest = max(chain.num_blocks for chain in whole)
    longer = " or name a longer chain" if any(chain.num_blocks > longest for chain in others) else ""
    names = ", ".join(chain.name for chain in whole)
    blocks = f"all {longest} blocks" if len(whole) == 1 else "all blocks"
    return (
        f"chain{'s' * (len(whole) > 1)} {names}: every worker holds {blocks}, since `min_depth={depth}`; that is local "
        f"SGD; give `min_depth={lower}`{longer}"
    )


def _with_less_depth(
    words: str, chains: Sequence[Chain], record: Capacities | None, round: int
) -> list[tuple[str, Sequence[Chain], Capacities]]:
    """Choices of these chains: with the same capacities, and if those are the rule's, without a minimum depth."""
    if record is None:
        return []
    lower = f"{words} and `min_depth=0`" if words else "`min_depth=0`"
    by_rule = all(record.depth_of(chain.name, round) is not None for chain in chains)
    return [(words, chains, record), *([(lower, chains, Capacities(min_depth=0))] if by_rule else [])]


def _shares(weights: Weights, capacities: Sequence[Sequence[int]]) -> list[float]:
    """Share of the parameters that each worker holds."""
    return [weights.held(own) / weights.total for own in zip(*capacities, strict=True)]


def _text(shares: Sequence[float]) -> str:
    least, most = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return most if least == most else f"{least} to {most}"


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
