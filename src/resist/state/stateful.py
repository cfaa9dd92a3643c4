"""`Job.state_dict` and `Job.load_state_dict`: the form of `torch.distributed.checkpoint`'s Stateful.

That library loads into a template: the state of a job that has not begun. It names the tensors to read and their shapes
before anybody knows the saved round. So the template has the whole network, whatever its blocks; and what cannot be
known before (which states the optimizers have) is one value for each worker, of any size: bytes.
"""

import io
import json
import pickle
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from resist.errors import UserError, first_line
from resist.state.loading import BROKEN, Saved, check_about, load
from resist.state.names import other_buffers
from resist.state.saving import Record, SavedJob, about_job, check_boundary, network_state, worker_record
from resist.state.values import decode, encode
from resist.subnet.network import Subnet
from resist.sync.agreement import check_agreement, run_everywhere
from resist.sync.assembly import assemble
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS

FORMAT = "resist job 1"
KINDS = (WEIGHTS, AVERAGE, VELOCITY)
ABOUT, WORKERS, BUFFERS = "about", "workers", "buffers"


def state_dict_of(job: SavedJob, *, complete: bool) -> dict[str, Any]:
    """Return what this process has of a job's state.

    Args:
        job: The job, between two rounds.
        complete: Assemble the whole network in every process. Then all of them have to call this.

    Returns:
        See `Job.state_dict`.

    Raises:
        UserError: In the middle of a round; if a value cannot be saved.
    """
    check_boundary(job)
    state: dict[str, Any] = {ABOUT: json.dumps({"format": FORMAT, **about_job(job)})}
    outer = any(stage.outer is not None for stage in job.strategy.stages)
    kinds: dict[str, dict[str, Tensor]] = {}
    buffers: dict[str, dict[str, Tensor]] = {"shared": {}}  # of each child of a held block, also where it has none
    records: dict[str, bytes] = {}
    for worker in job.workers:
        held = job.plan.held(worker.index)
        for kind, views in network_state(worker, held, worker.agreed).items():
            kinds.setdefault(kind, {}).update(views)
        for chain, blocks in zip(job.chains, held, strict=True):
            for name in (name for block in blocks for name in chain.members(block)):
                buffers.setdefault(name, {})
        for name, buffer in other_buffers(worker.subnet, held).items():
            buffers.setdefault(_block(job, name), {})[name] = buffer
        records[str(worker.index)] = _pack(worker_record(job, worker))
    packed = {block: _pack_buffers(values) for block, values in buffers.items()}
    if complete:
        if job.transport.num_processes > 1:
            kinds = _whole_network(job)
        for block in _blocks(job):
            packed.setdefault(block, b"")
        records.setdefault("0", b"")
    if outer and VELOCITY not in kinds:  # it may begin in a later round, and a template has to name it
        kinds[VELOCITY] = {name: torch.zeros_like(tensor) for name, tensor in kinds[WEIGHTS].items()}
    for kind, views in kinds.items():
        state[kind] = {name: _copy(view) for name, view in views.items()}
    return state | {BUFFERS: packed, WORKERS: records}


def load_state_dict(job: SavedJob, state: Mapping[str, Any]) -> None:
    """Take over a state. Every process has to call it; see `Job.load_state_dict`."""
    run_everywhere(job.transport, lambda: load(job, _saved(job, state)))
    check_agreement(job.transport, {"the state's round": job.round, "the state's step": job.step_index})


def _whole_network(job: SavedJob) -> dict[str, dict[str, Tensor]]:
    """Assemble what `network_state` has of all blocks, in every process."""
    everything = [range(chain.num_blocks) for chain in job.chains]
    first_of: dict[int, int] = {}
    for worker in range(job.strategy.workers):
        first_of.setdefault(job.transport.process_of(worker), worker)
    subnets: dict[str, dict[int, Subnet]] = {WEIGHTS: {worker.index: worker.subnet for worker in job.workers}}
    if averages := {worker.index: worker.average for worker in job.workers if worker.average is not None}:
        subnets[AVERAGE] = averages
    found: dict[str, dict[str, Tensor]] = {}
    for kind, own in subnets.items():
        full = assemble(job.transport, own, plan=job.plan, on=list(first_of.values()))
        assert full is not None, "every process has one of them"
        found[kind] = full.state(everything)
    if any(VELOCITY in worker.state for worker in job.workers):  # no round is done, so it is zero
        found[VELOCITY] = {name: torch.zeros_like(tensor) for name, tensor in found[WEIGHTS].items()}
    return found


def _block(job: SavedJob, name: str) -> str:
    """The block that a tensor belongs to, or "shared"."""
    return next((block for block in _blocks(job) if name.startswith(f"{block}.")), "shared")


def _blocks(job: SavedJob) -> list[str]:
    names = [name for chain in job.chains for block in range(chain.num_blocks) for name in chain.members(block)]
    return [*sorted(names, key=len, reverse=True), "shared"]


def _copy(tensor: Tensor) -> Tensor:
    copied = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format, requires_grad=False)
    return copied.copy_(tensor.detach())


def _pack(record: Record) -> bytes:
    file = io.BytesIO()
    tensors = {key: _copy(tensor) for key, tensor in record.tensors.items()}
    torch.save({"values": json.dumps(record.values), "tensors": tensors}, file)
    return file.getvalue()


def _pack_buffers(buffers: Mapping[str, Tensor]) -> bytes:
    record = Record({})
    record.values = {name: encode(t, record.tensors, path=(name,), what=name) for name, t in buffers.items()}
    return _pack(record)


def _unpack(content: object, source: str) -> Record:
    if not isinstance(content, bytes):
        raise UserError(f"{source} has a {type(content).__name__} where bytes belong; it is damaged")
    if not content:
        return Record({})
    try:
        found = cast(dict[str, Any], torch.load(io.BytesIO(content), weights_only=True))
        return Record(json.loads(found["values"]), found["tensors"])
    except (*BROKEN, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{source} is damaged: {first_line(error)}") from error


def _saved(job: SavedJob, state: Mapping[str, Any]) -> Saved:
    """Read a state; UserError where it is none."""
    source = "the state"
    try:
        about = json.loads(state[ABOUT])
        if about["format"] != FORMAT:
            raise UserError(
                f"{source} has the format {about['format']!r}, not {FORMAT!r}; use the version that made it"
            )
        network = {kind: dict(state[kind]) for kind in KINDS if kind in state}
        check_about(about)
        unknown = state.keys() - {ABOUT, WORKERS, BUFFERS, *KINDS}
        if unknown:
            raise UserError(f"{source} has an entry {min(unknown)!r} that is none of a job; give the state of a job")
        saved = Saved(source, about, network, {kind: set(tensors) for kind, tensors in network.items()})
        wanted = [worker.index for worker in job.workers] if saved.same_plan(job) else [0]
        for worker in wanted:
            if str(worker) in state[WORKERS]:
                saved.records[worker] = _unpack(state[WORKERS][str(worker)], source)
            elif saved.same_plan(job):
                raise UserError(f"{source} has nothing of worker {worker}; it is the part of another process")
        for content in state[BUFFERS].values():
            record = _unpack(content, source)
            saved.buffers |= {name: decode(value, record.tensors) for name, value in record.values.items()}
        return saved
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(
            f"{source} is none of a job, or damaged: {first_line(error)}; give what state_dict returned"
        ) from error
