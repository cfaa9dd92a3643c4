"""Round report: what the processes know together of a round, and the entries of its record that come from it."""

import math
from dataclasses import dataclass, field
from typing import Any

from resist.job import Job
from resist.planning.plan import RoundPlan
from resist.training.recorder import weights_of


@dataclass(frozen=True)
class RoundReport:
    """Common knowledge of all processes before a round is averaged.

    Attributes:
        workers: For each worker its mean loss (None: not a number), its share of its process's seconds of compute, and
            the seconds that its process took for the synchronization before.
        compute_s: Seconds that the slowest process computed.
        stop: Whether a budget is used up, and the run ends after this round.
        interrupted: Whether a process received a signal to end, and the run ends.
        leaving: Workers whose processes received one, and leave the others, which go on.
        newcomers: Whether other processes wait to be taken in, as the main process sees it.
    """

    workers: list[dict[str, Any]]
    compute_s: float
    stop: bool = False
    interrupted: bool = False
    newcomers: bool = False
    leaving: set[int] = field(default_factory=set[int])


def entries_of(job: Job, report: RoundReport, plan: RoundPlan) -> dict[str, object]:
    """The entries of a round in metrics.jsonl that the job knows: losses, bytes, capacities and plans."""
    plans = {chain.name: chain_plan for chain, chain_plan in zip(job.chains, plan.plans, strict=True)}
    losses = [worker["loss"] for worker in report.workers if worker["loss"] is not None]
    return {
        "loss": sum(losses) / len(losses) if losses else math.nan,
        **({"dropped": job.dropped} if job.dropped else {}),
        **job.transport.take(),
        "capacity": {name: chain_plan.capacities for name, chain_plan in plans.items()},
        "plan": {name: chain_plan.blocks for name, chain_plan in plans.items()},
        "workers": report.workers,
        "weights": weights_of(job, plan),
    }


@dataclass(frozen=True)
class OpenRound:
    """A round under way when the members of the run changed, as one process knows it.

    Attributes:
        number: The round, counted from 1.
        complete: Whether it was synchronized before.
        steps: Steps that were done in it.
        batch_size: Images of a worker in each of them.
        images_per_epoch: Images in one pass of a worker.
        lr: The learning rate of the last of them.
        plan: The plan of the round.
        report: The loss and the times of this process.
        seconds: Its seconds by phase.
    """

    number: int
    complete: bool
    steps: int
    batch_size: int
    images_per_epoch: int
    lr: float
    plan: RoundPlan
    report: RoundReport
    seconds: dict[str, float]

    def record(self, job: Job, stayed: int) -> dict[str, object]:
        """Return the record of the round, which has ended with the change of members or before it.

        Args:
            job: The job, which has gone on.
            stayed: Number of workers that were there, and go on.
        """
        workers = self.plan.workers if self.complete else stayed
        epoch = job.step_index * self.batch_size / self.images_per_epoch
        return {
            **{"round": self.number, "step": job.step_index, "epoch": round(epoch, 4), "lr": self.lr},
            "accuracy": None,
            "images": self.steps * self.batch_size * workers,
            "seconds": {activity: round(value, 6) for activity, value in self.seconds.items()},
            **entries_of(job, self.report, self.plan),
        }
