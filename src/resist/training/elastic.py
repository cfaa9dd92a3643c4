"""Elastic: train as one process of a run whose members come and go (`resist.training.member`)."""

import logging
import os
from dataclasses import replace
from pathlib import Path

from resist.errors import RunEndedError
from resist.members.membership import ENDED, Membership
from resist.members.secret import read_secret
from resist.members.store_client import SecretStore, run_store
from resist.runs.config import TrainConfig
from resist.runs.elastic import at_size, bounds_of
from resist.sync.meeting import environment_number
from resist.tasks import Task
from resist.training.common import common_values, network_values
from resist.training.device import take_device
from resist.training.member import Member
from resist.training.optimizers import resolve
from resist.training.preflight import check_options
from resist.training.train import open_data
from resist.training.trainer import make_sampler
from resist.training.wall import run_began

log = logging.getLogger(__name__)

PORT = 29400  # of `resist rendezvous`


def run_name(out: Path) -> str:
    """Return the name of a run at the store, which may serve several: that of its directory."""
    return f"run {out.absolute().name}"


def ended_key(out: Path) -> str:
    """Return the key in the store that has a value when the members have ended a run."""
    return f"{run_name(out)}/{ENDED}"


def train_elastic(config: TrainConfig, task: Task | None = None, *, checked: bool = True) -> int:
    """Train as one process of an elastic run, with one worker.

    MASTER_ADDR and MASTER_PORT in the environment are the address of the store, RESIST_SECRET is its secret.

    Args:
        config: The options, checked, equal in all processes.
        task: The task, in forks of a process that has opened it. Default: opened here.
        checked: A launcher has started this process, and has checked the options.

    Returns:
        The exit status.

    Raises:
        UserError: An option is invalid, a file cannot be read or written, training diverged, or the run has ended.
        WorkerLostError: This process cannot go on with the others, or too few are left.
    """
    began, machine, workers = run_began(), config.machine, config.method.workers
    out = config.run.resume or config.run.out
    assert out is not None, "it is given, or the launcher has chosen it"
    assert machine.elastic is not None, "or another function trains"
    bounds = bounds_of(machine.elastic)
    os.environ |= {"WORLD_SIZE": str(workers)}
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    fixed_shapes = config.network.task == "classification"
    device = take_device(machine.device, fixed_shapes=fixed_shapes, deterministic=machine.deterministic)
    if not checked:
        check_options(config, device, workers, range(1))
    config = replace(config, optimization=resolve(config.optimization))
    task = open_data(config) if task is None else task
    most = at_size(config, bounds.most or workers)
    make_sampler(most, task.num_images, most.method.workers - 1)  # images enough for each of them
    port = environment_number("MASTER_PORT", PORT)
    store = SecretStore(os.environ["MASTER_ADDR"], port, read_secret(), machine.timeout_s)
    about = {**common_values(config, task), **network_values(config, task)}
    membership = Membership(
        run_store(store, run_name(out)),
        {name: str(value) for name, value in about.items()},
        least=bounds.least,
        most=bounds.most,
        timeout_s=machine.timeout_s,
    )
    task = task.to(device, channels_last=machine.channels_last)
    member = Member(config, task, membership, device, out, began, supervised=checked)
    try:
        return member.train()
    except RunEndedError as error:
        if not checked:
            raise
        log.debug("too late: %s", error)  # the others have said it
        return 0
    finally:
        membership.leave()
