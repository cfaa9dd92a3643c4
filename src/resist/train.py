"""Training as the command line does it: the loop around a `Job`, with data, rates, metrics and a run directory."""

import contextlib
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import resist
from resist.checkpoint import Checkpoints
from resist.comm import Transport, check_agreement, connect, together
from resist.config import TrainConfig
from resist.device import Clock, pick_device
from resist.errors import AgreedError, DivergedError, UserError, WorkerLostError
from resist.foreign import try_network
from resist.full import FILE, save_full
from resist.job import Job
from resist.loggers import Logger, open_loggers
from resist.plan import Plan
from resist.rates import evaluation_rounds, num_steps, rate
from resist.recorder import Recorder
from resist.rescue import write_diverged, write_safe_copies
from resist.resume import starting_point
from resist.runs import Run, default_out, mark, seen_after_a_while
from resist.tasks import Task, open_task
from resist.trainer import Trainer

INTERRUPTED = 75  # exit status: stopped by a signal, everything saved, go on with --resume
NOT_SAVED = 130  # exit status: stopped by a signal, with nowhere to save to


def train(config: TrainConfig) -> int:
    """Train by `config` as one process of the job, with all the workers that it hosts. Returns the exit status.

    The process that hosts worker 0 writes the run directory and speaks. Raises UserError for what was asked in vain and
    WorkerLostError when another process goes away.
    """
    config.check()
    device = pick_device(config.machine.device)
    transport = connect(config.method.workers, device, config.machine.timeout_s)
    try:
        task = _open_everywhere(config, transport)
        check_agreement(transport, {**config.digest(), "resist": resist.__version__, "data set": task.digest()})
        task = task.to(device)
        speaks = 0 in transport.hosted
        images_per_epoch = together(transport, lambda: _images_per_epoch(config, task))
        config = config.with_warmup_rounds(images_per_epoch)
        for note in task.notes if speaks else ():
            print(f"resist: {note}", flush=True)
        together(transport, lambda: try_network(config.network) if speaks else None)
        start = starting_point(config, transport, speaks)
        job = Job(
            task.network,
            config.strategy(),
            chains=config.network.chain,
            seed=config.run.seed,
            batchnorm=config.method.batchnorm,
            scale=config.scale(),
            device=device,
            channels_last=config.machine.channels_last,
            transport=transport,
            nonfinite=config.method.nonfinite,
            safety=config.method.safety == "copy",
            start=(start.round, start.step),
        )
        if speaks:
            for chain in job.chains:
                held = " ".join(map(str, job.plans[chain.name].capacities))
                print(f"chain {chain.name}: {chain.num_blocks} blocks, the workers hold {held}", flush=True)
                if chain.caveat:
                    print(f"note: {chain.caveat}", flush=True)
        trainers = [Trainer(config, worker, task) for worker in job.workers]
        steps = num_steps(config.optimisation, images_per_epoch)
        if job.step_index >= steps:
            return _all_done(config.run.resume or Path(), steps, speaks)
        together(transport, lambda: start.restore(job, tuple(trainer.optimizer for trainer in trainers)))
        out = config.run.resume or config.run.out or default_out(config)
        resume_round = None if config.run.resume is None else job.round
        run = together(transport, lambda: Run(out, config, resume_round) if speaks else None)
        out = Path(transport.gather_text(str(out))[0])  # the time of the first process, where it is in the name
        loggers = together(transport, lambda: open_loggers(config, run.path, run.past) if run else [])
        checkpoints = Checkpoints(out / "checkpoints", transport, possible=_seen_by_all(out, transport))
        training = Training(config, task, job, trainers, run, loggers, checkpoints)
        try:
            return _surviving(out, job, lambda: training.go_on(steps))
        finally:
            checkpoints.abandon()
    finally:
        transport.close()


def _seen_by_all(out: Path, transport: Transport) -> bool:
    """Whether all processes see the run directory that the first one has made. Says so where they do not."""
    seen = seen_after_a_while(out, transport.gather_text(mark(out))[0])
    blind = [str(process) for process, text in enumerate(transport.gather_text(str(seen))) if text != "True"]
    if blind and 0 in transport.hosted:
        print(
            f"note: no checkpoints: process {', '.join(blind)} does not see {out} as process 0 does; give --out in a "
            "directory that all hosts share",
            flush=True,
        )
    return not blind


def _all_done(path: Path, steps: int, speaks: bool) -> int:
    """The exit status of a run that goes on and has no step left to do: 0 where its network is there."""
    if not (path / FILE).exists():
        raise AgreedError(
            f"the run has done all its {steps} steps, but {path / FILE} is not there; move the newest folder of "
            f"{path / 'checkpoints'} away to go on from the one before"
        )
    if speaks:
        print(f"the run has done all its {steps} steps; its network is {path / FILE}")
    return 0


