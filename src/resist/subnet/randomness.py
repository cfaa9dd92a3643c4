"""Randomness of a training step: dropout, drop path and the like as a function of (seed, worker, step).

A GPU is named by its number, never taken to be the current one of the process or of the thread.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager

import torch

from resist.blocks.modules import fork_rng
from resist.planning.plan import keyed_int


def step_seed(seed: int, worker: int, step: int) -> int:
    """Return the seed of everything that a worker draws in a step.

    Args:
        seed: Seed of the job.
        worker: Number of the worker.
        step: Optimizer steps done before.

    Returns:
        A 63-bit integer.
    """
    return keyed_int("step", seed, worker, step)


@contextmanager
def seeded_rng(seed: int, device: torch.device) -> Generator[None]:
    """Seed torch's generators of the CPU and of one device within a context, and restore them at its end.

    Args:
        seed: Seed of both generators.
        device: Device of the network; a GPU is not waited for.
    """
    with seeded_gpus(seed, [device] if device.type == "cuda" else []), fork_rng():
        torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def seeded_gpus(seed: int, gpus: Sequence[torch.device]) -> Generator[None]:
    """Seed torch's generators of some GPUs within a context, and restore them at its end.

    Args:
        seed: Seed of all of them.
        gpus: The GPUs; they are not waited for.
    """
    with fork_rng(gpus):
        for gpu in gpus:
            index = gpu.index if ":" in str(gpu) else torch.cuda.current_device()
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


def gpus_in_use() -> list[torch.device]:
    """List all GPUs that this process sees, if it has begun to use one; otherwise none, and none is begun to use."""
    if not torch.cuda.is_initialized():
        return []
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
