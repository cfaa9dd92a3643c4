"""Validate a network for ResIST with an example, on copies.

The network has to satisfy five laws, each in evaluation mode, and the second one in training mode too:

1. A sub-network that holds every block computes the same as the network.
2. A sub-network computes the same as the network with the other blocks bypassed. A network that treats its layers by
   position (`for i, block in enumerate(blocks)` with other values for each i) does not.
3. Every block of a chain is called. Their order is free, and they may be called more than once.
4. The blocks are residual, tested as in `resist.blocks.residual` with the inputs that they get in the network. They add
   to one tensor only.
5. The full network with scaled branches computes x + scale * f(x) for every block, also where a block writes into its
   input.

The second law compares what every block gets and returns, and the output, so that the reason names the place.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from resist.blocks.bypass import in_place
from resist.blocks.chain import COMPACT, Chain
from resist.blocks.chains import chosen_of, try_runs
from resist.blocks.example import Seen, as_forward, look
from resist.blocks.rehearsal import Rehearsal, describe
from resist.blocks.selection import ALL, all_chains
from resist.checking.examination import Checked, Examination
from resist.checking.references import check_references, preserved
from resist.checking.sharing import with_larger_weights
from resist.checking.trace import tensors_in
from resist.errors import UserError

__all__ = ["check_network", "choose_checked", "choose_with_runs", "tensors_in"]

log = logging.getLogger(__name__)


def check_network(model: nn.Module, chains: Sequence[Chain], example: object) -> float:
    """Check that a network satisfies the laws above.

    The test runs copies with larger weights, because initial weights can be so small that a difference between blocks
    is less than the rounding. It needs memory for about two copies of the network, and changes neither the network
    nor any random state.

    Args:
        model: The full network.
        chains: Chains to partition.
        example: One batch, or a function that calls a network with one, `lambda model: model(images)` for example; see
            `resist.blocks.example.as_forward`.

    Returns:
        Largest difference between the outputs of the first law, relative to the largest number; 0.0 means bit for bit.

    Raises:
        UserError: If the network breaks a law, with the chain and the reason, or if it cannot be run.
    """
    with torch.device("cpu"), preserved(model):
        return Examiner(model, example).examine(chains).difference


def choose_checked(model: nn.Module, names: Sequence[str], example: object) -> tuple[Chain, ...]:
    """Choose the chains to partition, and check the network with an example.

    Args:
        model: The full network. It is not changed.
        names: Names of chains; see `resist.blocks.chains.choose_chains`.
        example: One batch, or a function that calls a network; see `resist.blocks.example.as_forward`.

    Returns:
        The chains. The log has a line for each whose blocks keep their places, and for each that "all" leaves out
        because it breaks a law.

    Raises:
        UserError: If there is no such chain, or if the network breaks a law; see `check_network`.
    """
    return choose_with_runs(model, names, example)[0]


def choose_with_runs(
    model: nn.Module, names: Sequence[str], example: object, *, needed: bool = True
) -> tuple[tuple[Chain, ...], tuple[Chain, ...]]:
    """Do the same as `choose_checked`, and return all runs of blocks that were tried, too.

    Args:
        model: As there.
        names: As there.
        example: As there.
        needed: As in `resist.blocks.chains.choose_chains`.
    """
    try:
        with torch.device("cpu"), preserved(model):
            examiner = Examiner(model, example)
            seen = examiner.look()
            runs = try_runs(model, seen, every=bool(names))
            chosen = chosen_of(runs, model, names, seen, needed=needed)
            if tuple(names) == (ALL,):
                return examiner.choose_all(runs, seen), runs
            chains = tuple(examiner.with_form(chain, seen) for chain in chosen)
            return examiner.examine(chains).chains if len(chains) > 1 else chains, runs
    except UserError:
        raise
    except Exception as error:  # models of users can do anything; all processes have to go on together
        raise UserError(
            f"the network could not be checked with `example` ({describe(error)}); give another batch, or "
            "example=False to go without"
        ) from error


class Examiner:
    """A network with larger weights, and an example.

    Args:
        model: The full network. It is run, so attributes and modes have to be restored; see `preserved`.
        example: One batch, or a function that calls a network.

    Raises:
        UserError: If the network cannot be run, or copies of it do not compute what it computes.
    """

    def __init__(self, model: nn.Module, example: object) -> None:
        self._model = model
        self._rehearsal = Rehearsal(as_forward(example), model)
        check_references(self._rehearsal, model)
        self._rehearsal.forbid(model)
        self._rehearsal.products.clear()
        self._base = with_larger_weights(self._rehearsal, model)

    def look(self) -> Seen:
        """Record what the example shows of the blocks."""
        return look(self._rehearsal, self._model, self._base)

    def examine(self, chains: Sequence[Chain]) -> Checked:
        """Check the laws for some chains.

        Args:
            chains: Chains to partition.

        Returns:
            The chains, with places of hidden states.

        Raises:
            UserError: If the network breaks a law.
        """
        return Examination(self._rehearsal, self._base, tuple(chains)).run()

    def with_form(self, chain: Chain, seen: Seen, others: tuple[Chain, ...] = ()) -> Chain:
        """Choose the form of a chain by trials: compact where that is right, else in place.

        Args:
            chain: A chain of the network.
            seen: What the example shows.
            others: Chains that are partitioned together with it.

        Returns:
            The chain, with places of hidden states. The log has a line if it is in place.

        Raises:
            UserError: If it is right in neither form.
        """
        try:
            return self.examine((*others, replace(chain, form=COMPACT))).chains[-1]
        except UserError as error:
            placed = in_place(chain, self._model, seen.calls)
            if placed is None:
                raise
            reason = error
        try:
            checked = self.examine((*others, placed)).chains[-1]
        except UserError as error:
            # Of a chain that is wrong in both forms, the reason for the usual one is given.
            raise (error if chain.by_name else reason) from None
        log.info(
            "chain %s: the network takes its blocks by name or position, so sub-networks keep each block at its place, "
            "and pass over the others; torch.compile compiles again in each round",
            chain.name,
        )
        return checked

    def choose_all(self, runs: Sequence[Chain], seen: Seen) -> tuple[Chain, ...]:
        """Choose all chains that are right together.

        Args:
            runs: The runs of the network, the best first.
            seen: What the example shows.

        Returns:
            The chains. The log has a line for each that breaks a law.

        Raises:
            UserError: If there is none.
        """
        reasons: list[UserError] = []

        def accept(chosen: tuple[Chain, ...], run: Chain) -> Chain | str:
            try:
                return self.with_form(run, seen, chosen)
            except UserError as error:
                reasons.append(error)
                log.warning("chain %s is left undivided: %s", run.name, error)
                return str(error)

        chosen, _ = all_chains(runs, self._model, accept)
        if not chosen:
            raise reasons[0]
        return chosen