def _surviving(out: Path, job: Job, action: Callable[[], int]) -> int:
    """`action()`; where it ends because a worker was lost or diverged, what this process has is written first."""
    try:
        return action()
    except WorkerLostError as lost:
        kept = ""
        if job.safe:
            write_safe_copies(out / "rescue", job)
            kept = f"; safe copies of round {job.safe[-1].round} are in {out / 'rescue'}"
        raise WorkerLostError(f"round {job.round}: {lost}{kept}; go on with resist train --resume {out}") from lost
    except DivergedError as error:
        write_diverged(out / "diverged", job)
        if job.safe:
            write_safe_copies(out / "rescue", job)
        where = f"the weights are in {out / 'diverged'}; to go on from before: --resume {out} --lr ..."
        raise DivergedError(f"{error}; {where}") from error


@dataclass(frozen=True)
class News:
    """What all processes know before a round is folded.

    workers:   each worker's mean loss (None: not a number), its share of its process's seconds of compute, and the
               seconds that its process took for the synchronisation before.
    compute_s: seconds that the slowest process computed.
    stop:      whether a budget is used up, and the run ends after this round.
    interrupted: whether a process was told to end by a signal.
    """

    workers: list[dict[str, Any]]
    compute_s: float
    stop: bool
    interrupted: bool


