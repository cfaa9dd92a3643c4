"""The state of a job between two rounds, as named tensors and JSON values.

- The network: weights, averages of them over time, and the momentum of an outer optimizer. All holders of a block have
  the same, so it is there once, by global dotted name.
- A record for each worker: the state and the groups of its optimizers, what `resist.state.own_changes` lists, the
  buffers that are not synchronized, and the random state of its process. It fits a job with the same plan.

A tensor's key has one or more parts; `resist.state.values.split` gives them back:

    conv1.weight    average of weights/conv1.weight    outer velocity/conv1.weight
    workers.2/optimizer/layer3.5.conv1.weight/exp_avg
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from resist.blocks.chain import Chain
from resist.errors import UserError
from resist.planning.plan import RoundPlan
from resist.planning.strategy import Strategy
from resist.planning.wire import Wire
from resist.state.names import Held, other_buffers, weight_places
from resist.state.optimizers import arrived_state, optimizer_record
from resist.state.own_changes import own_record
from resist.state.values import encode, join
from resist.subnet.flats import Flats
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS
from resist.sync.transport import Transport
from resist.sync.worker import Worker


class SavedJob(Protocol):
    """The parts of a `resist.Job` that are saved and loaded."""

    workers: list[Worker]
    chains: tuple[Chain, ...]
    strategy: Strategy
    plan: RoundPlan
    round: int
    step_index: int
    wire: Wire

    @property
    def transport(self) -> Transport:
        """See `Job.transport`."""
        ...

    @property
    def steps_left(self) -> int:
        """See `Job.steps_left`."""
        ...

    def plan_of(self, round: int) -> RoundPlan:
        """See `Job.plan_of`."""
        ...

    def continue_at(self, round: int, step: int) -> None:
        """See `Job.continue_at`."""
        ...

    def mark_anchors(self, *, agreed: bool = True) -> None:
        """See `Job.mark_anchors`."""
        ...


SMALL = 16  # elements of a buffer that is not compared with others


@dataclass
class Record:
    """What one worker has for itself.

    Attributes:
        values: JSON values.
        tensors: The tensors that they refer to, by key.
    """

    values: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


def check_boundary(job: SavedJob) -> None:
    """Raise UserError in the middle of a round."""
    local_steps = job.strategy.at(job.round).local_steps
    if done := local_steps - job.steps_left:
        raise UserError(
            f"{done} of {local_steps} steps of round {job.round + 1} are done, and a job is saved between two rounds; "
            "save where job.step returned True, or call job.finish() first"
        )


def about_job(job: SavedJob) -> dict[str, Any]:
    """Return the values that all processes know.

    These are round, step, workers, processes, and who holds which blocks.

    "changing" has the frozen parameters and the buffers that all workers average, by chain and name.
    """
    changing = sorted(job.workers[0].subnet.changing, key=lambda key: (key[0] or -1, key[1]))
    return {
        "round": job.round,
        "step": job.step_index,
        "workers": job.strategy.workers,
        "processes": job.transport.num_processes,
        "held": held_by_all(job.chains, job.plan, job.strategy.workers),
        "changing": [[None if chain is None else job.chains[chain].name, piece] for chain, piece in changing],
        "averages": any(worker.average is not None for worker in job.workers),
    }


def held_by_all(chains: Sequence[Chain], plan: RoundPlan, workers: int) -> list[list[list[Any]]]:
    """List the blocks of each worker by chain, as JSON values."""
    return [
        [[chain.name, list(blocks)] for chain, blocks in zip(chains, plan.held(worker), strict=True)]
        for worker in range(workers)
    ]


def network_state(worker: Worker, held: Held, weights: Flats) -> dict[str, dict[str, Tensor]]:
    """Return what a worker holds of the network.

    Args:
        worker: The worker, between two rounds.
        held: Blocks of each chain, in the order of the slots.
        weights: Its weights; see `Worker.agreed`.

    Returns:
        WEIGHTS, AVERAGE and VELOCITY, as far as there are any -> views by global dotted name.
    """
    found = {WEIGHTS: worker.subnet.state(held, weights)}
    if worker.average is not None:
        found[AVERAGE] = worker.average.state(held)
    if VELOCITY in worker.state:
        found[VELOCITY] = worker.subnet.state(held, worker.state[VELOCITY])
    return found


def network_key(kind: str, name: str) -> str:
    """Return the key of a tensor of the network."""
    return join(name) if kind == WEIGHTS else join(kind, name)


def worker_part(worker: int) -> str:
    """Return the first part of the keys of a worker's record."""
    return f"workers.{worker}"


def owned_network(job: SavedJob) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the part of the network that this process saves.

    The shared part is saved by worker 0, a block by its first holder.

    Yields:
        Key and tensor: views, not copies, but where workers differ in what they have trained.
    """
    for worker in job.workers:
        held = job.plan.held(worker.index)
        owned = {
            name
            for name, place, _ in weight_places(worker.subnet, held)
            if worker.index
            == (0 if place.chain is None else job.plan.holders(place.chain, held[place.chain][place.slot])[0])
        }
        for kind, views in network_state(worker, held, worker.agreed).items():
            yield from ((network_key(kind, name), view) for name, view in views.items() if name in owned)


def worker_record(job: SavedJob, worker: Worker) -> Record:
    """Collect what a worker has for itself.

    Args:
        job: The job, between two rounds.
        worker: A hosted worker.

    Returns:
        The record; its tensors are no copies.

    Raises:
        UserError: If the state of an optimizer has a value that cannot be saved. Names it.
    """
    record = Record({})
    held, part = job.plan.held(worker.index), worker_part(worker.index)
    record.values["optimizers"] = [
        optimizer_record(worker, number, held, record.tensors, (part, "optimizer"))
        for number in range(len(worker.optimizers))
    ]
    if own := own_record(worker, job.wire, record.tensors, (part, "own")):
        record.values["own"] = own
    record.values["arrived"] = arrived_state(worker, held, record.tensors, (part, "arrived"))
    buffers = other_buffers(worker.subnet, held)
    record.values["buffers"] = _encode_all(buffers, record.tensors, (part, "buffers"))
    if worker.average is not None and worker.averaged is not None:
        averages = other_buffers(worker.average, held)
        record.values["average"] = {
            "buffers": _encode_all(averages, record.tensors, (part, "average", "buffers")),
            "n_averaged": int(worker.averaged.n_averaged),
        }
    if worker is job.workers[0]:
        record.values["random"] = _random_state(worker, record.tensors)
    return record


def _encode_all(values: Mapping[str, Tensor], tensors: dict[str, Tensor], path: tuple[str, ...]) -> dict[str, Any]:
    """Write buffers as JSON values, equal ones once."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        entry: Any = None
        for other in found if value.numel() > SMALL else ():
            same = values[other]
            if same.shape == value.shape and same.dtype == value.dtype and torch.equal(same, value):
                entry = found[other]
                break
        found[name] = entry or encode(value, tensors, path=(*path, name), what=f"buffer {name}")
    return found


def _random_state(worker: Worker, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The state of torch's generators in this process."""
    states = {"cpu": torch.get_rng_state()}
    if worker.subnet.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(worker.subnet.device)
    path = (worker_part(worker.index), "random")
    return {name: encode(state, tensors, path=(*path, name), what="random state") for name, state in states.items()}
