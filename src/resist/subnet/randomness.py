"""Randomness of a training step: dropout, drop path and the like as a function of (seed, worker, step)."""

from collections.abc import Generator
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
    gpu = [device] if device.type == "cuda" else []
    with fork_rng(gpu):
        torch.default_generator.manual_seed(seed)
        if gpu:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
