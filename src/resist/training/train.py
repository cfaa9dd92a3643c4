"""`train`: open the data, join the processes, make the job and the run directory, and run the loop."""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch

from resist.data import Sampler
from resist.data.readers import num_readers, workers_here
from resist.errors import DivergedError, UserError, WorkerLostError
from resist.job import Job
from resist.runs.checkpoint import Checkpoints
from resist.runs.config import NetworkConfig, TrainConfig
from resist.runs.directory import Run, check_free, check_resumable, default_out, mark, seen_after_a_while
from resist.runs.lock import RunLock
from resist.runs.recipe import STREAMED
from resist.runs.replicas import write_diverged, write_replicas
from resist.sync.agreement import check_agreement, run_everywhere
from resist.sync.distributed import connect
from resist.sync.interfaces import is_of_network
from resist.sync.meeting import environment_number
from resist.sync.transport import Transport, hosted_workers
from resist.tasks import Task, open_task
from resist.tasks.preflight import check_parts, example_of, try_logits
from resist.training.common import common_values
from resist.training.device import take_device
from resist.training.loggers import open_loggers
from resist.training.loop import Training
from resist.training.lr_schedule import num_steps
from resist.training.optimizers import resolve
from resist.training.preflight import check_options
from resist.training.resume import find_resume_point, report_end
from resist.training.trainer import Trainer, make_sampler
from resist.training.wall import run_began

log = logging.getLogger(__name__)


def train(config: TrainConfig, task: Task | None = None, *, checked: bool = True) -> int:
    """Train as one process of the job, with all the workers that it hosts.

    The main process (that of worker 0) writes the run directory and reports.

    Args:
        config: The options, checked, equal in all processes.
        task: The task, in forks of a process that has opened it: they share its memory. Default: opened here.
        checked: False if no launcher has checked the options together; then each process does before it connects.

    Returns:
        The exit status.

    Raises:
        UserError: An option is invalid, a file cannot be read or written, or training diverged.
        WorkerLostError: Another process is lost.
    """
    began = run_began()
    device, failure = torch.device("cpu"), ""
    try:
        fixed_shapes = config.network.task == "classification"
        deterministic = config.machine.deterministic
        device = take_device(config.machine.device, fixed_shapes=fixed_shapes, deterministic=deterministic)
        if not checked:
            check_own(config, device)
    except UserError as error:  # raised in all processes when they have met
        failure = str(error)
    machine = config.machine
    transport = connect(config.method.workers, device, machine.timeout_s, failure=failure, backend=machine.backend)
    try:
        optimization = run_everywhere(transport, lambda: resolve(config.optimization))
        config = replace(config, optimization=optimization)
        opened = _open_everywhere(config, transport) if task is None else task
        check_agreement(transport, run_everywhere(transport, lambda: common_values(config, opened)))
        return _train(config, opened.to(device, channels_last=machine.channels_last), transport, device, began)
    finally:
        transport.close()


def check_own(config: TrainConfig, device: torch.device) -> None:
    """Check the options, in a process that torchrun has started."""
    processes = environment_number("WORLD_SIZE", 1, least=1)
    rank, hosted = environment_number("RANK", 0), hosted_workers(config.method.workers, processes)
    own = len(hosted[rank]) if rank < processes else 0
    here = own if device.type == "cuda" else workers_here(config.method.workers)
    check_options(config, device, processes, range(here))


def open_data(config: TrainConfig, *, download: bool = True) -> Task:
    """Open the task of a run, with its data.

    Args:
        config: The options.
        download: Download missing files; otherwise they are an error.

    Raises:
        UserError: Options contradict each other, or files are missing or damaged.
    """
    network, resume = config.network, config.run.resume
    elastic = config.machine.elastic is not None  # then all need them, whenever a process is started
    if resume is not None and any(resume.glob("checkpoints/*")) and not (elastic and _has_initial_weights(network)):
        network = replace(network, init_from=None)  # all weights come from there
    if network.data in STREAMED:
        network = replace(network, data_workers=num_readers(network.data_workers, workers_here(config.method.workers)))
    return open_task(network, config.optimization, download=download)


