"""Preflight: find what can be known of a run before its processes are started or connected to each other."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from resist.blocks.chain import Chain
from resist.blocks.chains import choose_chains
from resist.blocks.holdings import weights_of
from resist.cost.footprint import build_on_meta
from resist.errors import UserError
from resist.report.units import amount
from resist.runs.config import TrainConfig
from resist.tasks import Task, network_builder
from resist.tasks.preflight import check_parts, example_of
from resist.training.optimizers import build_optimizer, resolve
from resist.training.trainer import make_sampler


def check_options(config: TrainConfig, device: torch.device, processes: int, here: Sequence[int]) -> None:
    """Check the network, the plans, the optimizer, and what the processes have to hold.

    No weights are allocated, but for networks that cannot be built without.

    Args:
        config: The options, which have been checked one by one.
        device: The device of this process.
        processes: Number of processes of the job.
        here: The workers of this machine, or of this process if its device is a GPU.

    Raises:
        UserError: One of them cannot be.
    """
    workers, optimization = config.method.workers, resolve(config.optimization)
    _check_processes(config, processes)
    model = build_on_meta(network_builder(config.network))
    chains: tuple[Chain, ...] = ()
    if example_of(config.network) is False:
        strategy = config.strategy()
        chains = choose_chains(model, config.network.chain, needed=strategy.ever_partitions)
        for round in strategy.change_rounds:
            strategy.plan(chains, seed=config.run.seed, round=round)
    else:  # `Job` finds the chains, with the example
        _check_names(model, config.network.chain)
    if optimization.optimizer != "sgd":  # which takes any parameters, and should start at once
        build_optimizer(optimization, model)
    check_parts(config)
    if chains:  # else `Job` finds them, or every worker holds all
        largest = config.strategy().plan(chains, seed=config.run.seed, round=config.method.warmup_rounds)
        weights = weights_of(model, chains)
        held = sum(weights.held(largest.capacities(worker)) for worker in here if worker < workers)
        copies = 3 if optimization.optimizer != "sgd" or optimization.momentum else 2
        check_memory(4 * copies * held, device, len(here))


def check_task(config: TrainConfig, task: Task) -> None:
    """Check that each worker has images enough for a batch.

    Args:
        config: The options.
        task: The task, with its data.

    Raises:
        UserError: A worker has not.
    """
    for worker in range(config.method.workers):
        make_sampler(config, task.num_images, worker)


def check_memory(needed_bytes: int, device: torch.device, workers: int) -> None:
    """Refuse what is clearly beyond the memory of a device.

    Args:
        needed_bytes: Bytes of the weights, gradients and optimizer state of all workers on it: a lower bound.
        device: The device.
        workers: Number of these workers, for the message.

    Raises:
        UserError: It has less memory than that.
    """
    there = total_bytes(device)
    if needed_bytes > there:
        where = "this machine" if device.type == "cpu" else f"{device}"
        raise UserError(
            f"weights, gradients and optimizer state of {workers} worker{'s' * (workers > 1)} need at least "
            f"{amount(needed_bytes)}, and {where} has {amount(there)} of memory; give fewer `workers`, a smaller "
            "`model`, or more machines"
        )


def total_bytes(device: torch.device) -> int:
    """Return the memory of a device; for the CPU that of the machine, or the limit of its container."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes[0] += 1024 * int(next(line for line in lines if line.startswith("SwapTotal")).split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return min(sizes)


def _check_processes(config: TrainConfig, processes: int) -> None:
    workers, strategy = config.method.workers, config.strategy()
    if processes > workers:
        raise UserError(f"{processes} processes for {workers} workers; start at most one process for each worker")
    if strategy.every_step and processes != workers:
        raise UserError(
            f"`strategy={config.method.strategy}` runs one worker in each process, and there would be {processes} for "
            f"{workers} workers; start {workers} (`processes={workers}`, or torchrun)"
        )


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse chains in modules that the network does not have."""
    modules = dict(model.named_modules())
    for name in names:
        if name != "all" and name.partition(":")[0] not in modules:
            inside = ", ".join(child for child, _ in model.named_children())
            raise UserError(f"`chain={name}`: the network has no module of that name; it has {inside[:200]}")
