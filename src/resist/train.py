"""Training as the command line does it: the loop around a `Job`, with data, rates, metrics and a run directory."""

import contextlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import resist
from resist.checkpoint import JOB, Checkpoints, newest, restore
from resist.comm import Transport, check_agreement, connect
from resist.config import OptimisationConfig, TrainConfig
from resist.data import Images, Loader, load
from resist.errors import AgreedError, UserError, WorkerLostError
from resist.evaluate import calibration_batches, network, test_accuracy
from resist.full import FILE, save_full
from resist.job import Job, Worker
from resist.plan import Plan
from resist.progress import Progress
from resist.runs import Run, default_out
from resist.tasks.classification import loss

T = TypeVar("T")


INTERRUPTED = 75  # exit status: stopped by a signal, everything saved, go on with --resume


def train(config: TrainConfig) -> int:
    """Train by `config` as one process of the job, with all the workers that it hosts. Returns the exit status.

    The process that hosts worker 0 writes the run directory and speaks. Raises UserError for what was asked in vain and
    WorkerLostError when another process goes away.
    """
    config.check()
    device = pick_device(config.machine.device)
    transport = connect(config.method.workers, device, config.machine.timeout_s)
    try:
        train_set, test_set = _load_everywhere(config, transport)
        fingerprint = {"resist": resist.__version__, "data set": digest(train_set, test_set)}
        check_agreement(transport, {**config.digest(), **fingerprint})
        train_set, test_set = train_set.to(device), test_set.to(device)
        speaks = 0 in transport.hosted
        source, start = _starting_point(config, transport, speaks)
        job = Job(
            lambda: network(config.network, train_set),
            config.strategy(),
            chains=config.network.chain,
            seed=config.run.seed,
            batchnorm=config.method.batchnorm,
            scale=config.scale(),
            device=device,
            channels_last=config.machine.channels_last,
            transport=transport,
            start=start,
        )
        trainers = [Trainer(config, worker, train_set) for worker in job.workers]
        if speaks:
            for chain in job.chains:
                held = " ".join(map(str, job.plans[chain.name].capacities))
                print(f"chain {chain.name}: {chain.num_blocks} blocks, the workers hold {held}", flush=True)
        steps = num_steps(config.optimisation, trainers[0].loader.images_per_epoch)
        if job.step_index >= steps:
            raise AgreedError(f"the run has done all its {steps} steps; train anew, with more --epochs")
        if source is not None:
            optimizers = tuple(trainer.optimizer for trainer in trainers)
            path, same = source
            together(transport, lambda: restore(job, optimizers, path, same_workers=same))
        out = config.run.resume or config.run.out or default_out(config)
        resume_round = None if config.run.resume is None else job.round
        run = together(transport, lambda: Run(out, config, resume_round) if speaks else None)
        out = Path(transport.gather_text(str(out))[0])  # the time of the first process, where it is in the name
        checkpoints = Checkpoints(out / "checkpoints", transport)
        try:
            return _loop(config, job, trainers, train_set, test_set, run, checkpoints)
        except WorkerLostError as error:
            raise WorkerLostError(
                f"round {job.round + 1}: {error}; to go on from the last checkpoint: resist train --resume {out}"
            ) from error
        finally:
            checkpoints.abandon()
    finally:
        transport.close()


def _starting_point(
    config: TrainConfig, transport: Transport, speaks: bool
) -> tuple[tuple[Path, bool] | None, tuple[int, int]]:
    """(checkpoint, whether it is of as many workers) or None, and the (round, step) at which to begin.

    The first process looks, and says what it found damaged. With another number of workers the step is the one at
    which all of them together have seen as many images.
    """
    if config.run.resume is None:
        return None, (0, 0)
    folder = config.run.resume / "checkpoints"

    def look() -> str:
        if not speaks:
            return ""
        path, skipped = newest(folder)
        for line in skipped:
            print(f"resist: {line}", file=sys.stderr)
        if path is None and skipped:
            raise UserError(f"no sound checkpoint in {folder}; train anew, or copy one there")
        return "" if path is None else path.name

    name = transport.gather_text(together(transport, look))[0]
    if not name:
        if speaks:
            print(f"resist: no checkpoint in {folder} yet; the run begins anew")
        return None, (0, 0)
    path = folder / name
    facts = together(transport, lambda: read_facts(path))
    before, now = facts["workers"], config.method.workers
    step = facts["step"] * before // now
    if speaks and before != now:
        print(
            f"resist: going on with {now} workers instead of {before}: other plans, step {facts['step']} "
            f"becomes {step} (as many images seen), momentum starts anew"
        )
    return (path, before == now), (facts["round"], step)


def read_facts(path: Path) -> dict[str, Any]:
    """The job.json of a checkpoint that process 0 has checked. Raises UserError where this process does not see it."""
    try:
        return json.loads((path / JOB).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path / JOB}: {error.strerror}; all processes have to see the same run directory") from error


