"""The end of a round: the plans before and after, and what moves between them."""

from dataclasses import dataclass, field
from functools import cached_property

import torch

from resist.planning.plan import RoundPlan, keyed_int
from resist.planning.strategy import Strategy
from resist.planning.wire import Wire
from resist.subnet.buffers import Part

SHARED: Part = (None, 0)


@dataclass(frozen=True)
class RoundEnd:
    """The end of one round, equal in all processes.

    Attributes:
        round: Number of the round that ends, from 0.
        step: Optimizer steps done.
        strategy: Strategy of this round: its policy for the optimizer's state, and its outer optimizer.
        plan: Plan of this round.
        next_plan: Plan of the next round.
        wire: Formats of what is sent.
        seed: Seed of the job, for stochastic rounding.
        streamed: Fragments that were averaged in the course of this round; None: it has no fragments.
        regroups: The members change: some workers of `plan` may hold nothing, and get everything from the others.
        steps: The round has steps, so that the outer optimizer takes its own.
    """

    round: int
    step: int
    strategy: Strategy
    plan: RoundPlan
    next_plan: RoundPlan
    wire: Wire = field(default_factory=Wire)
    seed: int = 0
    streamed: frozenset[int] | None = None
    regroups: bool = False
    steps: bool = True

    @cached_property
    def held_by_all(self) -> bool:
        """True if every worker holds every block, before and after.

        Blocks then follow the rule of the shared part.
        """
        return self.plan.held_by_all and self.next_plan.held_by_all

    def of_everyone(self, part: Part) -> bool:
        """Return True if all workers have a part, and keep it."""
        return part == SHARED or self.held_by_all

    def moves_state(self, part: Part) -> bool:
        """Return True if the optimizer's state of a part is exchanged."""
        policy = self.strategy.optimizer_state
        return policy == "average" or (policy == "travel" and not self.of_everyone(part))

    def draws(self, device: torch.device, *key: object) -> torch.Generator:
        """Make the generator of one stochastic rounding: a function of seed, round and key."""
        return torch.Generator(device).manual_seed(keyed_int("wire", self.seed, self.round, *key))
