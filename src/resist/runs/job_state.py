"""The state of a job in files: their names, the part of each process, and the way back.

The names of the tensors are those of `resist.state.saving`. A file's metadata has the records of its workers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resist.errors import UserError
from resist.job import Job
from resist.state.loading import Saved
from resist.state.names import weight_places
from resist.state.saving import Record, owned_network, worker_part, worker_record
from resist.state.values import decode, split
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS


def round_name(round: int) -> str:
    """The folder of a round: its files sort by name in the order of the rounds."""
    return f"round-{round:06d}"


def process_file(process: int | str) -> str:
    """The file of a process in the folder of a round."""
    return f"process-{process}.safetensors"


def worker_prefix(worker: int) -> str:
    """The beginning of the names of a worker's own weights, as in `workers.2.weights.conv1.weight`."""
    return f"workers.{worker}."


def owned_state(job: Job) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect everything that this process saves of a job between two rounds.

    Returns:
        Tensors by key, which are no copies, and the values of the record of each hosted worker.

    Raises:
        UserError: A value of an optimizer's state cannot be saved.
    """
    tensors, records = dict(owned_network(job)), dict[str, Any]()
    for worker in job.workers:
        record = worker_record(job, worker)
        tensors |= record.tensors
        records[str(worker.index)] = record.values
    return tensors, records


class Wanted:
    """The keys that a job needs of a checkpoint.

    Args:
        job: The job.
        about: The values of `resist.state.saving.about_job` that were saved.
    """

    def __init__(self, job: Job, about: Mapping[str, Any]) -> None:
        self.saved = Saved("", dict(about), {}, {})
        self.same_plan = self.saved.same_plan(job)
        self.workers = [worker.index for worker in job.workers] if self.same_plan else [0]
        plan = job.plan_of(about["round"])
        self._network = {name for w in job.workers for name, _, _ in weight_places(w.subnet, plan.held(w.index))}
        self._parts = {worker_part(worker) for worker in self.workers}

    def __call__(self, key: str) -> bool:
        """Return True for the key of a tensor that the job needs."""
        parts = split(key)
        if kind_of(parts) is not None:
            return parts[-1] in self._network
        return parts[0] in self._parts or (not self.same_plan and parts[1:2] == ("buffers",))


def kind_of(parts: tuple[str, ...]) -> str | None:
    """The kind of a tensor of the network; None for one of a worker's record."""
    if len(parts) == 1:
        return WEIGHTS
    return parts[0] if len(parts) == 2 and parts[0] in (AVERAGE, VELOCITY) else None


def saved_state(
    source: str,
    about: Mapping[str, Any],
    wanted: Wanted,
    keys: set[str],
    tensors: Mapping[str, Tensor],
    records: Mapping[str, Any],
) -> Saved:
    """Sort what was read of a checkpoint.

    Args:
        source: The checkpoint, for messages.
        about: The values of `about_job`.
        wanted: The keys that were read.
        keys: All keys that the checkpoint has.
        tensors: The tensors that were read.
        records: The values of all records by number of the worker.

    Raises:
        UserError: It has a key that belongs to no network and to no record.
    """
    saved = Saved(source, dict(about), {}, {})
    for key in keys:
        parts = split(key)
        kind = kind_of(parts)
        if kind is not None:
            saved.names.setdefault(kind, set()).add(parts[-1])
        elif not any(parts[0] == worker_part(int(worker)) for worker in records):
            raise UserError(f"{source} has a tensor {key!r}, which belongs to no worker; it is damaged")
    for key, tensor in tensors.items():
        kind = kind_of(split(key))
        if kind is not None:
            saved.network.setdefault(kind, {})[split(key)[-1]] = tensor
    for worker in wanted.workers:
        own = {key: tensor for key, tensor in tensors.items() if split(key)[0] == worker_part(worker)}
        saved.records[worker] = Record(records[str(worker)], own)
    for worker in sorted(map(int, records)) if not wanted.same_plan else ():
        for name, value in records[str(worker)]["buffers"].items():
            if name not in saved.buffers:  # of the first holder
                saved.buffers[name] = decode(value, tensors)
    return saved


@torch.no_grad()
def restore_weights(job: Job, tensors: Mapping[str, Tensor], source: Path) -> None:
    """Copy weights into a job that was made for their round.

    Args:
        job: The job.
        tensors: Tensors by global dotted name: at least all weights that the hosted workers hold.
        source: Where the tensors come from, for messages.

    Raises:
        UserError: A tensor is missing or has another shape. The job is then as it was.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    for worker in job.workers:
        for name, view in worker.subnet.state(job.plan.held(worker.index)).items():
            if name not in tensors or tensors[name].shape != view.shape:
                shape = tuple(view.shape)
                raise UserError(f"{source} has no tensor {name!r} of the shape {shape}; it belongs to another network")
            pairs.append((view, tensors[name]))
    for view, tensor in pairs:
        view.copy_(tensor)
    job.mark_anchors()