class Trainer:
    """One hosted worker: its network, its optimizer and its batches."""

    def __init__(self, config: TrainConfig, worker: Worker, train_set: Images) -> None:
        o = config.optimisation
        self.optimizer = torch.optim.SGD(
            worker.model.parameters(), lr=o.lr, momentum=o.momentum, nesterov=o.nesterov, weight_decay=o.weight_decay
        )
        self.loader = Loader(
            train_set,
            batch_size=o.batch_size,
            seed=config.run.seed,
            worker=worker.index,
            workers=config.method.workers,
            sampling=config.method.sampling,
        )
        self.index = worker.index
        self._model = torch.compile(worker.model) if config.machine.compile else worker.model
        self._parts, self._bf16 = o.accumulate, config.machine.precision == "bf16"
        self._format = torch.channels_last if config.machine.channels_last else torch.contiguous_format

    def step(self, step: int, lr: float) -> Tensor:
        """One optimizer step on the batch that belongs to `step`. Returns its mean loss, a scalar on the device."""
        images, labels = self.loader.batch(step)
        images = images.to(memory_format=self._format)
        total = torch.zeros((), device=images.device)
        for x, y in zip(images.chunk(self._parts), labels.chunk(self._parts), strict=True):
            with torch.autocast(images.device.type, torch.bfloat16, enabled=self._bf16):
                part = loss(self._model(x), y) / self._parts
            part.backward()
            total += part.detach()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


@dataclass
class Clock:
    """Seconds between calls of `lap`."""

    device: torch.device
    last: float = 0.0

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the device works behind the program's back
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed


