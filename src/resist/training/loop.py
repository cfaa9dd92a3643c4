"""The training loop around a `Job`: steps, rounds, the record of each round, evaluation and checkpoints."""

import json
import math
import threading
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import resist
from resist.errors import AgreedError, UserError
from resist.job import Job
from resist.runs.checkpoint import Checkpoints
from resist.runs.config import TrainConfig
from resist.runs.directory import Run
from resist.runs.records import training_bytes
from resist.subnet.randomness import seeded_rng
from resist.tasks import Task
from resist.training.balancing import Balancing
from resist.training.device import Clock, naming_nondeterminism
from resist.training.evaluation import Evaluation
from resist.training.interruption import Stage, interruption
from resist.training.launcher import INTERRUPTED
from resist.training.loggers import Logger
from resist.training.lr_schedule import rate
from resist.training.overlap import take_up_fragments
from resist.training.recorder import Recorder, scores_entry
from resist.training.round_report import OpenRound, RoundReport, entries_of
from resist.training.trainer import Trainer

NOT_SAVED = 130  # exit status: stopped by a signal, with nowhere to save to
LEAVING = -1  # in place of an exit status: this process leaves the others, which go on


class Training:
    """A run under way, as this process sees it: rounds of steps, each round's end, its record.

    Args:
        config: The options.
        task: Data, loss and tests.
        job: The job, at the step from which to continue.
        trainers: One for each hosted worker.
        run: The run directory; None in all but the main process.
        loggers: Further places for the records; none in all but the main process.
        checkpoints: Saves the job.
        began: When the run, or what came before its first step here, began, in seconds of `time.monotonic`.

    Attributes:
        losses: Those of the steps of the round under way, each (hosted workers,).
        plan: The plan of the round under way.
        round_number: The round under way, counted from 1, until its record and checkpoint are begun.
        newcomers: Returns True where other processes wait to be taken in. Only runs whose members may change have it.
        may_leave: Processes that get a signal to end leave the others, which go on, unless all get it.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        job: Job,
        trainers: Sequence[Trainer],
        run: Run | None,
        loggers: Sequence[Logger],
        checkpoints: Checkpoints,
        began: float,
    ) -> None:
        self.config, self.task, self.job, self.run = config, task, job, run
        self.trainers, self.loggers, self.checkpoints = trainers, loggers, checkpoints
        self.optimizers = tuple(trainer.optimizer for trainer in trainers)
        self.device = job.workers[0].subnet.device
        self.clock = Clock(self.device)
        self.round_number, self.plan = job.round + 1, job.plan
        self.losses: list[Tensor] = []
        self.lr = self.compute_s = 0.0
        self.newcomers: Callable[[], bool] | None = None
        self.may_leave = False
        self.failed: str | None = None  # an error that ends the run when all processes know of it
        self.stage = Stage.ROUND
        self.exchange_s = 0.0  # of the last synchronization, in this process
        self.exchange_bytes = 0  # sent by all workers in it
        self.training_s = 0.0  # in this process
        self.began, self.startup_s, self.checkpoint_s = began, 0.0, 0.0
        self.balancing = Balancing(config, task, job) if config.method.capacities == "auto" else None

    def train(self, steps: int) -> int:
        """Train up to step `steps`.

        Returns:
            The exit status.

        Raises:
            UserError: A batch or an image could not be read, or a file not be written.
            DivergedError: A worker's numbers are no longer finite.
            WorkerLostError: Another process is lost.
        """
        self.prepare(steps)
        recorder = Recorder(self.config, self.rounds, self.run, self.loggers)
        with interruption(lambda: recorder.ending(self.stage)) as interrupted, recorder:
            status = self.go_on(steps, recorder, interrupted)
        assert status is not None, "nobody waits to be taken in"
        return status

    def prepare(self, steps: int) -> None:
        """Prepare the tests of a run up to step `steps`. Waits for all processes."""
        job = self.job
        self.rounds = job.round - (-(steps - job.step_index) // self.config.method.local_steps)
        self.evaluation = Evaluation(self.config, self.task, job, self.rounds, self.run)

    def go_on(self, steps: int, recorder: Recorder, interrupted: threading.Event) -> int | None:
        """Train up to step `steps`, after `prepare`.

        Args:
            steps: Steps of the run.
            recorder: Keeps the records.
            interrupted: Set where a signal asks this process to end.

        Returns:
            The exit status. None: a round has ended, and members change now. LEAVING: this one leaves.

        Raises:
            UserError, DivergedError, WorkerLostError: See `train`.
        """
        config, job = self.config, self.job
        self.clock.lap()
        self.startup_s = time.monotonic() - self.began
        self.checkpoint_s = recorder.closing_s  # of the time before, if the run continues
        if job.step_index >= steps:
            self._complete(recorder)
        for step in range(job.step_index, steps):
            self.lr = rate(config.optimization, step, steps)
            self.losses.append(self._step(step, self.lr))
            if job.steps_left > 1 and step < steps - 1:
                job.step(*self.optimizers)
                continue
            report = self._end_round(recorder, interrupted, last=step == steps - 1)
            self.losses.clear()
            self.compute_s = 0.0
            self.round_number, self.plan = job.round + 1, job.plan
            if report.interrupted:
                recorder.closing_s = self._close()
                recorder.interrupted(saved=self.checkpoints.possible)
                return INTERRUPTED if self.checkpoints.possible else NOT_SAVED
            if report.stop:
                break
            if step < steps - 1 and (report.leaving or report.newcomers):
                recorder.closing_s = self._close()
                own = {trainer.index for trainer in self.trainers}
                return LEAVING if own & report.leaving else None
            self.stage = Stage.ROUND
        recorder.closing_s = self._close()
        if self.evaluation.failed is not None:
            raise AgreedError(self.evaluation.failed)  # the main process knows it in any case
        recorder.finish(job)
        return 0

    def _complete(self, recorder: Recorder) -> None:
        """Test the network of a run that has done all its steps, and ended before the test, as by a signal."""
        self.stage = Stage.END
        scores = self.evaluation.test(last=True)
        if self.evaluation.failed is None:
            recorder.complete(self.job.round, self.job.step_index, scores, self.clock.lap(), self.startup_s)

    def open_round(self) -> OpenRound | None:
        """Return what this process knows of the round under way, whose record is not written; None before a step."""
        if not self.losses:
            return None
        lap, batch_size, sampler = self.clock.lap(), self.config.optimization.batch_size, self.trainers[0].sampler
        means = torch.stack(self.losses).cpu().mean(0).tolist()
        compute_s, wait_s = (self.compute_s, lap) if self.compute_s else (lap, 0.0)
        times = {"compute_s": round(compute_s, 6), "exchange_s": round(self.exchange_s, 6)}
        workers = [
            {"worker": trainer.index, "loss": loss if math.isfinite(loss) else None, **times}
            for trainer, loss in zip(self.trainers, means, strict=True)
        ]
        return OpenRound(
            number=self.round_number,
            complete=self.job.round >= self.round_number,
            steps=len(self.losses),
            batch_size=batch_size,
            images_per_epoch=sampler.images_per_epoch,
            lr=self.lr,
            plan=self.plan,
            report=RoundReport(workers, compute_s),
            seconds={"compute": compute_s, "wait": wait_s, "checkpoint": self.checkpoint_s},
        )

    def _step(self, step: int, lr: float) -> Tensor:
        """Take a step with every hosted worker; returns their losses, (hosted workers,).

        Where a batch cannot be read, the losses are nan until the round ends: then all processes end with that error.
        """
        if self.failed is None and self.evaluation.failed is None:
            try:
                losses: list[Tensor] = []
                for trainer in self.trainers:
                    with seeded_rng(self.job.step_seed(trainer.index), self.device), naming_nondeterminism():
                        losses.append(trainer.step(step, lr))
                return torch.stack(losses)
            except UserError as error:
                if self.job.strategy.at(self.job.round).every_step:
                    raise  # the other processes wait within this step
                self.failed = str(error)
        return torch.full((len(self.trainers),), math.nan, device=self.device)

    def _end_round(self, recorder: Recorder, interrupted: threading.Event, *, last: bool) -> RoundReport:
        """Do the last step of a round: compare, synchronize, test, record, save.

        The checkpoint comes last: a run that resumes from it then has the record of the round, and at the end the
        network.
        """
        job, lap, batch_size = self.job, self.clock.lap, self.config.optimization.batch_size
        losses, compute_s = self.losses, lap()
        self.compute_s = compute_s
        stop = self.run is not None and recorder.reached(self.config.budgets(), compute_s)
        values = torch.stack(losses).cpu()
        nonfinite = self._nonfinite(values)
        if self.run is not None:
            self.failed = self.failed or self.run.taken_over()
        self.training_s += compute_s
        image_s = compute_s / (batch_size * values.numel())
        report = self._compare(values.mean(0).tolist(), compute_s, stop, interrupted.is_set(), image_s)
        last = report.stop or last
        self._choose_capacities(report, len(losses), recorder)
        self.stage = Stage.SAVE if report.interrupted else Stage.END if last else Stage.BETWEEN
        seconds = {"compute": report.compute_s, "wait": max(0.0, lap() - report.compute_s + compute_s)}
        if not job.step(*self.optimizers, nonfinite=nonfinite):
            job.synchronize(nonfinite)  # the last round may be short
        seconds["sync"] = self.exchange_s = lap()
        self._choose_fragments(report, len(losses), recorder)
        self.training_s += seconds["wait"] + seconds["sync"]
        seconds["checkpoint"], self.checkpoint_s = self.checkpoint_s, 0.0
        scores: dict[str, float] = {}
        if (job.round in self.evaluation.rounds or last) and not report.interrupted:
            scores = self.evaluation.test(last=last)
        seconds["evaluate"] = lap()
        epoch = job.step_index * batch_size / self.trainers[0].sampler.images_per_epoch
        self.exchange_bytes = training_bytes({"bytes": job.transport.bytes})
        recorder.round(
            {
                **{"round": job.round, "step": job.step_index, "epoch": round(epoch, 4), "lr": self.lr},
                **scores_entry(scores),
                **({"last": True} if last else {}),
                "images": len(losses) * batch_size * len(report.workers),
                "seconds": {activity: round(value, 6) for activity, value in seconds.items()},
                **({"startup_s": round(self.startup_s, 6)} if self.startup_s else {}),
                **self.evaluation.entry(),
                **entries_of(job, report, self.plan),
            }
        )
        self.startup_s = 0.0
        if last or report.interrupted or job.round % self.config.run.checkpoint_rounds == 0:
            self.checkpoints.begin(job, self.optimizers, {"resist": resist.__version__})
        self.checkpoint_s = lap()  # with that of the record; recorded with the next round
        return report

    def _choose_fragments(self, report: RoundReport, steps: int, recorder: Recorder) -> None:
        """Choose the fragments of a run that leaves them to us, when a round and the exchange before it are measured.

        The first round is longer than others; all processes have the same report.
        """
        exchange_s = max(worker["exchange_s"] for worker in report.workers)
        if self.config.method.fragments == "auto" and exchange_s > 0:
            self.config = take_up_fragments(
                self.config,
                self.job,
                rounds=self.rounds,
                step_s=report.compute_s / steps,
                exchange_s=exchange_s,
                exchange_bytes=self.exchange_bytes,
            )
            recorder.take_over(self.config)

    def _choose_capacities(self, report: RoundReport, steps: int, recorder: Recorder) -> None:
        """Choose the capacities of the next rounds of a run that leaves them to us."""
        if self.balancing is not None:
            before, workers = self.config, sorted(report.workers, key=lambda worker: worker["worker"])
            self.config = self.balancing.end_round(before, [worker["compute_s"] / steps for worker in workers])
            if self.config is not before:
                recorder.take_over(self.config)

    def _close(self) -> float:
        """Wait until the last checkpoint is complete; returns the seconds since the last record."""
        self.checkpoints.finish()
        return self.checkpoint_s + self.clock.lap()

    def _nonfinite(self, losses: Tensor) -> dict[int, str]:
        """The first loss of each hosted worker that is not finite. losses: (steps, hosted workers)."""
        first_step = self.job.step_index + 1 - len(losses)
        reasons: dict[int, str] = {}
        for trainer, values in zip(self.trainers, losses.T, strict=True):
            wrong = (~values.isfinite()).nonzero()
            if len(wrong):
                step = int(wrong[0])
                reasons[trainer.index] = f"a loss of {float(values[step])} in step {first_step + step}"
        return reasons

    def _compare(
        self, losses: list[float], compute_s: float, stop: bool, interrupted: bool, image_s: float
    ) -> RoundReport:
        """Exchange losses, times and signals with the other processes. Waits for the slowest.

        Decides on tests. Raises AgreedError where a process has failed. losses: the mean of each hosted worker;
        image_s: seconds of computation for an image.
        """
        times = {"compute_s": round(compute_s / len(self.trainers), 6), "exchange_s": round(self.exchange_s, 6)}
        workers = [
            {"worker": trainer.index, "loss": loss if math.isfinite(loss) else None, **times}
            for trainer, loss in zip(self.trainers, losses, strict=True)
        ]
        text = json.dumps(
            {
                "workers": workers,
                "compute_s": compute_s,
                "stop": stop,
                "interrupted": interrupted,
                "failed": self.failed or self.evaluation.failed,
                "tests": self.evaluation.facts(image_s, self.training_s),
                **({} if self.newcomers is None else {"newcomers": self.newcomers()}),
            }
        )
        processes = [json.loads(text) for text in self.job.transport.all_gather_text(text)]
        for process in processes:
            if process["failed"] is not None:
                raise AgreedError(process["failed"])
        if processes[0]["tests"]:
            self.evaluation.decide([process["tests"] for process in processes], self.job.round + 1)
        signaled = [process for process in processes if process["interrupted"]]
        some_leave = self.may_leave and len(signaled) < len(processes)
        return RoundReport(
            workers=[worker for process in processes for worker in process["workers"]],
            compute_s=max(process["compute_s"] for process in processes),
            stop=any(process["stop"] for process in processes),
            interrupted=bool(signaled) and not some_leave,
            leaving={worker["worker"] for process in signaled if some_leave for worker in process["workers"]},
            newcomers=processes[0].get("newcomers", False),
        )
