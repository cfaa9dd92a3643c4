"""`capacities=auto`: blocks move from slow workers to fast ones, by the times of the last rounds."""

import logging
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from resist.cost.block_costs import block_costs
from resist.cost.footprint import mean_square
from resist.job import Job
from resist.planning.balance import balanced, slowness
from resist.planning.capacities import Capacities
from resist.runs.config import TrainConfig
from resist.tasks import Task, image_shape

ROUNDS = 5  # whose times decide: two that are disturbed must not

log = logging.getLogger(__name__)


class Balancing:
    """The capacities of a run that are chosen while it goes on.

    All processes decide the same, from what they have agreed on.

    Args:
        config: The options.
        task: Builds the network.
        job: The job.

    Raises:
        UserError: If the work of a block cannot be counted.
    """

    def __init__(self, config: TrainConfig, task: Task, job: Job) -> None:
        loss = mean_square
        if config.network.task == "detection":
            from resist.models.faster_rcnn import dense_pass as loss
        self._job = job
        self._costs = block_costs(task.network, job.chains, image_shape=image_shape(config.network), loss=loss)
        self._slow: deque[list[float]] = deque(maxlen=ROUNDS)

    def end_round(self, config: TrainConfig, step_s: Sequence[float]) -> TrainConfig:
        """Change the capacities of the next rounds, if that makes the slowest worker faster.

        Call it before the round is synchronized.

        Args:
            config: The options.
            step_s: Seconds of a step of each worker in this round.

        Returns:
            The options, with the capacities from the next round on; the same record where nothing changes.
        """
        job, now, following = self._job, self._job.plan, self._job.plan_of(self._job.round + 1)
        if not job.strategy.at(job.round).partitions:
            return config
        workers = range(now.workers)
        self._slow.append([slowness(step_s[w], self._costs, now.capacities(w)) for w in workers])
        if len(self._slow) < ROUNDS:
            return config
        slow = [statistics.median(times) for times in zip(*self._slow, strict=True)]
        before = [list(plan.capacities) for plan in following.plans]
        after = balanced(before, [chain.num_blocks for chain in job.chains], self._costs, slow)
        if after == before:
            return config
        by_chain = dict(zip((chain.name for chain in job.chains), map(tuple, after), strict=True))
        job.change_capacities(Capacities(by_chain=by_chain))
        if 0 in job.transport.hosted:
            log.info(
                "capacities from round %d on: %s; by the times of the last rounds", job.round + 2, _shown(by_chain)
            )
        return _with_capacities(config, job.round + 1, by_chain)


def _with_capacities(config: TrainConfig, first: int, by_chain: Mapping[str, Sequence[int]]) -> TrainConfig:
    """Write capacities from a round on into the options, as `capacities_by_round`."""
    given = tuple(text for text in config.method.capacities_by_round if not text.startswith((f"{first}:", f"{first}=")))
    more = tuple(f"{first}:{chain}={','.join(map(str, held))}" for chain, held in by_chain.items())
    return replace(config, method=replace(config.method, capacities_by_round=(*given, *more)))


def _shown(by_chain: Mapping[str, Sequence[int]]) -> str:
    return "; ".join(f"{chain} {' '.join(map(str, held))}" for chain, held in by_chain.items())
