"""Images per second of a sub-network under `Job` and in plain torch, and peak memory against its prediction."""

import gc
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import resist
from gpu_part import WORKERS, Findings, Settings
from memory import Alone
from resist.cost import GpuSettings, predict
from resist.cost.footprint import LiveBytes, mean_square, sgd
from resist.cost.gpu import CONTEXT_BYTES

ENDLESS = 1_000_000_000  # local steps of a worker that never synchronizes
WARM_UP = 3
MAX_PERCENT = 5.0  # that a sub-network may be slower under Job
Step = Callable[[int], None]


def speed(settings: Settings, found: Findings) -> None:
    """Time steps under `Job`, of the same network in plain torch, and of the full network; then a synchronization."""
    size = settings.size
    found.add(workers=WORKERS, held=size.held, batch_size=size.batch_size, steps=size.steps, precision="bf16",
              memory_format="channels_last", compile=size.backend if settings.compile else None,
              max_percent=MAX_PERCENT)  # fmt: skip
    settings.choose_convolutions()
    rates: dict[str, list[float]] = {}
    warm_up_s: dict[str, float] = {}
    for names in (("job", "plain"), ("full",)):  # what is compared comes first
        steps: dict[str, Step] = {}
        for name in names:
            begin = time.perf_counter()
            steps[name] = _steps_of(name, settings)
            for number in range(WARM_UP):
                steps[name](number)
            settings.synchronize()
            warm_up_s[name] = time.perf_counter() - begin
            found.add(warm_up_s=warm_up_s)
        rates |= _rates(settings, steps)
        found.add(images_s={name: median(values) for name, values in rates.items()}, all_images_s=rates)
        if "full" not in rates:
            percent = [100 * (plain / job - 1) for job, plain in zip(rates["job"], rates["plain"], strict=True)]
            found.add(slower_percent=median(percent), reached=median(percent) <= MAX_PERCENT)
    found.add(times_full=median(rates["job"]) / median(rates["full"]))
    steps.clear()
    found.add(synchronization=_synchronization(settings))


def _rates(settings: Settings, steps: Mapping[str, Step]) -> dict[str, list[float]]:
    """Time networks in turn, so that clocks and temperatures are the same for all; returns images per second."""
    size, rates = settings.size, {name: list[float]() for name in steps}
    for _ in range(size.repetitions):
        for name, step in steps.items():
            settings.synchronize()
            begin = time.perf_counter()
            for number in range(size.steps):
                step(number)
            settings.synchronize()
            rates[name].append(size.steps * size.batch_size / (time.perf_counter() - begin))
    return rates


def _steps_of(name: str, settings: Settings) -> Step:
    """Return a function that takes a step of one of the three networks."""
    size, device = settings.size, settings.device
    if name == "job":
        strategy = resist.resist(WORKERS, ENDLESS, capacities=size.held)
        job = resist.Job(settings.network, strategy, device=device, channels_last=True, transport=Alone(WORKERS),
                         example=False)  # fmt: skip
        return stepper(settings, job.model, sgd(job.model.parameters()), job.step)
    model = settings.network(size.held if name == "plain" else None)
    model = model.to(device, memory_format=torch.channels_last)
    return stepper(settings, model, sgd(model.parameters()), lambda optimizer: None)


def stepper(settings: Settings, model: nn.Module, optimizer: Optimizer, after: Callable[[Optimizer], object]) -> Step:
    """Return a function that takes an optimizer step on one of some batches that are on the device.

    Args:
        settings: Settings of the part.
        model: The network.
        optimizer: Its optimizer.
        after: Called after each step.
    """
    compiled = settings.compiled(model)
    batches = [batch(settings, number) for number in range(4)]

    def step(number: int) -> None:
        images, labels = batches[number % len(batches)]
        with torch.autocast(settings.device.type, torch.bfloat16):
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after(optimizer)

    return step


def batch(settings: Settings, number: int) -> tuple[Tensor, Tensor]:
    """Return random images (batch, 3, 32, 32), channels last, and labels (batch,), on the device."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(settings.size.batch_size, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (settings.size.batch_size,), generator=generator)
    return images.to(settings.device, memory_format=torch.channels_last), labels.to(settings.device)


def _synchronization(settings: Settings) -> dict[str, Any]:
    """Time the synchronization of four workers in one process."""
    size = settings.size
    strategy = resist.resist(WORKERS, 1, capacities=size.held, optimizer_state="average")
    job = resist.Job(settings.network, strategy, device=settings.device, channels_last=True, example=False)
    optimizers = [sgd(worker.model.parameters()) for worker in job.workers]
    seconds: list[float] = []
    for _ in range(1 + size.repetitions):
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            images, labels = batch(settings, worker.index)
            F.cross_entropy(worker.model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        settings.synchronize()
        begin = time.perf_counter()
        assert job.step(*optimizers)
        settings.synchronize()
        seconds.append(time.perf_counter() - begin)
    return {"first_s": seconds[0], "later_s": median(seconds[1:]), "all_s": seconds, "optimizer_state": "average"}


def memory(settings: Settings, found: Findings) -> None:
    """Compare the peak of two steps with the prediction: the sub-network under `Job` and the full network."""
    size, rows, gpu = settings.size, [], GpuSettings() if settings.on_gpu else None
    strategies = {
        "resist": resist.resist(WORKERS, ENDLESS, capacities=size.held),
        "local_sgd": resist.local_sgd(WORKERS, ENDLESS),
    }
    for batch_size in (size.batch_size // 4, size.batch_size):
        report = predict(settings.network, list(strategies.values()), batch_size=batch_size, rounds=1, gpu=gpu)
        for row, (name, strategy) in zip(report.rows, strategies.items(), strict=True):
            predicted = row.networks[0].memory.peak
            measured = _peaks(settings, strategy, batch_size)
            error = 100 * (predicted / measured["allocated"] - 1)
            rows.append({"strategy": name, "batch_size": batch_size, "predicted": predicted, **measured,
                         "error_percent": error})  # fmt: skip
            found.add(bytes=rows, precision="fp32")
    if settings.on_gpu:
        free, total = torch.cuda.mem_get_info(settings.device)
        outside = total - free - torch.cuda.memory_reserved(settings.device)
        # Context, kernels and libraries; and those of other programs.
        found.add(outside_torch_bytes=outside, predicted_context_bytes=CONTEXT_BYTES)


def _peaks(settings: Settings, strategy: resist.Strategy, batch_size: int) -> dict[str, int]:
    """Return the peak bytes of two steps: allocated, and on a GPU reserved by torch."""
    device = settings.device
    gc.collect()
    before = 0
    if settings.on_gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    job = resist.Job(settings.network, strategy, device=device, transport=Alone(WORKERS), example=False)
    if settings.on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        _two_steps(settings, job, batch_size)
        reserved = torch.cuda.max_memory_reserved(device)
        return {"allocated": torch.cuda.max_memory_allocated(device) - before, "reserved": reserved}
    live = LiveBytes()  # no allocator counts on a CPU
    for tensor in (*job.model.parameters(), *job.model.buffers()):
        live.watch(tensor)
    with live:
        _two_steps(settings, job, batch_size)
    return {"allocated": live.peak}


def _two_steps(settings: Settings, job: resist.Job, batch_size: int) -> None:
    optimizer = sgd(job.model.parameters())
    images = torch.randn(batch_size, 3, 32, 32, device=settings.device)
    for _ in range(2):
        mean_square(job.model, images).backward()
        optimizer.step()
        optimizer.zero_grad()
        job.step(optimizer)
    settings.synchronize()
