"""Train the paper's network on CIFAR-10 for a given time: ResIST, or local SGD with as much time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

import resist
from gpu_data import read_parts
from gpu_part import WORKERS, Findings, Settings
from resist.data import Images, Loader, Sampler, load
from resist.planning.strategy import Strategy
from resist.subnet.batchnorm import recalibrate
from resist.tasks import Classification

PAPER_PERCENT = 92.35  # ResIST on CIFAR-10 with four workers
QUARTERS = 4
WARM_UP_SHARE = 0.05  # of the time, in which the learning rate rises
TEST_S = 30.0  # time that is kept for the last test
TEST_BATCH = 500


@dataclass
class Course:
    """The course of a run.

    Attributes:
        trained_s: Seconds of training and synchronizing.
        synchronizing_s: Seconds of these that synchronizations took.
        rounds: Rounds done.
        loss: Mean loss of the last round.
    """

    trained_s: float = 0.0
    synchronizing_s: float = 0.0
    rounds: int = 0
    loss: float = math.nan


def train_resist(settings: Settings, found: Findings) -> None:
    """Train sub-networks of six of 22 blocks."""
    size = settings.size
    strategy = resist.resist(WORKERS, size.local_steps, capacities=size.held, optimizer_state="average")
    train(settings, found, strategy)


def train_local_sgd(settings: Settings, found: Findings) -> None:
    """Train full networks."""
    train(settings, found, resist.local_sgd(WORKERS, settings.size.local_steps, optimizer_state="average"))


def train(settings: Settings, found: Findings, strategy: Strategy) -> None:
    """Train four workers in one process, as many rounds as the time allows, and test the full network.

    The learning rate follows the time: it rises in the first twentieth, and falls along a cosine to zero.
    """
    size, device = settings.size, settings.device
    settings.choose_convolutions()
    train_images, test_images = (images.to(device, channels_last=True) for images in data(settings))
    job = resist.Job(settings.network, strategy, batchnorm="average", device=device, channels_last=True, example=False)
    optimizers = [
        torch.optim.SGD(worker.model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4) for worker in job.workers
    ]
    models = [settings.compiled(worker.model) for worker in job.workers]
    loaders = [
        train_images.loader(
            Sampler(len(train_images), batch_size=size.batch_size, seed=0, worker=worker.index, workers=WORKERS)
        )
        for worker in job.workers
    ]
    found.add(workers=WORKERS, local_steps=size.local_steps, batch_size=size.batch_size, lr=settings.lr,
              train_s=settings.train_s, precision="bf16", memory_format="channels_last", num_train=len(train_images),
              weights=[worker.subnet.numel(job.plan.capacities(worker.index)) for worker in job.workers],
              paper_percent=PAPER_PERCENT)  # fmt: skip
    found.add(warm_up_s=_warm_up(settings, models, loaders, optimizers))
    course, curve = Course(), list[dict[str, float]]()
    while course.trained_s < settings.train_s and settings.left_s() > TEST_S:
        _round(settings, job, models, optimizers, loaders, course)
        images = WORKERS * size.batch_size * job.step_index
        found.add(rounds=course.rounds, loss=course.loss, trained_s=course.trained_s,
                  synchronizing_s=course.synchronizing_s, images_s=images / course.trained_s,
                  epochs=images / len(train_images))  # fmt: skip
        if (len(curve) + 1) * settings.train_s / QUARTERS <= course.trained_s < settings.train_s:
            curve.append({"trained_s": course.trained_s, "percent": accuracy(_full(job), test_images)})
            found.add(curve=curve)
    found.add(percent=_readings(settings, job, train_images, test_images), percent_of=len(test_images))


def data(settings: Settings) -> tuple[Images, Images]:
    """Return CIFAR-10 from its parts; a tiny run without parts gets noise.

    Raises:
        SystemExit: There are no parts.
    """
    if settings.data is not None:
        return read_parts(settings.data)
    if not settings.tiny:
        raise SystemExit("training needs CIFAR-10; make its parts by benchmarks/gpu_data.py, and give --data FOLDER")
    train_images, test_images = load("synthetic")
    assert isinstance(train_images, Images)
    assert isinstance(test_images, Images)
    return train_images, test_images


def rate(progress: float, lr: float) -> float:
    """Return the learning rate.

    Args:
        progress: Share of the time that has passed, from 0 to 1.
        lr: Highest learning rate.
    """
    if progress < WARM_UP_SHARE:
        return lr * max(progress, 0.1 * WARM_UP_SHARE) / WARM_UP_SHARE
    return lr * (1 + math.cos(math.pi * (progress - WARM_UP_SHARE) / (1 - WARM_UP_SHARE))) / 2


def _warm_up(
    settings: Settings, models: list[Callable[..., Any]], loaders: list[Loader], optimizers: list[Optimizer]
) -> float:
    """Compile everything by steps at a rate of zero; returns the seconds."""
    begin = time.perf_counter()
    for model, loader, optimizer in zip(models, loaders, optimizers, strict=True):
        _step(settings, model, optimizer, loader, 0)
        optimizer.state.clear()  # momentum of a step that does not count
    settings.synchronize()
    return time.perf_counter() - begin


def _step(
    settings: Settings, model: Callable[..., Any], optimizer: Optimizer, loader: Loader, step: int
) -> torch.Tensor:
    images, labels = loader.batch(step)
    with torch.autocast(settings.device.type, torch.bfloat16):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _round(
    settings: Settings, job: resist.Job, models: list[Callable[..., Any]], optimizers: list[Optimizer],
    loaders: list[Loader], course: Course,
) -> None:  # fmt: skip
    """Train a round and synchronize."""
    settings.synchronize()
    begin, total = time.perf_counter(), torch.zeros((), device=settings.device)
    lr = rate(min(1.0, course.trained_s / settings.train_s), settings.lr)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
    steps = job.steps_left
    for number in range(steps):
        for model, optimizer, loader in zip(models, optimizers, loaders, strict=True):
            total += _step(settings, model, optimizer, loader, job.step_index)
        if number < steps - 1:
            job.step(*optimizers)
    settings.synchronize()
    trained = time.perf_counter()
    assert job.step(*optimizers)
    settings.synchronize()
    end = time.perf_counter()
    course.trained_s += end - begin
    course.synchronizing_s += end - trained
    course.rounds += 1
    course.loss = float(total) / (steps * len(models))


def _full(job: resist.Job) -> nn.Module:
    full = job.full_model()
    assert full is not None
    return full


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the percentage of correct answers."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=images.labels.device)
    for batch, labels in images.batches(TEST_BATCH):
        right += (model(batch).argmax(1) == labels).sum()
    return 100 * int(right) / len(images)


def _readings(settings: Settings, job: resist.Job, train_images: Images, test_images: Images) -> dict[str, float]:
    """Return the accuracy with averaged statistics of BatchNorm, and with re-estimated ones."""
    full = _full(job)
    percent = {"averaged": accuracy(full, test_images)}
    # The images on which `resist train` estimates statistics: augmented training images.
    batches = Classification(nn.Identity, train_images, train_images).calibration(0)
    recalibrate(full, islice(batches, 2 if settings.tiny else None), job.workers[0].subnet.device)
    return percent | {"re-estimated": accuracy(full, test_images)}
