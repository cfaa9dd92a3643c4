"""`resist.save_checkpoint` and `resist.load_checkpoint`: the checkpoints of `resist train`, for one's own loop."""

import logging
import secrets
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from resist.errors import UserError
from resist.job import Job
from resist.runs.checkpoint import KEEP, Checkpoints
from resist.runs.restore import restore
from resist.runs.saved import JOB, complete, newest, read_job, verify
from resist.runs.tensor_file import FormatError
from resist.sync.agreement import run_everywhere

log = logging.getLogger(__name__)

# The run that a job belongs to, so that two never share a folder: a random text, or None for one of `resist train`.
RUNS: WeakKeyDictionary[Job, str | None] = WeakKeyDictionary()


def save_checkpoint(
    folder: str | PathLike[str],
    job: Job,
    optimizers: Sequence[Optimizer] | None = None,
    *,
    extra: Mapping[str, object] | None = None,
    keep: int = KEEP,
) -> Path:
    """Save a job between two rounds.

    Every process has to call it, and to see the folder.

    A checkpoint appears complete or not at all, as `folder/round-000012`; the newest ones stay. It has safetensors
    files and JSON, nothing that is unpickled, and the weights in them have the names of the full network.

        if job.step(optimizer) and job.round % 10 == 0:
            resist.save_checkpoint("checkpoints", job, extra={"schedule": lr_schedule, "epoch": epoch})

    Args:
        folder: Where to write. It is made if it does not exist.
        job: The job, where `step` has returned True, or after `finish`.
        optimizers: The optimizers of all hosted workers. Default: those that `step` or `attach` was given.
        extra: Further values of this process by name: numbers, texts, tensors, arrays, random generators; dicts, lists,
            tuples and sets of them; and things with `state_dict()` and `load_state_dict()`, such as learning rate
            schedules, samplers and a GradScaler. Tensors in all of these are saved as tensors, in CPU memory when they
            are read again, unless a `load_state_dict` moves them.
        keep: How many checkpoints of this run stay in the folder, this one included.

    Returns:
        The folder of the checkpoint.

    Raises:
        UserError: In the middle of a round.
        AgreedError: In all processes: a value cannot be saved; the folder has checkpoints of another run, or of a later
            round; it cannot be written.
        WorkerLostError: Another process is lost.
    """
    if keep < 1:
        raise UserError(f"keep={keep}; must be at least 1")
    folder, is_main = Path(folder), 0 in job.transport.hosted
    checkpoints = Checkpoints(
        folder,
        job.transport,
        timeout_s=job.timeout_s,
        keep=keep,
        remedy="make room there, and give a folder that all processes see",
    )
    if job not in RUNS:
        RUNS[job] = secrets.token_hex(8)
    run_everywhere(job.transport, lambda: _check_free(folder, job) if is_main else None)
    checkpoints.begin(job, optimizers or (), {"run": RUNS[job]}, extra)
    checkpoints.finish()
    name = job.transport.all_gather_text(_newest_name(folder) if is_main else "")[0]
    return folder / name


def load_checkpoint(
    folder: str | PathLike[str],
    job: Job,
    optimizers: Sequence[Optimizer] | None = None,
    *,
    extra: Mapping[str, object] | None = None,
    missing_ok: bool = False,
) -> dict[str, Any] | None:
    """Give a job the state of a checkpoint, with its round and step.

    Every process has to call it.

    The job may have another number of workers or processes, other chains or capacities. If it has the same plan, it
    continues as if nothing had happened, on the CPU bit for bit with the same processes. Otherwise it gets the network:
    weights, averages and outer momentum; the optimizers keep the saved settings, such as the learning rate, but no
    state; and the step is the one at which all workers together have seen as many images.

    Args:
        folder: Where `save_checkpoint` has written, of which the newest undamaged one is taken; or one checkpoint.
        job: The job, made as the saved one, after `follow` if it has averages.
        optimizers: The optimizers of all hosted workers. Default: those that `attach` or `step` was given. An empty
            list: no state of optimizers is loaded.
        extra: Things to load in place, by their names: those with `load_state_dict()`, and random generators.
        missing_ok: Return None where there is no checkpoint yet.

    Returns:
        The extra values by name: things that were loaded in place, the states of those that were not given, and all
        other values. Those that this process has saved; those of process 0 with another number of processes.

    Raises:
        AgreedError: In all processes: there is no checkpoint, or all are damaged; it belongs to another network or to
            other optimizers, and which; `extra` has a name that it has not.
        WorkerLostError: Another process is lost.
    """
    folder, is_main = Path(folder), 0 in job.transport.hosted
    found = run_everywhere(job.transport, lambda: _find(folder, missing_ok=missing_ok) if is_main else "")
    name = job.transport.all_gather_text(found)[0]
    if not name:
        return None
    path = folder if name == "." else folder / name
    run_everywhere(job.transport, lambda: check_visible(path))
    values = run_everywhere(job.transport, lambda: restore(job, optimizers, path, extra=extra))
    RUNS[job] = read_job(path).get("run")
    return values


def check_visible(path: Path) -> None:
    """Raise UserError where this process does not see the checkpoint that process 0 has verified."""
    try:
        (path / JOB).read_bytes()
    except OSError as error:
        raise UserError(f"{path / JOB}: {error.strerror}; all processes have to see the same folder") from error


def _find(folder: Path, *, missing_ok: bool) -> str:
    """Name of the checkpoint to load in `folder`; "." for the folder itself; "" for none."""
    if (folder / JOB).exists():
        verify(folder)
        return "."
    path, errors = newest(folder)
    if path is None and errors:
        raise errors[0] if isinstance(errors[0], FormatError) else UserError(f"{errors[0]}; no other one is sound")
    for error in errors:
        log.warning("skipped: %s", error)
    if path is None and not missing_ok:
        raise UserError(f"no checkpoint in {folder}; give another folder, or `missing_ok=True` to begin without")
    return "" if path is None else path.name


def _check_free(folder: Path, job: Job) -> None:
    """Raise UserError where a later load from the folder would not find what is saved now."""
    for path in complete(folder):
        try:
            about = read_job(path)
        except UserError:
            continue  # damaged, and skipped by every load
        if about.get("run") != RUNS[job]:
            raise UserError(
                f"{folder} has a checkpoint of another run ({path.name}); give another folder, or load it to go on"
            )
        if about["round"] > job.round:
            raise UserError(
                f"{folder} has {path.name}, and this job is at round {job.round}; remove what is later, or give "
                "another folder"
            )


def _newest_name(folder: Path) -> str:
    return complete(folder)[0].name
