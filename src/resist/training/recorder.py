"""Where a run's records go, in the process that is_main: the run directory, the loggers, and the display."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from resist.errors import UserError, WorkerLostError
from resist.job import Job
from resist.planning.schedule import allreduce_bytes
from resist.report.units import amount
from resist.runs.config import TrainConfig
from resist.runs.directory import Run, title_of
from resist.training.loggers import Logger
from resist.training.progress import TIMED, Display, Summary


class Recorder:
    """Takes the record of each round; a context. Does nothing where `run` is None.

    rounds: the rounds that the run will have.
    ending: whether the run was told to end after this round.
    """

    def __init__(
        self, config: TrainConfig, rounds: int, run: Run | None, loggers: Sequence[Logger], ending: Callable[[], bool]
    ) -> None:
        self.run, self.rounds, self._loggers, self._ending = run, rounds, list(loggers), ending
        self.summary = Summary(rounds)
        self.display = Display(title_of(config), self.summary, live=not config.machine.no_progress, remark=self._remark)
        self._state, self._error = "", ""
        for record in run.past if run else ():
            self.display.add(record, fresh=False)

    def __enter__(self) -> "Recorder":
        if self.run is not None:
            self.run.state("running", self.rounds)
            self.display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.run is None:
            return
        self._state = self._state or ("finished" if error is None else "failed")
        self.display.stop()
        for logger in self._loggers:
            logger.close()
        self.run.close()
        if error is None:
            self.run.state(self._state, self.rounds)
        elif isinstance(error, KeyboardInterrupt):
            self.run.state("failed", self.rounds, "ended by a second interruption")
        else:
            known = isinstance(error, UserError | WorkerLostError)
            self.run.state("failed", self.rounds, str(error) if known else f"{type(error).__name__}: {error}")

    def round(self, record: Mapping[str, Any]) -> None:
        """Write a round's record, and show it."""
        if self.run is None:
            return
        self.run.append(record)
        for logger in list(self._loggers):
            if failure := logger.write(record):
                self._loggers.remove(logger)
                self.display.console.print(f"resist: {failure}; training goes on without it", markup=False)
        self.display.add(record)

    def reached(self, budgets: Mapping[str, float], more_s: float) -> bool:
        """Whether a budget is used up by the round that is about to end, `more_s` seconds after the last record."""
        summary = self.summary
        spent = {
            "seconds": sum(summary.seconds.get(name, 0.0) for name in TIMED) + more_s,
            "rounds": summary.done + 1,
            "gb": summary.bytes / 1e9,
            "accuracy": summary.accuracy or 0.0,
        }
        return any(spent[name] >= budget for name, budget in budgets.items())

    def interrupted(self, *, saved: bool) -> None:
        """Say that the run was stopped by a signal, and how it goes on."""
        self._state = "interrupted"
        if self.run is not None:
            self.display.stop()
            then = f"to go on: resist train --resume {self.run.path}" if saved else "nothing was saved"
            print(f"interrupted after round {self.summary.done}; {then}")

    def finish(self, job: Job) -> None:
        """The account at the end."""
        if self.run is None or not self.summary.seconds:
            return
        self.display.stop()
        summary, workers, subnet = self.summary, job.strategy.workers, job.workers[0].subnet
        whole = subnet.numel([chain.num_blocks for chain in job.chains])
        everything = workers * allreduce_bytes(whole * subnet.dtype.itemsize, workers) * summary.done
        busy = sum(summary.seconds[name] for name in TIMED)
        print(
            f"test {summary.score:<10} {100 * (summary.accuracy or 0):.2f} % of the full network\n"
            f"time            {busy:.1f} s: "
            + ", ".join(f"{name} {summary.seconds[name]:.1f}" for name in TIMED)
            + f"; evaluation {summary.seconds['evaluate']:.1f} s beside it\n"
            f"a worker        held {subnet.flat.numel() / whole:.0%} of the network's {whole:,} weights\n"
            f"sent            {amount(summary.bytes)} by all workers; local SGD: {amount(everything)} of weights\n"
            f"kept in         {self.run.path}; a page about it: resist report {self.run.path}",
            flush=True,
        )

    def _remark(self) -> str:
        ending = self._ending() and not self._state
        return "ending after this round; Ctrl-C again ends at once, unsaved" if ending else ""
