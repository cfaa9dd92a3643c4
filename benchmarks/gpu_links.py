"""Rounds of two processes: weights by gloo from one GPU that they share, and by NCCL where there are two GPUs."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import resist
from gpu_part import Findings, Settings
from resist.cost.footprint import sgd
from resist.planning.methods import build_strategy
from resist.subnet.tensors import tensors_of
from resist.sync.distributed import connect
from resist.sync.local import Local
from resist.sync.transport import Transport

PROCESSES = 2
TIMEOUT_S = 60.0
STRATEGIES = ("resist", "local_sgd", "ddp")
MAX_DIFFERENCE = 1e-3  # from the weights of one process, relative to the largest weight


def links(settings: Settings, found: Findings) -> None:
    """Run the rounds, as one of the two processes; the other one is started here."""
    folder = Path(tempfile.mkdtemp(prefix="gpu-links-"))
    task = asdict(settings) | {"device": settings.device.type, "out": str(settings.out), "data": None}
    command = [sys.executable, __file__, json.dumps(task), str(folder / "store"), str(settings.left_s())]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    os.environ |= environment
    with subprocess.Popen(command, env=environment) as other:
        try:
            join(0, folder / "store")
            rounds(settings, found)
            dist.destroy_process_group()
            if other.wait(TIMEOUT_S):
                raise RuntimeError(f"the other process ended with status {other.returncode}; see its error above")
        finally:
            other.kill()
            shutil.rmtree(folder)


def join(rank: int, store: Path) -> None:
    """Form the group of the two processes."""
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES, timeout=timeout)


def rounds(settings: Settings, found: Findings | None) -> None:
    """Run rounds of each strategy by each backend that the devices allow.

    Args:
        settings: Settings of the part, the same in both processes.
        found: Where process 0 writes.
    """
    several = settings.on_gpu and torch.cuda.device_count() >= PROCESSES
    device = settings.device
    if several:
        device = torch.device("cuda", dist.get_rank())
    rows: list[dict[str, Any]] = []
    for backend in ("gloo", "nccl") if several else ("gloo",):
        for name in STRATEGIES:
            rows.append({"backend": backend, "strategy": name, **_rounds(settings, device, backend, name)})
            if found is not None:
                found.add(rounds=rows, max_difference=MAX_DIFFERENCE)
    if found is not None:
        differences = [row["difference"] for row in rows if row["difference"] is not None]
        found.add(
            agree=max(differences) <= MAX_DIFFERENCE,
            nccl="compared" if several else "not run: it needs two GPUs, one for each process",
        )


def _rounds(settings: Settings, device: torch.device, backend: str, name: str) -> dict[str, Any]:
    """Run some rounds of one step; process 0 compares the network with that of one process."""
    transport = connect(PROCESSES, device, TIMEOUT_S, backend=backend)
    job = _job(settings, device, name, transport)
    try:
        seconds = _train(settings, job)
        traffic = job.transport.take()
        full = job.full_model()
    finally:
        job.close()
    difference = None
    if full is not None and name != "ddp":  # which needs a process for each worker
        alone = _job(settings, device, name, Local(PROCESSES))
        _train(settings, alone)
        difference = _difference(full, alone.full_model())
    dist.barrier()
    return {
        "first_s": seconds[0],
        "later_s": median(seconds[1:]),
        "all_s": seconds,
        "bytes": traffic["bytes"],
        "difference": difference,
    }


def _job(settings: Settings, device: torch.device, name: str, transport: Transport) -> resist.Job:
    strategy = build_strategy(name, PROCESSES, 1, min_depth=1, optimizer_state="average")
    return resist.Job(settings.network, strategy, batchnorm="average", device=device, transport=transport,
                      example=False)  # fmt: skip


def _train(settings: Settings, job: resist.Job) -> list[float]:
    """Take steps with a round of one step; returns the seconds of each synchronization, for ddp of each step."""
    optimizers = [sgd(worker.model.parameters()) for worker in job.workers]
    seconds: list[float] = []
    for number in range(1 + settings.size.repetitions):
        begin = time.perf_counter()
        for worker, optimizer in zip(job.workers, optimizers, strict=True):
            generator = torch.Generator().manual_seed(1000 * worker.index + number)
            images = torch.randn(settings.size.batch_size, 3, 32, 32, generator=generator)
            labels = torch.randint(10, (settings.size.batch_size,), generator=generator)
            device = worker.subnet.device
            F.cross_entropy(worker.model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        settings.synchronize()
        if not job.strategy.at(job.round).every_step:
            if job.transport.num_processes > 1:
                dist.barrier()  # the time of the slower one is not that of the exchange
            begin = time.perf_counter()
        job.step(*optimizers)
        settings.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _difference(one: nn.Module, other: nn.Module | None) -> float:
    """Return the largest difference of the weights, relative to the largest weight."""
    assert other is not None
    weights = tensors_of(other)
    pairs = [(tensor.detach().cpu(), weights[name].detach().cpu()) for name, tensor in tensors_of(one).items()]
    return max(float((a - b).abs().max()) for a, b in pairs) / max(float(a.abs().max()) for a, _ in pairs)


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    given = Settings(**values | {"device": torch.device(values["device"]), "out": Path(values["out"])})
    join(1, Path(sys.argv[2]))
    rounds(replace(given, seconds=float(sys.argv[3]), began=time.monotonic()), None)
    dist.destroy_process_group()
