"""Restoring: give a job, its optimizers and the user's own values the state of a checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from resist.errors import UserError, first_line
from resist.job import Job
from resist.runs.checkpoint import FORMAT, read_job
from resist.runs.job_state import Wanted, process_file, saved_state
from resist.runs.tensor_file import read_description, read_tensors
from resist.state.loading import BROKEN, check_about, load
from resist.state.values import decode, split


def restore(
    job: Job, optimizers: Sequence[Optimizer] | None, path: Path, *, extra: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """Give a job the state of a checkpoint, and set its round and step. Each process reads what it needs.

    Args:
        job: The job; it is left as it was if the checkpoint cannot be read, or belongs to another job.
        optimizers: Those of the hosted workers. None: those that the job knows. Empty: they begin anew.
        path: Folder of a checkpoint that `resist.runs.checkpoint.verify` found sound.
        extra: Things to load in place, by the names under which they were saved.

    Returns:
        The extra values of this process; those of process 0, where the number of processes is another one.

    Raises:
        UserError: The checkpoint cannot be read, or belongs to another network or to other optimizers.
    """
    source, about = f"checkpoint {path}", read_job(path)
    if optimizers:
        job.attach(*optimizers)
    same_processes = about["processes"] == job.transport.num_processes
    mine = process_file(job.transport.process_of(job.workers[0].index) if same_processes else 0)
    tensors: dict[str, Tensor] = {}
    extra_tensors: dict[str, Tensor] = {}
    records: dict[str, Any] = {}
    keys: set[str] = set()
    values: Any = None
    try:
        check_about(about)
        wanted = Wanted(job, about)
        for name in about["files"]:
            description = read_description(path / name, FORMAT)
            found = read_tensors(
                path / name, FORMAT, lambda key, name=name: wanted(key) or (_is_extra(key) and name == mine)
            )
            extra_tensors |= {key: tensor for key, tensor in found.items() if _is_extra(key)}
            tensors |= {key: tensor for key, tensor in found.items() if not _is_extra(key)}
            keys |= {key for key in description.names if not _is_extra(key)}
            records |= description.metadata["records"]
            if name == mine:
                values, extra_tensors = description.metadata["extra"], read_tensors(path / name, FORMAT, _is_extra)
        saved = saved_state(source, about, wanted, keys, tensors, records)
        names = {key for key, _ in values["dict"]}
        if missing := (extra or {}).keys() - names:
            has = ", ".join(sorted(names)) or "nothing"
            raise UserError(f"{source} has no extra {min(missing)!r}; it has {has}")
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{source} is damaged: {first_line(error)}") from error
    load(job, saved, with_optimizers=optimizers is None or len(optimizers) > 0)
    loaded: dict[str, Any] = {}
    for name, value in values["dict"]:
        try:
            loaded[name] = decode(value, extra_tensors, into=(extra or {}).get(name))
        except Exception as error:  # of the thing's own load_state_dict
            reason = first_line(error)
            raise UserError(
                f"extra {name!r} of {source} does not fit: {reason}; give the same thing as when saving"
            ) from error
    return loaded


def _is_extra(key: str) -> bool:
    parts = split(key)
    return len(parts) > 1 and parts[0] == "extra"
