"""The records of a run, in the main process: written to the run directory, to loggers and to the display."""

import logging
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from resist.errors import UserError, WorkerLostError, quoted, shown
from resist.job import Job
from resist.planning.plan import RoundPlan
from resist.planning.schedule import allreduce_bytes
from resist.report.units import amount
from resist.runs.config import TrainConfig
from resist.runs.directory import Run, title_of
from resist.runs.history import read_table
from resist.runs.records import clean, closing_seconds, wall_parts
from resist.training.interruption import Stage, announcement
from resist.training.loggers import Logger
from resist.training.progress import Display, Summary

log = logging.getLogger(__name__)


class Recorder:
    """Keep the record of each round. A context manager; it does nothing where `run` is None.

    Args:
        config: the configuration of the run.
        rounds: the number of rounds that the run will have.
        run: the run directory, or None in processes that do not write.
        loggers: where else records go. One that fails is dropped, with a message.

    Attributes:
        summary: running totals of the records.
        display: what the user sees of them.
        closing_s: seconds from the last record to the end of the run; at first those of the run that is continued.
    """

    def __init__(self, config: TrainConfig, rounds: int, run: Run | None, loggers: Sequence[Logger]) -> None:
        self.run, self.rounds, self._loggers = run, rounds, list(loggers)
        self._wire = config.method.wire_text
        self.summary = Summary(rounds)
        self.display = Display(title_of(config), self.summary, live=not config.machine.no_progress)
        self._generations: list[Mapping[str, Any]] = []
        self._state, self._records = "", list[Mapping[str, Any]](run.past if run else ())
        self.closing_s = closing_seconds(read_table(run.path / "state.json", [])) if run is not None else 0.0
        for record in run.past if run else ():
            self.display.add(record, fresh=False)

    def __enter__(self) -> "Recorder":
        if self.run is not None:
            self.run.state("running", self.rounds)
            self.display.__enter__()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run is None:
            return
        self._state = self._state or ("finished" if error is None else "failed")
        self.display.stop()
        for logger in self._loggers:
            if failure := logger.close():
                self._print(f"resist: {failure}")
        self.run.close()
        if error is None:
            self.run.state(self._state, self.rounds, closing_s=round(self.closing_s, 6))
        elif isinstance(error, KeyboardInterrupt):
            self.run.state("failed", self.rounds, "ended by a second interruption")
        else:
            known = isinstance(error, UserError | WorkerLostError)
            self.run.state("failed", self.rounds, str(error) if known else f"{type(error).__name__}: {error}")

    def round(self, record: Mapping[str, Any]) -> None:
        """Write the record of a round, log it and show it.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        if self.run is None:
            return
        if self._generations:
            record, self._generations = {**record, "generations": self._generations}, []
        self.run.append(record)
        self._records.append(record)
        self._log(record)
        self.display.add(record)

    def _log(self, record: Mapping[str, Any]) -> None:
        for logger in list(self._loggers):
            if failure := logger.write(record):
                self._loggers.remove(logger)
                self._print(f"resist: {failure}; training continues without it")

    def complete(
        self, round_number: int, step: int, scores: Mapping[str, float], evaluate_s: float, startup_s: float
    ) -> None:
        """Add a test to the record of the last round, which lacks it, or was lost with the process that had it.

        Args:
            round_number: the round, counted from 1.
            step: steps done.
            scores: what the test has found, by name.
            evaluate_s: seconds of the test.
            startup_s: seconds of the command until the test.

        Raises:
            UserError: metrics.jsonl cannot be written.
        """
        if self.run is None:
            return
        last = next(iter(self._records[-1:]), None)
        if last is None or last["round"] != round_number:
            times = {"seconds": {"evaluate": evaluate_s}, "startup_s": startup_s}
            self.round(clean({"round": round_number, "step": step, "last": True, **scores_entry(scores), **times}))
            return
        values = {
            **scores_entry(scores),
            "seconds": {**last["seconds"], "evaluate": round(last["seconds"].get("evaluate", 0.0) + evaluate_s, 6)},
            "startup_s": round(last.get("startup_s", 0.0) + startup_s, 6),
        }
        self.run.amend(values)
        self._records[-1] = {**last, **values}
        self._log(self._records[-1])
        self.display.restart(self.rounds)
        self.summary = self.display.summary
        for record in self._records:
            self.display.add(record, fresh=record is self._records[-1])

    def take_over(self, config: TrainConfig) -> None:
        """Go on with options of which one was chosen during the run, and write them to its directory.

        Args:
            config: the configuration of the run.

        Raises:
            UserError: config.json cannot be written.
        """
        self._wire = config.method.wire_text
        if self.run is not None:
            self.run.rewrite(config)

    def extend(self, rounds: int) -> None:
        """Go on with another number of rounds.

        Args:
            rounds: the number of rounds that the run will have.
        """
        self.rounds = self.summary.rounds = rounds
        if self.run is not None:
            self.run.state("running", rounds)

    def retire(self) -> None:
        """Write nothing more: another recorder does."""
        self.display.stop()
        for logger in self._loggers:
            logger.close()
        if self.run is not None:
            self.run.close()
        self.run = None

    def regrouped(self, generation: Mapping[str, Any], text: str) -> None:
        """Print that the members of the run have changed; the next record has it.

        Args:
            generation: who left and came, and where the others go on; see `resist.runs.records.clean`.
            text: the same as a line.
        """
        if self.run is not None:
            self._generations.append(generation)
            self._print(text)

    def reached(self, budgets: Mapping[str, float], more_s: float) -> bool:
        """True where the round that is about to end uses up a budget.

        Args:
            budgets: limits by "seconds", "rounds", "gb" and "accuracy", see `TrainConfig.budgets`.
            more_s: training seconds since the last record.
        """
        summary = self.summary
        spent = {
            "seconds": summary.training_s + more_s,
            "rounds": summary.done + 1,
            "gb": summary.bytes / 1e9,
            "accuracy": summary.accuracy or 0.0,
        }
        return any(spent[name] >= budget for name, budget in budgets.items())

    def ending(self, stage: Stage) -> None:
        """Print when the run will end, because a signal asks for it.

        Args:
            stage: what the run does at this moment.
        """
        if self.run is not None:
            self._print(announcement(stage, self.summary.recent, self.display.silent_s))

    def interrupted(self, *, saved: bool) -> None:
        """Print that a signal stopped the run, and how to resume it.

        Args:
            saved: there is a checkpoint to resume from.
        """
        self._state = "interrupted"
        if self.run is not None:
            self.display.stop()
            then = f"to continue: resist train `resume={self.run.path}`" if saved else "nothing was saved"
            log.info("interrupted after round %d; %s", self.summary.done, then)

    def finish(self, job: Job) -> None:
        """Print the totals of the run."""
        if self.run is None or not self.summary.seconds:
            return
        self.display.stop()
        summary, weights = self.summary, weights_of(job, job.plan)
        full, local_sgd = weights["all"], weights["local_sgd_bytes"] * summary.done
        wire = f" ({self._wire})" if self._wire != "fp32" else ""
        seconds = wall_parts(self._records, self.closing_s)
        parts = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
        log.info(
            f"test {summary.score:<10} {100 * (summary.accuracy or 0):.2f} % of the full network\n"
            f"time            {sum(seconds.values()):.1f} s: {parts}\n"
            f"largest worker  {weights['largest'] / full:.0%} of the network's {full:,} weights\n"
            f"sent            {amount(summary.bytes)} by all workers{wire}; local SGD: {amount(local_sgd)} of weights\n"
            f"saved to        {shown(self.run.path)}; report: resist report {quoted(self.run.path)}"
        )

    def _print(self, text: str) -> None:
        self.display.console.print(text, markup=False, soft_wrap=True)


def scores_entry(scores: Mapping[str, float]) -> dict[str, object]:
    """The entries of a round in metrics.jsonl for the scores of the full network; {}: it was not tested."""
    return {"accuracy": next(iter(scores.values()), None), **({"scores": dict(scores)} if len(scores) > 1 else {})}


def weights_of(job: Job, plan: RoundPlan) -> dict[str, int]:
    """The weights of the network, those of the largest worker, and what local SGD sends in a round.

    Args:
        job: the job.
        plan: the plan of the round.

    Returns:
        "all" and "largest" as numbers of weights; "local_sgd_bytes", sent by all workers in the same wire format.
    """
    subnet, workers = job.workers[0].subnet, plan.workers
    everything = [chain.num_blocks for chain in job.chains]
    return {
        "all": subnet.numel(everything),
        "largest": max(subnet.numel(plan.capacities(worker)) for worker in range(workers)),
        "local_sgd_bytes": workers * allreduce_bytes(subnet.num_bytes(everything, job.wire.shared), workers),
    }