class Training:
    """A run under way, as this process sees it: rounds of steps, each round's end, its record."""

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        job: Job,
        trainers: Sequence[Trainer],
        run: Run | None,
        loggers: Sequence[Logger],
        checkpoints: Checkpoints,
    ) -> None:
        self.config, self.task, self.job, self.run = config, task, job, run
        self.trainers, self.loggers, self.checkpoints = trainers, loggers, checkpoints
        self.optimizers = tuple(trainer.optimizer for trainer in trainers)
        self.device = job.workers[0].subnet.device
        self.clock = Clock(self.device)
        self.failed: str | None = None  # what ends the run as soon as all processes have heard of it
        self.exchange_s = 0.0  # of the last synchronisation, in this process
        self.checkpoint_s = 0.0

    def go_on(self, steps: int) -> int:
        """Train up to step `steps`. Returns the exit status."""
        config, job = self.config, self.job
        rounds = job.round - (-(steps - job.step_index) // config.method.local_steps)
        self.tested = evaluation_rounds(rounds, config.run.evaluations)
        losses: list[Tensor] = []  # (hosted workers,) for each step of the round
        with (
            interruption() as interrupted,
            Recorder(config, rounds, self.run, self.loggers, interrupted.is_set) as recorder,
        ):
            self.clock.lap()
            for step in range(job.step_index, steps):
                lr = rate(config.optimisation, step, steps)
                losses.append(self._step(step, lr))
                if job.steps_left > 1 and step < steps - 1:
                    job.step(*self.optimizers)
                    continue
                news = self._end_round(losses, lr, recorder, interrupted, last=step == steps - 1)
                losses.clear()
                if news.interrupted:
                    self.checkpoints.finish()
                    recorder.interrupted(saved=self.checkpoints.possible)
                    return INTERRUPTED if self.checkpoints.possible else NOT_SAVED
                if news.stop:
                    break
                self.clock.lap()
            self.checkpoints.finish()
            if self.failed is not None:
                raise UserError(self.failed)
            recorder.finish(job)
        return 0

    def _step(self, step: int, lr: float) -> Tensor:
        """A step of every hosted worker: their losses. Where a batch cannot be had the others hear of it at the end of
        the round, and so all end with that line; until then there is nothing to do."""
        if self.failed is None:
            try:
                return torch.stack([trainer.step(step, lr) for trainer in self.trainers])
            except UserError as error:
                if self.job.strategy.at(self.job.round).every_step:
                    raise  # the others wait within the step
                self.failed = str(error)
        return torch.full((len(self.trainers),), math.nan, device=self.device)

    def _end_round(
        self, losses: Sequence[Tensor], lr: float, recorder: Recorder, interrupted: threading.Event, *, last: bool
    ) -> News:
        """The last step of a round: compare, synchronise, test, record, save.

        A checkpoint comes last: where a run goes on from it, the record of the round, and at the end the network that
        was asked for, are there.
        """
        job, lap, batch_size = self.job, self.clock.lap, self.config.optimisation.batch_size
        compute_s = lap()
        stop = self.run is not None and recorder.reached(self.config.budgets(), compute_s)
        values = torch.stack(list(losses)).cpu()
        bad = self._bad(values)
        news = self._compare(values.mean(0).tolist(), compute_s, stop, interrupted.is_set())
        last, plans = news.stop or last, job.plans
        seconds = {"compute": news.compute_s, "wait": max(0.0, lap() - news.compute_s + compute_s)}
        if not job.step(*self.optimizers, bad=bad):
            job.synchronise(bad)  # the last round may be short
        seconds["sync"] = self.exchange_s = lap()
        seconds["checkpoint"], self.checkpoint_s = self.checkpoint_s, 0.0
        scores: dict[str, float] = {}
        if (job.round in self.tested or last) and not news.interrupted:
            scores = self._evaluate(last=last)
        seconds["evaluate"] = lap()
        epoch = job.step_index * batch_size / self.trainers[0].batches.images_per_epoch
        recorder.round(
            {
                **{"round": job.round, "step": job.step_index, "epoch": round(epoch, 4), "lr": lr},
                "accuracy": next(iter(scores.values()), None),
                **({"scores": scores} if len(scores) > 1 else {}),
                "images": len(losses) * batch_size * len(news.workers),
                "seconds": {kind: round(value, 6) for kind, value in seconds.items()},
                **_record(job, news, plans),
            }
        )
        if last or news.interrupted or job.round % self.config.run.checkpoint_rounds == 0:
            lap()
            self.checkpoints.begin(job, self.optimizers, {"resist": resist.__version__})
            self.checkpoint_s = lap()  # told with the next round
        return news

    def _bad(self, losses: Tensor) -> dict[int, str]:
        """The hosted workers whose losses, (steps, hosted workers), are not all numbers, and since when."""
        first_step = self.job.step_index + 1 - len(losses)
        bad: dict[int, str] = {}
        for trainer, values in zip(self.trainers, losses.T, strict=True):
            wrong = (~values.isfinite()).nonzero()
            if len(wrong):
                step = int(wrong[0])
                bad[trainer.index] = f"a loss of {float(values[step])} in step {first_step + step}"
        return bad

    def _compare(self, losses: list[float], compute_s: float, stop: bool, interrupted: bool) -> News:
        """Tell the others, and hear from them. Waits for the slowest. losses: the mean of each hosted worker.

        Raises AgreedError where a process has failed.
        """
        times = {"compute_s": round(compute_s / len(self.trainers), 6), "exchange_s": round(self.exchange_s, 6)}
        own = [
            {"worker": trainer.index, "loss": loss if math.isfinite(loss) else None, **times}
            for trainer, loss in zip(self.trainers, losses, strict=True)
        ]
        mine = {
            "workers": own, "compute_s": compute_s, "stop": stop, "interrupted": interrupted, "failed": self.failed
        }
        told = [json.loads(text) for text in self.job.ledger.gather_text(json.dumps(mine))]
        for one in told:
            if one["failed"] is not None:
                raise AgreedError(one["failed"])
        workers = [worker for one in told for worker in one["workers"]]
        slowest = max(one["compute_s"] for one in told)
        return News(workers, slowest, any(one["stop"] for one in told), any(one["interrupted"] for one in told))

    def _evaluate(self, *, last: bool) -> dict[str, float]:
        """Test the full network where worker 0 lives ({} elsewhere); the last one is kept in the run directory.
        Where an image cannot be read the others hear of it at the end of the next round."""
        full = self.job.full_model(self.task.calibration(self.job.seed))
        if full is None or self.run is None:
            return {}
        if last:
            save_full(full, self.job.chains, self.job.scales, self.run.path / FILE)
        try:
            return {name: round(value, 6) for name, value in self.task.test(full).items()}
        except UserError as error:
            self.failed = str(error)
            return {}


def _record(job: Job, news: News, plans: Mapping[str, Plan]) -> dict[str, object]:
    """What metrics.jsonl keeps of a round beside its numbers: losses, bytes, who held what."""
    losses = [worker["loss"] for worker in news.workers if worker["loss"] is not None]
    return {
        "loss": sum(losses) / len(losses),
        **({"dropped": job.dropped} if job.dropped else {}),
        **job.ledger.take(),
        "capacity": {name: plan.capacities for name, plan in plans.items()},
        "plan": {name: plan.blocks for name, plan in plans.items()},
        "workers": news.workers,
    }


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """Inside it, SIGTERM and SIGINT set the event instead of ending the process; a second Ctrl-C ends it at once.

    torch's launcher turns the second Ctrl-C into a SIGTERM, so that after a SIGINT either of them counts as one.
    """
    event, seen = threading.Event(), set[int]()

    def note(number: int, _frame: object) -> None:
        if event.is_set() and signal.SIGINT in (number, *seen):
            raise KeyboardInterrupt
        seen.add(number)
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open_everywhere(config: TrainConfig, transport: Transport) -> Task:
    """The task, its data downloaded by one process of each host while the others wait."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    smoothing = config.optimisation.label_smoothing
    network = config.network if config.run.resume is None else replace(config.network, backbone=None)
    found = together(transport, lambda: open_task(network, label_smoothing=smoothing) if first else None)
    if found is None:
        return together(transport, lambda: open_task(network, download=False, label_smoothing=smoothing))
    together(transport, lambda: None)
    return found


def _images_per_epoch(config: TrainConfig, task: Task) -> int:
    """Those of worker 0, for all processes: shards may differ by one image, and the number of rounds must not."""
    batches = task.batches(
        batch_size=config.optimisation.batch_size, seed=config.run.seed, worker=0, workers=config.method.workers,
        sampling=config.method.sampling,
    )
    return batches.images_per_epoch
