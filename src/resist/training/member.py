"""Member: one process of an elastic run, from one generation to the next.

The loop is that of any run (`resist.training.loop.Training`), one for each generation. When another process is lost, or
at the end of a round in which the main process has seen others that wait, all members agree on the next generation at
the store, the job regroups, and the loop goes on with other worker numbers, images and steps. The main process is that
of worker 0; when it is lost, the next one takes the run directory over, as a run that resumes does.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from resist.errors import (
    AgreedError,
    IncompleteNetworkError,
    LeftBehindError,
    NotAMemberError,
    UserError,
    WorkerLostError,
)
from resist.job import Job
from resist.members.generations import connect_members, regroup
from resist.members.membership import Membership
from resist.planning.generations import Generation
from resist.runs.checkpoint import Checkpoints
from resist.runs.config import TrainConfig
from resist.runs.directory import Run, mark, seen_after_a_while
from resist.runs.elastic import at_size
from resist.runs.lock import RunLock
from resist.sync.agreement import run_everywhere
from resist.sync.devices import GLOO
from resist.sync.local import Unconnected
from resist.sync.target import Regrouped
from resist.sync.transport import Transport
from resist.tasks import Task
from resist.training.interruption import interruption
from resist.training.launcher import INTERRUPTED
from resist.training.loggers import open_loggers
from resist.training.loop import LEAVING, Training
from resist.training.lr_schedule import num_steps
from resist.training.recorder import Recorder
from resist.training.resume import ResumePoint, find_resume_point, report_end
from resist.training.round_report import OpenRound
from resist.training.supervisor import DONE
from resist.training.train import check_before, log_chains, make_job, rescuing, seen_by_all
from resist.training.trainer import Trainer, make_sampler

log = logging.getLogger(__name__)

DIRECTORY = "run directory"  # what members publish: the mark of the one that all of them see


class Member:
    """This process in an elastic run.

    Args:
        config: The options, with the number of workers that the run is to begin with.
        task: Data, loss and tests.
        membership: This process among the members; it has not joined.
        device: The device of this process.
        out: The run directory.
        began: When the run began, in seconds of `time.monotonic`.
        supervised: Signals come to all processes, and end the run. Otherwise one that gets a signal leaves.
    """

    def __init__(
        self, config: TrainConfig, task: Task, membership: Membership, device: torch.device, out: Path, began: float,
        *, supervised: bool,
    ) -> None:  # fmt: skip
        self._config, self._task, self._membership = config, task, membership
        self._device, self._out, self._supervised = device, out, supervised
        sampler = make_sampler(config, task.num_images, 0)
        self._steps = num_steps(config.optimization, sampler.images_per_epoch) * config.method.workers  # of all workers
        self._founded, self._trains = 0, False  # number of workers that the job began with; whether it has begun
        self._own: tuple[Job, Trainer] | None = None
        self._point = ResumePoint()  # from which the members have founded the run
        self._training: Training | None = None
        self._open: OpenRound | None = None  # when the members changed
        self._noticed, self._settled = began, True  # when they changed; whether training goes on since
        self._before: Generation | None = None  # the last one that has trained
        self._attempt, self._possible = "", True
        self._lock, self._run = RunLock(out, "train"), None
        self._recorder: Recorder | None = None
        self._contexts = contextlib.ExitStack()

    _run: Run | None

    def train(self) -> int:
        """Train until the run ends, with whoever is a member.

        Returns:
            The exit status.
        """
        if self._membership.founded():  # what takes time is done before the others wait for it
            self._check_directory()
            self._make(self._config.method.workers)
        self._membership.join(expected=self._config.method.workers)
        generation, transport = connect_members(
            self._membership, self._facts, _workers, self._device, self._config.machine.timeout_s, GLOO
        )
        try:
            with interruption(self._announce) as interrupted, self._contexts:
                status, transport = self._train(generation, transport, interrupted)
        finally:
            self._lock.release()  # after the last state is written: who has lost it writes none
        if status == LEAVING:
            self._membership.leave()
            log.info("left after round %d; the others go on", self._training.job.round if self._training else 0)
            status = INTERRUPTED
        else:
            self._end(DONE if status == 0 else "it was interrupted", together=True)
        transport.close()
        return status

    def _train(
        self, generation: Generation, transport: Transport, interrupted: threading.Event
    ) -> tuple[int, Transport]:
        """Train from generation to generation. Returns the exit status or LEAVING, and the last transport."""
        try:
            while True:
                try:
                    status = self._go_on(generation, transport, interrupted)
                    if status == LEAVING and self._recorder is not None:
                        self._recorder.retire()  # another process goes on with it
                    if status is not None:
                        return status, transport
                except NotAMemberError:
                    raise
                except WorkerLostError as lost:
                    log.debug("%s", lost)
                self._note()
                timeout_s = self._config.machine.timeout_s
                generation, transport = regroup(
                    self._membership, transport, self._facts(), _workers, self._device, timeout_s, GLOO
                )
        except LeftBehindError:
            raise
        except (NotAMemberError, AgreedError) as error:
            self._end(str(error))
            with self._rescuing():
                raise

    def _check_directory(self) -> None:
        """Raise UserError where the members see the run directory, and this process does not."""
        while (expected := self._membership.published(DIRECTORY)) and not seen_after_a_while(self._out, expected):
            if self._membership.published(DIRECTORY) == expected:  # else another process has taken it over
                raise UserError(
                    f"this process cannot join the run: it does not see {self._out} as the members do; give `out` in a "
                    "directory that all machines share"
                )

    def _facts(self) -> Mapping[str, Any]:
        """What the others have to know of this process: the number of workers that its job began with."""
        return {"workers": self._founded} if self._trains else {}

    def _announce(self) -> None:
        if self._recorder is not None and self._training is not None:
            self._recorder.ending(self._training.stage)

    def _end(self, how: str, *, together: bool = False) -> None:
        with contextlib.suppress(WorkerLostError):  # the store cannot be reached
            self._membership.end(how, together=together)

    def _rescuing(self) -> contextlib.AbstractContextManager[None]:
        if self._training is None:
            return contextlib.nullcontext()
        return rescuing(self._out, self._attempt, self._training)

    def _note(self) -> None:
        """Keep what is known of the round under way, before the members change.

        Where another one is lost meanwhile, it stays as it is.
        """
        if self._training is None or not self._settled:
            return
        self._noticed, self._settled = time.monotonic(), False
        self._open = self._training.open_round()
        self._training.checkpoints.abandon(0.0)

    def _go_on(self, generation: Generation, transport: Transport, interrupted: threading.Event) -> int | None:
        """Train as a member of a generation.

        Returns:
            The exit status. None: a round has ended, and other processes wait to be taken in.
        """
        founded = [facts["workers"] for facts in generation.facts if "workers" in facts]
        found: Regrouped | None = None
        ended = False
        os.environ["RANK"] = str(generation.members.index(self._membership.number))  # for messages of all processes
        if founded:
            found = self._regroup(transport, founded[0])
        if found is None:
            job, steps = self._found(transport, again=generation.number > 0), self._steps_of(transport.num_workers)
            ended, point = self._point.ended or job.step_index >= steps, self._point
            if ended and point.tested:
                run_everywhere(transport, lambda: report_end(self._out, point.round) if 0 in transport.hosted else None)
                return 0
        training, recorder, steps = self._open_training(transport, found, ended=ended)
        self._record(generation, found, training.job, recorder)
        return training.go_on(steps, recorder, interrupted)

    def _steps_of(self, workers: int) -> int:
        """Steps of a run with so many workers."""
        return -(-self._steps // workers)

    def _regroup(self, transport: Transport, founded: int) -> Regrouped | None:
        """Go on with the members of a generation; None where too much was lost, and they go on from a checkpoint."""
        job, _ = self._own if self._own is not None and self._founded == founded else self._make(founded)
        try:
            found = job.regroup(transport)
        except IncompleteNetworkError as error:
            if 0 in transport.hosted:
                what = str(error).partition(": ")[0]
                log.info("resist: %s, and no process has a copy; all go on from the newest checkpoint", what)
            return None
        self._trains = True
        return found

    def _found(self, transport: Transport, *, again: bool) -> Job:
        """Begin or resume the run, in all members of the first generation.

        Args:
            transport: Connects them.
            again: The run has begun before, and goes on from its newest checkpoint.
        """
        workers, is_main = transport.num_workers, 0 in transport.hosted
        if again and "True" in transport.all_gather_text(str(is_main and (self._out / "config.json").exists())):
            self._config = replace(self._config, run=replace(self._config.run, resume=self._out))
            run_everywhere(transport, lambda: self._lock.acquire(replacing=True) if is_main else None)
            self._run = self._training = self._open = None
        config = at_size(self._config, workers)
        run_everywhere(
            transport, lambda: check_before(self._config, self._task, self._out, self._lock) if is_main else None
        )
        point = find_resume_point(config, transport)
        self._point = point
        job, trainer = self._new_job(config, transport, (point.round, point.step))
        run_everywhere(transport, lambda: point.restore(job, (trainer.optimizer,)))
        if is_main:
            log_chains(job)
        self._own, self._founded, self._trains = (job, trainer), workers, True
        return job

    def _make(self, workers: int) -> tuple[Job, Trainer]:
        """Make the job of a process that joins others, which has begun with so many workers."""
        job, trainer = self._new_job(at_size(self._config, workers), Unconnected(workers), (0, 0))
        job.attach(trainer.optimizer)
        self._own, self._founded = (job, trainer), workers
        return self._own

    def _new_job(self, config: TrainConfig, transport: Transport, at: tuple[int, int]) -> tuple[Job, Trainer]:
        job = make_job(config, self._task, transport, self._device, at)
        worker = job.workers[0]
        sampler = run_everywhere(transport, lambda: make_sampler(config, self._task.num_images, worker.index))
        trainer = run_everywhere(transport, lambda: Trainer(config, worker, self._task, sampler))
        if trainer.average is not None:
            job.follow(trainer.average)
        return job, trainer

    def _open_training(
        self, transport: Transport, found: Regrouped | None, *, ended: bool
    ) -> tuple[Training, Recorder, int]:
        """Prepare the loop of a generation, and in a process that becomes the main one the run directory.

        Args:
            transport: Connects the members.
            found: What has become of them; None where they have founded or resumed the run.
            ended: No step is left.

        Returns:
            The loop, the keeper of its records, and the number of steps up to which it trains.
        """
        assert self._own is not None, "it has founded or joined"
        job, trainer = self._own
        config, is_main = at_size(self._config, job.strategy.workers), 0 in transport.hosted
        index = job.workers[0].index
        sampler = run_everywhere(transport, lambda: make_sampler(config, self._task.num_images, index))
        trainer.deal(index, sampler)
        opens = is_main and self._run is None
        if opens and self._recorder is not None:
            self._recorder.retire()
            self._recorder = None
        run_everywhere(transport, lambda: self._open_run(job, again=found is not None) if opens else None)
        loggers = run_everywhere(
            transport, lambda: open_loggers(self._config, self._out, self._run.past) if opens and self._run else []
        )
        self._attempt = transport.all_gather_text(mark(self._out))[0]
        answers = transport.all_gather_text(str(self._possible))  # of all: one that joins does not know it yet
        self._possible = "False" not in answers and seen_by_all(self._out, self._attempt, transport)
        if is_main:
            self._membership.publish(DIRECTORY, self._attempt if self._possible else "")
        checkpoints = Checkpoints(
            self._out / "checkpoints",
            transport,
            possible=self._possible,
            timeout_s=self._config.machine.timeout_s,
            replicas=self._out / "replicas",
        )
        training = Training(config, self._task, job, (trainer,), self._run, loggers, checkpoints, self._noticed)
        training.newcomers, training.may_leave = lambda: bool(self._membership.newcomers()), not self._supervised
        least = job.step_index + 1 if found is not None else 0  # the last round ends the run, whoever is a member
        steps = job.step_index if ended else max(least, self._steps_of(transport.num_workers))
        training.prepare(steps)
        if self._recorder is None:
            recorder = Recorder(self._config, training.rounds, self._run, loggers)
            self._recorder = self._contexts.enter_context(recorder)
        else:
            self._recorder.extend(training.rounds)
        self._training = training
        return training, self._recorder, steps

    def _open_run(self, job: Job, *, again: bool) -> None:
        """Open the run directory, or take it over from a main process that is lost."""
        if again:
            self._lock.acquire(replacing=True)
        resumes = again or self._config.run.resume is not None
        number = self._open.number if self._open is not None and self._open.number <= job.round else None
        self._run = Run(self._out, self._config, job.round if resumes else None, self._lock, number)

    def _record(self, generation: Generation, found: Regrouped | None, job: Job, recorder: Recorder) -> None:
        """Record that the members have changed, and a round that ended with it."""
        before, self._before = self._before, generation
        open_round, self._open = self._open, None
        self._settled = True
        if before is None and found is None and job.strategy.workers == self._config.method.workers:
            return  # as the options say
        former, now = set(before.members if before is not None else ()), set(generation.members)
        entry: dict[str, Any] = {
            **{"number": generation.number, "round": job.round, "step": job.step_index, "workers": len(now)},
            **{"left": sorted(former - now), "came": sorted(now - former)},
            "repeated": found.repeated if found is not None else before is not None,
            "pause_s": round(time.monotonic() - self._noticed, 3),
        }
        recorder.regrouped(entry, _sentence(self._membership, entry))
        if open_round is not None:
            recorder.closing_s = 0.0  # it is part of the round
            if found is not None and recorder.summary.done < open_round.number <= job.round:
                recorder.round(open_round.record(job, len(found.former)))


def _sentence(membership: Membership, entry: Mapping[str, Any]) -> str:
    """The line about a change of members."""
    left, came, named = entry["left"], entry["came"], membership.watch.named
    parts = [*([f"{named(left)} left"] if left else []), *([f"{named(came)} came"] if came else [])]
    workers = "1 worker goes" if entry["workers"] == 1 else f"{entry['workers']} workers go"
    what = ", which is repeated" if entry["repeated"] else ""
    return (
        f"generation {entry['number']}: {', '.join(parts) or 'the same members'}; {workers} on with round "
        f"{entry['round'] + 1}{what}, after step {entry['step']} ({entry['pause_s']:.1f} s)"
    )


def _workers(generation: Generation) -> int:
    return len(generation.members)