def _has_initial_weights(network: NetworkConfig) -> bool:
    return network.init_from is not None and Path(network.init_from.removeprefix("timm:")).exists()


def _train(config: TrainConfig, task: Task, transport: Transport, device: torch.device, began: float) -> int:
    """Make or resume the job and the run directory, and train. Returns the exit status."""
    is_main = 0 in transport.hosted
    indices, num_images = {0, *transport.hosted}, task.num_images
    samplers = run_everywhere(transport, lambda: {index: make_sampler(config, num_images, index) for index in indices})
    # Of worker 0, for all processes: shards may differ by one image, the number of rounds must not.
    steps = num_steps(config.optimization, samplers[0].images_per_epoch)
    out = config.run.resume or config.run.out or default_out(config)
    lock = RunLock(out, "train")
    try:
        run_everywhere(transport, lambda: check_before(config, task, out, lock) if is_main else None)
        return _train_locked(config, task, transport, device, samplers, steps, out, lock, began)
    finally:
        lock.release()


def _train_locked(
    config: TrainConfig, task: Task, transport: Transport, device: torch.device, samplers: Mapping[int, Sampler],
    steps: int, out: Path, lock: RunLock, began: float,
) -> int:  # fmt: skip
    """Train in the run directory `out`, which no other process writes into. Returns the exit status."""
    is_main, resume = 0 in transport.hosted, config.run.resume
    point = find_resume_point(config, transport)
    ended = point.ended or point.step >= steps
    if ended and point.tested:
        run_everywhere(transport, lambda: report_end(out, point.round) if is_main else None)
        return 0
    job = make_job(config, task, transport, device, (point.round, point.step))
    if is_main:
        log_chains(job)
    trainers = run_everywhere(
        transport, lambda: [Trainer(config, worker, task, samplers[worker.index]) for worker in job.workers]
    )
    if averages := [trainer.average for trainer in trainers if trainer.average is not None]:
        job.follow(*averages)
    run_everywhere(transport, lambda: point.restore(job, tuple(trainer.optimizer for trainer in trainers)))
    run = run_everywhere(transport, lambda: Run(out, config, job.round if resume else None, lock) if is_main else None)
    out = Path(transport.all_gather_text(str(out))[0])  # of the first process: the name may contain the time
    loggers = run_everywhere(transport, lambda: open_loggers(config, run.path, run.past) if run else [])
    attempt = transport.all_gather_text(mark(out))[0]
    checkpoints = Checkpoints(
        out / "checkpoints",
        transport,
        possible=seen_by_all(out, attempt, transport),
        timeout_s=config.machine.timeout_s,
        replicas=out / "replicas",
    )
    training = Training(config, task, job, trainers, run, loggers, checkpoints, began)
    try:
        return _surviving(out, attempt, training, point.step if ended else steps)
    finally:
        checkpoints.abandon()


def check_before(config: TrainConfig, task: Task, out: Path, lock: RunLock) -> None:
    """Log the notes on the data, and find errors that would show only after the job has been made.

    The lock of a run that resumes is taken before its checkpoints are looked for.

    Args:
        config: The options.
        task: The task.
        out: The run directory.
        lock: Its lock.

    Raises:
        UserError: There is such an error.
    """
    for note in task.notes:
        log.info("resist: %s", note)
    if config.run.resume is None:
        check_free(out)
    else:
        check_resumable(out, config)
        lock.acquire()
    try_logits(config.network)
    for note in check_parts(config):
        log.info("resist: %s", note)


