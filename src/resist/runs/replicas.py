"""Replicas and diverged weights: tensor files that each process writes for itself when a run cannot continue.

    RUN/replicas/round-000012/process-3.safetensors    weights as they were synchronized, by global name (`replicate`)
    RUN/diverged/round-000012/process-3.safetensors    weights as they were when training diverged, to look at

No process waits for another here: one of them may be lost. The metadata of each file has the entries of a checkpoint's
job.json; `newest_replicas` finds out whether the files of a round have the complete network.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from resist.errors import UserError
from resist.job import Job
from resist.runs.job_state import process_file, restore_weights, round_name, worker_prefix
from resist.runs.tensor_file import Description, read_description, read_tensors, verify_tensors, write_tensors
from resist.sync.averaging import WEIGHTS

REPLICAS, DIVERGED = "resist replicas 2", "resist diverged weights 2"
LEAST = {"round": 0, "step": 0, "workers": 1, "tensors": 0}


def write_replicas(folder: Path, job: Job, attempt: str = "") -> None:
    """Write the replicas that this process keeps.

    Args:
        folder: RUN/replicas; it is made if it does not exist.
        job: The job, which may have lost workers.
        attempt: A text that distinguishes this attempt from others, equal in all processes: files of several attempts
            are never combined.

    Raises:
        UserError: They cannot be written.
    """
    subnet = job.workers[0].subnet
    num_tensors = 0
    for layout in subnet.layouts.values():
        num_tensors += len(layout.shared.pieces)
        num_tensors += sum(
            chain.num_blocks * len(block.pieces) for chain, block in zip(job.chains, layout.blocks, strict=True)
        )
    for replica in job.replicas:
        metadata = {
            "round": replica.round,
            "step": replica.step,
            "workers": job.strategy.workers,
            "tensors": num_tensors,
            "attempt": attempt,
        }
        _write(folder, job, replica.tensors, REPLICAS, metadata)


def write_diverged(folder: Path, job: Job) -> None:
    """Write the weights of the hosted workers, finite or not.

    Their names are as in `workers.2.weights.conv1.weight`.

    Raises:
        UserError: They cannot be written.
    """
    tensors = {
        f"{worker_prefix(worker.index)}{WEIGHTS}.{name}": view
        for worker in job.workers
        for name, view in worker.subnet.state(job.plan.held(worker.index)).items()
    }
    number = job.round + 1  # of the round that could not be completed
    metadata = {"round": number, "step": job.step_index, "workers": job.strategy.workers, "dropped": job.dropped}
    _write(folder, job, tensors, DIVERGED, metadata)


def newest_replicas(folder: Path) -> tuple[dict[str, Any] | None, list[UserError]]:
    """Find the newest round whose network is complete in `folder`.

    Returns:
        The metadata of its files (round, step, workers, tensors, attempt), or None; and an error for each file that is
        damaged or has another format, and counts as missing.
    """
    errors: list[UserError] = []
    for path in sorted((path for path in folder.glob("round-*") if path.is_dir()), reverse=True):
        parts: dict[str, list[Description]] = {}  # of one attempt each
        for file in sorted(path.glob(process_file("*"))):
            try:
                part = verify_tensors(file, REPLICAS)
                _check_metadata(file, part.metadata)
            except UserError as error:
                errors.append(error)
                continue
            parts.setdefault(json.dumps(part.metadata, sort_keys=True), []).append(part)
        for same in parts.values():
            if len(frozenset().union(*(part.names for part in same))) == same[0].metadata["tensors"]:
                return same[0].metadata, errors
    return None, errors + _older_files(folder)


def restore_replicas(job: Job, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Give a job the weights of its replicas.

    Each process reads what it needs.

    Args:
        job: The job, with any number of workers.
        folder: RUN/replicas.
        metadata: As `newest_replicas` returned it, in the process that searched.

    Raises:
        UserError: The files do not have all weights of this network.
    """
    path = folder / round_name(metadata["round"])
    missing = {name for worker in job.workers for name in worker.subnet.state(job.plan.held(worker.index))}
    tensors: dict[str, Tensor] = {}
    reason = ""
    for file in sorted(path.glob(process_file("*"))):
        try:
            if read_description(file, REPLICAS).metadata == metadata:
                tensors |= read_tensors(file, REPLICAS, missing.__contains__)
                missing -= tensors.keys()
        except UserError as error:
            reason = str(error)  # the same tensors may be in the file of another process
    if missing:
        reason = reason or f"no file there has the tensor {min(missing)!r}"
        raise UserError(
            f"{path}: {reason}; the network has to be the same, and all processes need to see this folder; remove it "
            "to resume without it"
        )
    restore_weights(job, tensors, path)


def remove_replicas(folder: Path, up_to: int) -> None:
    """Remove the replicas of rounds that a checkpoint covers: those up to round `up_to`."""
    for path in folder.glob("round-*"):
        if path.is_dir() and path.name <= round_name(up_to):
            shutil.rmtree(path, ignore_errors=True)


def _write(
    folder: Path, job: Job, tensors: Mapping[str, Tensor], file_format: str, metadata: Mapping[str, Any]
) -> None:
    path = folder / round_name(metadata["round"])
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be made: {error.strerror}; make room there") from error
    process = job.transport.process_of(job.workers[0].index)
    write_tensors(path / process_file(process), tensors, file_format, metadata)


def _check_metadata(path: Path, metadata: Mapping[str, Any]) -> None:
    for name, least in LEAST.items():
        value = metadata.get(name)
        if type(value) is not int or value < least:
            raise UserError(f"{path} is damaged: {name}={value!r}; must be an integer, at least {least}")
    if path.parent.name != round_name(metadata["round"]):
        raise UserError(f"{path} is damaged: it belongs to round {metadata['round']}")


def _older_files(folder: Path) -> list[UserError]:
    """The errors for replicas of an earlier version, which are files in `folder` itself."""
    errors: list[UserError] = []
    for file in sorted(folder.glob("round-*.safetensors")):
        try:
            read_description(file, REPLICAS)
        except UserError as error:
            errors.append(error)
    return errors
