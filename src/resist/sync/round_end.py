"""The end of a round: the plans before and after, and what moves between them."""

from dataclasses import dataclass
from functools import cached_property

from resist.planning.plan import RoundPlan
from resist.planning.strategy import Strategy
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
    """

    round: int
    step: int
    strategy: Strategy
    plan: RoundPlan
    next_plan: RoundPlan

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