def _loop(
    config: TrainConfig,
    job: Job,
    trainers: list[Trainer],
    train_set: Images,
    test_set: Images,
    run: Run | None,
    checkpoints: Checkpoints,
) -> int:
    steps = num_steps(config.optimisation, trainers[0].loader.images_per_epoch)
    rounds = job.round - (-(steps - job.step_index) // config.method.local_steps)
    tested, budgets = evaluation_rounds(rounds, config.run.evaluations), config.budgets()
    optimizers = tuple(trainer.optimizer for trainer in trainers)
    device = job.workers[0].subnet.device
    losses = torch.zeros(len(trainers), device=device)
    clock, first_step = Clock(device), job.step_index
    with interruption() as interrupted, Progress(rounds, run, run.past if run else ()) as progress:
        clock.lap()
        for step in range(job.step_index, steps):
            lr = rate(config.optimisation, step, steps)
            for number, trainer in enumerate(trainers):
                losses[number] += trainer.step(step, lr)
            if job.steps_left > 1 and step < steps - 1:
                job.step(*optimizers)
                continue
            done, compute_s = step + 1 - first_step, clock.lap()
            stop = run is not None and progress.reached(budgets, compute_s)
            news = _compare(job, trainers, losses / done, compute_s, stop, interrupted.is_set())
            last, plans = news.stop or step == steps - 1, job.plans
            seconds = {"compute": news.compute_s, "wait": max(0.0, clock.lap() - news.compute_s + compute_s)}
            job.step(*optimizers)
            job.finish()  # the last round may be short
            seconds["sync"] = clock.lap()
            accuracy = None
            if last or news.interrupted or job.round % config.run.checkpoint_rounds == 0:
                checkpoints.begin(job, optimizers, {"resist": resist.__version__})
            seconds["checkpoint"] = clock.lap()
            if (job.round in tested or last) and not news.interrupted:
                accuracy = _evaluate(job, train_set, test_set, run, last=last)
            seconds["evaluate"] = clock.lap()
            epoch = (step + 1) * config.optimisation.batch_size / trainers[0].loader.images_per_epoch
            progress.round(
                {
                    **{"round": job.round, "step": step + 1, "epoch": round(epoch, 4), "lr": lr, "accuracy": accuracy},
                    "images": done * config.optimisation.batch_size * len(news.workers),
                    "seconds": {kind: round(value, 6) for kind, value in seconds.items()},
                    **_record(job, news, plans),
                }
            )
            losses.zero_()
            first_step = step + 1
            if news.interrupted:
                checkpoints.finish()
                progress.interrupted()
                return INTERRUPTED
            if last:
                break
            clock.lap()
        checkpoints.finish()
        progress.finish(job)
    return 0


@dataclass(frozen=True)
class News:
    """What all processes know before a round is folded.

    workers:   each worker's mean loss, and its share of its process's seconds of compute.
    compute_s: seconds that the slowest process computed.
    stop:      whether a budget is used up, and the run ends after this round.
    interrupted: whether a process was told to end by a signal.
    """

    workers: list[dict[str, float]]
    compute_s: float
    stop: bool
    interrupted: bool


def _record(job: Job, news: News, plans: Mapping[str, Plan]) -> dict[str, object]:
    """What metrics.jsonl keeps of a round beside its numbers: losses, bytes, who held what."""
    return {
        "loss": sum(worker["loss"] for worker in news.workers) / len(news.workers),
        **job.ledger.take(),
        "capacity": {name: plan.capacities for name, plan in plans.items()},
        "plan": {name: plan.blocks for name, plan in plans.items()},
        "workers": news.workers,
    }


@contextlib.contextmanager
def interruption() -> Iterator[threading.Event]:
    """Inside it, SIGTERM and SIGINT set the event instead of ending the process; a second SIGINT ends it at once."""
    event = threading.Event()

    def note(number: int, _frame: object) -> None:
        if number == signal.SIGINT and event.is_set():
            raise KeyboardInterrupt
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


def _compare(
    job: Job, trainers: list[Trainer], losses: Tensor, compute_s: float, stop: bool, interrupted: bool
) -> News:
    """Tell the others, and hear from them. Waits for the slowest.

    Raises AgreedError when a worker's loss is no longer a number.
    """
    own = [
        {"worker": trainer.index, "loss": value, "compute_s": round(compute_s / len(trainers), 6)}
        for trainer, value in zip(trainers, losses.tolist(), strict=True)
    ]
    mine = {"workers": own, "compute_s": compute_s, "stop": stop, "interrupted": interrupted}
    told = [json.loads(text) for text in job.ledger.gather_text(json.dumps(mine))]
    workers = [worker for one in told for worker in one["workers"]]
    for worker in workers:
        if not math.isfinite(worker["loss"]):
            raise AgreedError(
                f"the loss of worker {worker['worker']} is {worker['loss']} in round {job.round}: training diverged; "
                "lower --lr or raise --lr-warmup-steps"
            )
    slowest = max(one["compute_s"] for one in told)
    return News(workers, slowest, any(one["stop"] for one in told), any(one["interrupted"] for one in told))


def _evaluate(job: Job, train_set: Images, test_set: Images, run: Run | None, *, last: bool) -> float | None:
    """Test the full network where worker 0 lives (None elsewhere); the last one is kept in the run directory."""
    full = job.full_model(calibration_batches(train_set, job.seed))
    if full is None or run is None:
        return None
    if last:
        save_full(full, job.chains, job.scales, run.path / FILE)
    return round(test_accuracy(full, test_set), 6)


def num_steps(config: OptimisationConfig, images_per_epoch: int) -> int:
    """Optimizer steps of a run: enough for `epochs` passes."""
    return max(1, math.ceil(config.epochs * images_per_epoch / config.batch_size))


def evaluation_rounds(rounds: int, evaluations: int) -> set[int]:
    """After which rounds (counted from 1) the full network is tested: spread evenly, the last one among them."""
    return {-(-rounds * number // evaluations) for number in range(1, evaluations + 1)}


def rate(config: OptimisationConfig, step: int, steps: int) -> float:
    """The learning rate of `step`, counted from 0, in a run of `steps`."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.schedule == "step":
        return config.lr * (1.0 if step < steps / 2 else 0.1 if step < 3 * steps / 4 else 0.01)
    if config.schedule == "cosine":
        passed = (step - config.lr_warmup_steps) / max(1, steps - config.lr_warmup_steps)
        return config.lr * (1 + math.cos(math.pi * passed)) / 2
    return config.lr


def pick_device(name: str) -> torch.device:
    """The device of this process: on a machine with several GPUs each local process takes its own."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device on this machine; give --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def together(transport: Transport, action: Callable[[], T]) -> T:
    """Do `action` in every process; where it fails for one of them, all raise its error and none waits in vain."""
    result, failure = None, ""
    try:
        result = action()
    except UserError as error:
        failure = str(error)
    for process, text in enumerate(transport.gather_text(failure)):
        if text.strip():
            where = f" (process {process})" if transport.num_processes > 1 else ""
            raise AgreedError(text.strip() + where)
    return result  # type: ignore[return-value]  # it is set: no process failed


def digest(*sets: Images) -> str:
    """A short text that differs where the images or labels of two data sets differ."""
    key = blake2b(digest_size=8)
    for one in sets:
        key.update(one.images.contiguous().numpy().tobytes())
        key.update(one.labels.numpy().tobytes())
    return key.hexdigest()


def _load_everywhere(config: TrainConfig, transport: Transport) -> tuple[Images, Images]:
    """The data set, downloaded by one process of each host while the others wait."""
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    network = config.network
    found = together(transport, lambda: load(network.data, network.data_dir) if first else None)
    if found is None:
        return together(transport, lambda: load(network.data, network.data_dir, download=False))
    together(transport, lambda: None)
    return found
