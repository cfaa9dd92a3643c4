"""The state of a job between two rounds as named tensors, each process's part, and the way back.

Weights have global dotted names, and are there once: the shared part from worker 0, a block from its first holder.
State that differs between workers (optimizer state, counters, outer momentum) is there for each worker, with names like
`workers.2.momentum_buffer.layer3.5.conv1.weight`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from resist.errors import UserError
from resist.job import Job
from resist.sync.averaging import VELOCITY
from resist.sync.worker import Worker

BUFFERS = "buffers"  # stands where a state of the optimizer has its name


def round_name(round: int) -> str:
    """The folder of a round: its files sort by name in the order of the rounds."""
    return f"round-{round:06d}"


def process_file(process: int | str) -> str:
    """The file of a process in the folder of a round."""
    return f"process-{process}.safetensors"


def owned_state(job: Job, optimizers: Sequence[Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """Name everything that this process saves of a job between two rounds.

    Yields:
        Name and tensor: views, not copies.
    """
    for worker, optimizer in zip(job.workers, optimizers, strict=True):
        prefix, held = worker_prefix(worker.index), job.plan.held(worker.index)
        is_first_holder = {
            f"{name}.": job.plan.holders(number, block)[0] == worker.index
            for number, chain in enumerate(job.chains)
            for block in held[number]
            for name in chain.members(block)
        }
        for name, view in worker.subnet.state(held).items():
            block = next((block for block in is_first_holder if name.startswith(block)), None)
            if is_first_holder[block] if block is not None else worker.index == 0:
                yield name, view
        for name, parameter in _parameters(job, worker).items():
            for state_name, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"{prefix}{state_name}.{name}", value
        for name, buffer in _counters(worker).items():
            yield f"{prefix}{BUFFERS}.{name}", buffer
        if VELOCITY in worker.state:
            for name, view in worker.subnet.state(held, worker.state[VELOCITY]).items():
                yield f"{prefix}{VELOCITY}.{name}", view


def worker_prefix(worker: int) -> str:
    """The beginning of the names of a worker's own state, as in `workers.2.`."""
    return f"workers.{worker}."


@torch.no_grad()
def restore_state(
    job: Job, optimizers: Sequence[Optimizer] | None, tensors: Mapping[str, Tensor], source: Path
) -> None:
    """Copy weights, and workers' own state where `tensors` has it, into a job.

    Args:
        job: A job that was made for the round of the weights.
        optimizers: One for each hosted worker; None: only weights are restored.
        tensors: Tensors by name: at least all weights that the hosted workers hold.
        source: Where the tensors come from, for messages.

    Raises:
        UserError: A tensor is missing or has another shape. The job is then as it was.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    workers_own: list[dict[str, Tensor]] = []
    for worker in job.workers:
        prefix, held = worker_prefix(worker.index), job.plan.held(worker.index)
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        workers_own.append(own)
        pairs += _matched("", worker.subnet.state(held), tensors, source)
        if any(name.startswith(f"{BUFFERS}.") for name in own):
            pairs += _matched(f"{BUFFERS}.", _counters(worker), own, source)
        if any(name.startswith(f"{VELOCITY}.") for name in own):
            zeros = {dtype: torch.zeros_like(flat) for dtype, flat in worker.subnet.flats.items()}
            velocity = worker.state.setdefault(VELOCITY, zeros)
            pairs += _matched(f"{VELOCITY}.", worker.subnet.state(held, velocity), own, source)
    for view, tensor in pairs:
        view.copy_(tensor)
    for worker, optimizer, own in zip(job.workers, optimizers or (), workers_own, strict=optimizers is not None):
        _restore_optimizer(_parameters(job, worker), optimizer, own)
    job.mark_anchors()


def _restore_optimizer(
    parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer, own: Mapping[str, Tensor]
) -> None:
    for key, tensor in own.items():
        state_name, name = _split(key, parameters)
        if name is None or state_name in (BUFFERS, VELOCITY):
            continue
        parameter = parameters[name]
        # State of a parameter's shape goes to its device and memory format; a step count stays on the CPU.
        like_parameter = tensor.shape == parameter.shape and tensor.numel() > 1
        value = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor) if like_parameter else tensor
        optimizer.state[parameter][state_name] = value


def _matched(
    prefix: str, views: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: Path
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a view to fill and its tensor, which has the view's name after `prefix`."""
    for name, view in views.items():
        if prefix + name not in tensors or tensors[prefix + name].shape != view.shape:
            shape = tuple(view.shape)
            raise UserError(
                f"{source} has no tensor {prefix + name!r} of the shape {shape}; it belongs to another network"
            )
    return [(view, tensors[prefix + name]) for name, view in views.items()]


def _split(key: str, parameters: Mapping[str, object]) -> tuple[str, str | None]:
    """State name and parameter name of `momentum_buffer.layer3.5.conv1.weight`; of several the longest parameter."""
    parts = key.split(".")
    for number in range(1, len(parts)):
        name = ".".join(parts[number:])
        if name in parameters:
            return ".".join(parts[:number]), name
    return key, None


def _parameters(job: Job, worker: Worker) -> dict[str, torch.nn.Parameter]:
    """The worker's parameters by global dotted name."""
    held = job.plan.held(worker.index)
    layout = worker.subnet.layout
    return {layout.full_name(place, held): parameter for parameter, place in worker.subnet.parameter_places()}


def _counters(worker: Worker) -> dict[str, Tensor]:
    """Buffers of integers: they stay with their slot, so they have the sub-network's own names."""
    return {name: b for name, b in worker.subnet.model.named_buffers() if not b.is_floating_point()}
