"""What is left of a run when a worker is lost or diverges: weights that each process writes for itself.

    RUN/replicas/round-000012.worker-3.safetensors   safe copies of the network as it was synchronized (`--replicate`)
    RUN/diverged/worker-3.safetensors              a worker's weights as they were when training diverged, to look at

Nobody has to be asked: each process writes what it has, and who resumes finds out whether it is all there.
"""

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from resist.errors import UserError
from resist.job import Job
from resist.runs.model_file import write_tensors

FORMAT = "resist safe copy 1"


def write_replicas(folder: Path, job: Job) -> None:
    """Write the safe copies that this process keeps. Raises UserError where they cannot be written."""
    subnet = job.workers[0].subnet
    num_tensors = len(subnet.shared_layout.pieces)
    num_tensors += sum(
        chain.num_blocks * len(layout.pieces) for chain, layout in zip(job.chains, subnet.block_layouts, strict=True)
    )
    for one in job.replicas:
        facts = {"round": one.round, "step": one.step, "workers": job.strategy.workers, "tensors": num_tensors}
        name = f"round-{one.round:06d}.worker-{job.workers[0].index}.safetensors"
        _write(folder / name, one.tensors, facts)


def write_diverged(folder: Path, job: Job) -> None:
    """Write the weights of the workers of this process as they are, numbers or not."""
    for worker in job.workers:
        facts = {"round": job.round, "step": job.step_index, "dropped": job.dropped.get(worker.index, "")}
        _write(folder / f"worker-{worker.index}.safetensors", worker.subnet.state(job.held_by(worker)), facts)


def newest_replica_round(folder: Path) -> dict[str, Any] | None:
    """What is known of the newest round whose network is complete in `folder`: round, step, workers; or None.

    Files that are cut, damaged or of another kind count as not there.
    """
    rounds: dict[int, list[tuple[dict[str, Any], set[str]]]] = {}
    for path in sorted(folder.glob("round-*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                facts = _facts(file.metadata())
                if _digest({n: file.get_tensor(n) for n in file.keys()}) == facts["digest"]:  # noqa: SIM118
                    rounds.setdefault(int(facts["round"]), []).append((facts, set(file.keys())))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            continue
    for _, found in sorted(rounds.items(), reverse=True):
        if len(set().union(*(names for _, names in found))) == found[0][0]["tensors"]:
            return found[0][0]
    return None


@torch.no_grad()
def restore_replicas(job: Job, folder: Path, round: int) -> None:
    """Give a job that was made for `round` the weights of its safe copies. Each process reads what it needs."""
    wanted = {name: view for w in job.workers for name, view in w.subnet.state(job.held_by(w)).items()}
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob(f"round-{round:06d}.*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {n: file.get_tensor(n) for n in set(file.keys()) & (wanted.keys() - found.keys())}
        except (OSError, SafetensorError):
            continue  # another copy may be whole
    for name, view in wanted.items():
        if name not in found or found[name].shape != view.shape:
            raise UserError(f"{folder}: no safe copy of {name!r} of this network; remove the folder to go on without")
    for worker in job.workers:
        for name, view in worker.subnet.state(job.held_by(worker)).items():
            view.copy_(found[name])
    job.mark_anchors()


def remove_replicas(folder: Path, up_to: int) -> None:
    """Remove safe copies of rounds that a checkpoint covers."""
    for path in folder.glob("round-*.safetensors"):
        if path.name.split(".")[0] <= f"round-{up_to:06d}":
            path.unlink(missing_ok=True)


def _facts(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    if (metadata or {}).get("format") != FORMAT:
        raise ValueError("another kind of file")
    return json.loads((metadata or {})["facts"])


def _digest(tensors: Mapping[str, Tensor]) -> str:
    key = blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        key.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return key.hexdigest()


def _write(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, object]) -> None:
    """Write a file that is there complete or not at all."""
    whole = torch.contiguous_format
    staged = {name: tensor.detach().cpu().clone(memory_format=whole) for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror}; make room there") from error
    write_tensors(path, staged, {"format": FORMAT, "facts": json.dumps({**facts, "digest": _digest(staged)})})
