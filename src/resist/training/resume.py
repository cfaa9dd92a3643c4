"""The point from which a run resumes: a checkpoint or replicas, with their round and step."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from resist.errors import UserError
from resist.job import Job
from resist.runs.config import TrainConfig
from resist.runs.follower import Follower
from resist.runs.history import read_past, read_table
from resist.runs.library import check_visible
from resist.runs.model_file import EMA_FILE, FILE
from resist.runs.replicas import newest_replicas, restore_replicas
from resist.runs.restore import restore
from resist.runs.saved import complete, newest, read_job
from resist.runs.tensor_file import FormatError
from resist.sync.agreement import run_everywhere
from resist.sync.transport import Transport
from resist.training.lr_schedule import num_steps
from resist.training.trainer import make_sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A round and a step to resume from.

    Attributes:
        round: Rounds that are done.
        step: Steps that are done.
        restore: Fills a job that was made for this round and step, and its optimizers.
        ended: No step is left: this was the last round, by its record.
        tested: The run is finished: the network of the end is there, with its scores.
    """

    round: int = 0
    step: int = 0
    restore: Callable[[Job, tuple[Optimizer, ...]], object] = lambda job, optimizers: None
    ended: bool = False
    tested: bool = False


def find_resume_point(config: TrainConfig, transport: Transport) -> ResumePoint:
    """Find the newest undamaged checkpoint, or replicas that survivors of a loss wrote after it.

    The main process searches, and reports which files are damaged. With another number of workers the step is the one
    at which all of them together have seen as many images.

    Args:
        config: The options; without `resume` the run begins at its first step.
        transport: Connects the processes, all of which have to call this.

    Raises:
        AgreedError: All checkpoints are damaged, have another format, or are not seen by one of the processes.
    """
    if config.run.resume is None:
        return ResumePoint()
    is_main = 0 in transport.hosted
    checkpoints, replicas = config.run.resume / "checkpoints", config.run.resume / "replicas"

    def search() -> str:
        found = _search(checkpoints, replicas)
        return json.dumps({**found, **_end_of(config, found["round"])} if found else found)

    texts = transport.all_gather_text(run_everywhere(transport, lambda: search() if is_main else ""))
    source: dict[str, Any] = json.loads(texts[0])
    if not source:
        if is_main:
            log.info(f"resist: no checkpoint in {checkpoints} yet; the run begins at its first step")
        return ResumePoint()
    ended, tested = source.pop("ended"), source.pop("tested")
    before, now = source["workers"], config.method.workers
    step = source["step"] * before // now
    if is_main and before != now:
        log.info(
            f"resist: resuming with {now} workers instead of {before}: new partition, step {source['step']} -> {step} "
            "(same number of images), momentum reset"
        )
    if "checkpoint" not in source:
        if is_main:
            averages = ", the average of the weights too" if config.optimization.model_ema_decay is not None else ""
            log.info(f"resist: resuming from the replicas of round {source['round']}; momentum reset{averages}")
        return ResumePoint(source["round"], step, lambda job, _: _restore_replicas(job, replicas, source))
    path = checkpoints / source["checkpoint"]
    run_everywhere(transport, lambda: check_visible(path))
    return ResumePoint(source["round"], step, lambda job, optimizers: restore(job, optimizers, path), ended, tested)


def _end_of(config: TrainConfig, round: int) -> dict[str, bool]:
    """Find out from its records whether the run that resumes ends with this round: "ended" and "tested", see above.

    A signal in the last round ends a run before its test, and a process can be killed before it calls the run finished.

    Raises:
        UserError: A record up to this round is damaged or missing.
    """
    path = config.run.resume
    assert path is not None, "it has a checkpoint"
    past = read_past(path, round, read_table(path / "environment.json", []).get("missing_rounds"))
    last = past[-1][1] if past else None
    files = [FILE] if config.optimization.model_ema_decay is None else [FILE, EMA_FILE]
    there = all((path / name).exists() for name in files) and Follower(path).state().get("state") == "finished"
    if last is None or last["round"] != round:  # the records are lost
        return {"ended": False, "tested": there}
    return {"ended": last["last"], "tested": there and last["accuracy"] is not None}


def all_done(config: TrainConfig, num_images: int) -> bool:
    """Find out whether a run that resumes has nothing left to do, before the workers start; log it.

    Args:
        config: The options; a run that does not resume is not done.
        num_images: Number of training images.
    """
    if config.run.resume is None:
        return False
    steps = num_steps(config.optimization, make_sampler(config, num_images, 0).images_per_epoch)
    for path in complete(config.run.resume / "checkpoints"):
        try:
            about = read_job(path)
        except UserError:  # it is reported when all of them are looked through
            continue
        end = _end_of(config, about["round"])
        ended = end["ended"] or about["step"] * about["workers"] // config.method.workers >= steps
        if ended and end["tested"]:
            report_end(config.run.resume, about["round"])
        return ended and end["tested"]
    return False


def report_end(path: Path, round: int) -> None:
    """Log that the run in `path` has ended with this round."""
    log.info("the run has ended after round %d; its network is %s", round, path / FILE)


def _restore_replicas(job: Job, folder: Path, source: dict[str, Any]) -> None:
    """Restore the weights. Averages of them (EMA), of which there are no replicas, start from these weights."""
    restore_replicas(job, folder, source)
    with torch.no_grad():
        for worker in job.workers:
            if worker.average is not None:
                for average, weights in zip(
                    worker.average.model.parameters(), worker.subnet.model.parameters(), strict=True
                ):
                    average.copy_(weights)


def _search(checkpoints: Path, replicas: Path) -> dict[str, Any]:
    """Round, step and workers to resume from, and the name of the checkpoint or the metadata of replicas; {} for none.

    Raises UserError where there are checkpoints, and none can be used.
    """
    path, errors = newest(checkpoints)
    kept, replica_errors = newest_replicas(replicas)
    source: dict[str, Any] = {}
    if path is not None:
        about = read_job(path)
        source = {"checkpoint": path.name, **{name: about[name] for name in ("round", "step", "workers")}}
    if kept is not None and kept["round"] > source.get("round", 0):
        source = kept
    if not source and errors and isinstance(errors[0], FormatError):
        raise errors[0]
    for error in errors + replica_errors:
        log.warning("skipped: %s", error)
    if not source and errors:
        raise UserError(f"no undamaged checkpoint in {checkpoints}; train again, or copy one there")
    return source