def make_job(
    config: TrainConfig, task: Task, transport: Transport, device: torch.device, at: tuple[int, int] = (0, 0)
) -> Job:
    """Make the job of a run.

    Args:
        config: The options.
        task: Its network.
        transport: Connects the processes, all of which have to call this.
        device: The device of this process.
        at: Round and step at which it begins.
    """
    elastic = config.machine.elastic is not None
    return Job(
        task.network,
        config.strategy(),
        chains=config.network.chain,
        seed=config.run.seed,
        batchnorm=config.method.batchnorm,
        scale=config.scale(),
        device=device,
        channels_last=config.machine.channels_last,
        transport=transport,
        on_nonfinite=config.method.on_nonfinite,
        wire=config.method.wires(),
        replicate=config.method.replicate or elastic,
        elastic=elastic,
        resume_at=at,
        example=example_of(config.network),
    )


def log_chains(job: Job) -> None:
    """Log the chains, and how many of their blocks the workers hold."""
    changes = [(round, job.plan_of(round).plans) for round in job.strategy.change_rounds if round > job.round]
    for number, (chain, plan) in enumerate(zip(job.chains, job.plan.plans, strict=True)):
        text = " ".join(map(str, plan.capacities))
        last = plan.capacities
        for round, plans in changes:
            if (later := plans[number].capacities) != last:
                text, last = f"{text}; after {round} rounds {' '.join(map(str, later))}", later
        log.info("chain %s: %d blocks, the workers hold %s", chain.name, chain.num_blocks, text)
        if chain.caveat:
            log.info("note: %s", chain.caveat)


def seen_by_all(out: Path, attempt: str, transport: Transport) -> bool:
    """Find out whether all processes see a run directory; the main process reports which do not.

    Args:
        out: The run directory.
        attempt: Its mark in the main process.
        transport: Connects the processes, all of which have to call this.
    """
    seen = seen_after_a_while(out, attempt)
    blind = [str(process) for process, text in enumerate(transport.all_gather_text(str(seen))) if text != "True"]
    if blind and 0 in transport.hosted:
        log.info(
            f"note: no checkpoints: process {', '.join(blind)} does not see {out} as process 0 does; give `out` in a "
            "directory that all machines share"
        )
    return not blind


def _surviving(out: Path, attempt: str, training: Training, steps: int) -> int:
    """Train; where a worker is lost or diverges, write the replicas and weights of this process."""
    with rescuing(out, attempt, training):
        return _naming_losses(training, steps)


@contextlib.contextmanager
def rescuing(out: Path, attempt: str, training: Training) -> Iterator[None]:
    """Where a worker is lost or diverges, write the replicas and weights of this process, and say how to continue.

    Args:
        out: The run directory.
        attempt: Its mark, see `resist.runs.replicas.write_replicas`.
        training: The run under way.

    Raises:
        WorkerLostError, DivergedError: With what was written and what to do.
    """
    job = training.job
    try:
        yield
    except WorkerLostError as lost:
        kept = ""
        if job.replicas:
            write_replicas(out / "replicas", job, attempt)
            kept = f"; replicas of round {job.replicas[-1].round} are in {out / 'replicas'}"
        raise WorkerLostError(
            f"round {training.round_number}: {lost}{kept}; continue with resist train `resume={out}`"
        ) from lost
    except DivergedError as error:
        write_diverged(out / "diverged", job)
        if job.replicas:
            write_replicas(out / "replicas", job, attempt)
        where = f"the weights are in {out / 'diverged'}"
        remedy = f"to continue from the last checkpoint: resist train `resume={out}` `lr=...`"
        raise DivergedError(f"{error}; {where}; {remedy}") from error


def _naming_losses(training: Training, steps: int) -> int:
    """Train; a loss that torch notices (ddp, in a backward pass) is one that the transport names."""
    try:
        return training.train(steps)
    except RuntimeError as error:
        if isinstance(error, WorkerLostError) or not is_of_network(error):
            raise
        training.job.transport.all_gather_text("")  # fails too, and says who is lost
        raise


def _open_everywhere(config: TrainConfig, transport: Transport) -> Task:
    """Open the task; one process of each machine downloads the data while the others wait."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    task = run_everywhere(transport, lambda: open_data(config) if first else None)
    if task is None:
        return run_everywhere(transport, lambda: open_data(config, download=False))
    run_everywhere(transport, lambda: None)  # the part of this process in the others' call
    return task
