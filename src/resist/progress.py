"""What a person sees while a run goes on: a bar on a terminal, lines elsewhere, from one process."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from resist.job import Job
from resist.runs import Run
from resist.schedule import allreduce_bytes

# Without a terminal, seconds between two lines.
EVERY_S = 10.0

# Kinds of seconds that belong to training.
TIMED = ("compute", "wait", "sync")


class Progress:
    """Writes each round's record to the run directory and shows it. Does nothing where `run` is None."""

    def __init__(self, rounds: int, run: Run | None, past: Sequence[Mapping[str, Any]] = ()) -> None:
        self.rounds, self.run = rounds, run
        self.console = Console(highlight=False, soft_wrap=True)
        self.seconds: dict[str, float] = {}
        self.bytes = self.done = 0
        self.accuracy: float | None = None
        self.score = "accuracy"  # its name: of the scores of a task the one that counts
        self._last_line = 0.0
        self._bar = Bar(
            TextColumn("round"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=run is None or not self.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=rounds, state="")
        for record in past:
            self._account(record)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self.run is not None:
            self.run.close()

    def round(self, record: Mapping[str, Any]) -> None:
        if self.run is None:
            return
        self.run.append(record)
        self._account(record)
        state = f"loss {record['loss']:.4f}"
        if self.accuracy is not None:
            state += f"  {self.score} {100 * self.accuracy:.2f} %"
        self._bar.update(self._task, completed=record["round"], state=state)
        now = time.monotonic()
        if self._bar.disable and (record["accuracy"] is not None or now - self._last_line > EVERY_S):
            self._last_line = now
            passed = sum(self.seconds.values())
            self.console.print(f"round {record['round']}/{self.rounds}  {state}  {passed:.1f} s")

    def _account(self, record: Mapping[str, Any]) -> None:
        for kind, value in record["seconds"].items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + value
        self.done = record["round"]
        self.bytes += sum(num for kind, num in record["bytes"].items() if kind != "evaluate")
        if record["accuracy"] is not None:
            self.accuracy = record["accuracy"]
            self.score = next(iter(record.get("scores", ())), self.score)

    def reached(self, budgets: Mapping[str, float], more_s: float) -> bool:
        """Whether a budget is used up by the round that is about to end, `more_s` seconds after the last record."""
        spent = {
            "seconds": sum(self.seconds.get(name, 0.0) for name in TIMED) + more_s,
            "rounds": self.done + 1,
            "gb": self.bytes / 1e9,
            "accuracy": self.accuracy or 0.0,
        }
        return any(spent[name] >= budget for name, budget in budgets.items())

    def interrupted(self) -> None:
        """Say that the run was stopped by a signal, and how it goes on."""
        if self.run is not None:
            self._bar.stop()
            self.console.print(f"interrupted after round {self.done}; to go on: resist train --resume {self.run.path}")

    def finish(self, job: Job) -> None:
        """The account at the end."""
        if self.run is None or not self.seconds:
            return
        self._bar.stop()
        workers, subnet = job.strategy.workers, job.workers[0].subnet
        whole = subnet.numel([chain.num_blocks for chain in job.chains])
        everything = workers * allreduce_bytes(whole * subnet.dtype.itemsize, workers) * self.done
        busy = sum(self.seconds[name] for name in TIMED)
        lines = [
            f"test {self.score:<10} {100 * (self.accuracy or 0):.2f} % of the full network",
            f"time            {busy:.1f} s: " + ", ".join(f"{name} {self.seconds[name]:.1f}" for name in TIMED)
            + f"; evaluation {self.seconds['evaluate']:.1f} s beside it",
            f"a worker        held {subnet.flat.numel() / whole:.0%} of the network's {whole:,} weights",
            f"sent            {megabytes(self.bytes)} by all workers; local SGD: {megabytes(everything)} of weights",
            f"kept in         {self.run.path}",
        ]
        self.console.print("\n".join(lines))


def megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
