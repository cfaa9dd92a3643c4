"""Loading: give a job the state that `resist.state.saving` describes.

Where the job has the same plan as the saved one, everything comes back. With other workers, chains or capacities, the
network comes back (weights, averages, outer momentum, buffers); optimizers keep their settings and start over; the step
is the one at which all workers together have seen as many images.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resist.errors import UserError, first_line
from resist.state.names import Held, other_buffer_names, put_buffers, weight_places
from resist.state.optimizers import check_optimizers, load_arrived, load_groups, load_state
from resist.state.own_changes import load_own
from resist.state.saving import Record, SavedJob, held_by_all, network_state
from resist.state.values import decode, keys_of
from resist.subnet.network import Subnet
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS
from resist.sync.optimizer_state import follow_resize
from resist.sync.worker import Worker

LEAST = {"round": 0, "step": 0, "workers": 1, "processes": 1}
BROKEN = (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError)


@dataclass
class Saved:
    """A state to load.

    Attributes:
        source: Where it comes from, for messages.
        about: The values of `about_job`.
        network: WEIGHTS, AVERAGE and VELOCITY -> tensors by global dotted name: at least those of the hosted workers.
        names: The same kinds -> all names that the state has, here or in another process.
        records: Records of workers: of the hosted ones where the plan is the same, else of worker 0.
        buffers: Where the plan is another one: the buffers that are in no flat tensor, by global dotted name.
    """

    source: str
    about: dict[str, Any]
    network: dict[str, dict[str, Tensor]]
    names: dict[str, set[str]]
    records: dict[int, Record] = field(default_factory=dict[int, Record])
    buffers: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def same_plan(self, job: SavedJob) -> bool:
        """Return True if the job draws the plan that was saved."""
        held = held_by_all(job.chains, job.plan_of(self.about["round"]), job.strategy.workers)
        return held == self.about["held"]

    def step(self, job: SavedJob) -> int:
        """The step at which the workers have seen as many images."""
        return self.about["step"] * self.about["workers"] // job.strategy.workers


def check_about(about: Mapping[str, Any]) -> None:
    """Raise ValueError where the values of `about_job` are none."""
    for name, least in LEAST.items():
        if type(about[name]) is not int or about[name] < least:
            raise ValueError(f"{name}={about[name]!r}; must be an integer, at least {least}")
    if type(about["averages"]) is not bool or not all(type(about[name]) is list for name in ("held", "changing")):
        raise ValueError("the plan is missing")


@torch.no_grad()
def load(job: SavedJob, saved: Saved, *, with_optimizers: bool = True) -> None:
    """Give a job a state, in every process; nothing is sent.

    Args:
        job: The job. Its optimizers are those of its workers (`Worker.optimizers`).
        saved: The state.
        with_optimizers: Load the state of the optimizers, too. Otherwise they start over.

    Raises:
        UserError: If the state is that of another network, other optimizers, or damaged. The job is then as it was.
    """
    loads: list[Callable[[], None]] = []
    own: list[Callable[[], None]] = []
    try:
        plan, same = job.plan_of(saved.about["round"]), saved.same_plan(job)
        same_processes = same and saved.about["processes"] == job.transport.num_processes
        _check_kinds(job, saved)
        numbers = {None: None, **{chain.name: number for number, chain in enumerate(job.chains)}}
        changing = {(numbers[chain], piece) for chain, piece in saved.about["changing"] if chain in numbers}
        for worker in job.workers:
            held = plan.held(worker.index)
            _check_network(worker, held, saved)
            record = saved.records[worker.index] if same else saved.records.get(0, Record({}))
            if record.values:  # those of a job that had not begun may be empty
                loads += _from_record(worker, held, record, saved.source, whole=same, with_optimizers=with_optimizers)
                values: dict[str, Any] = record.values.get("own", {}) if same else {}
                own.append(load_own(worker, job.wire, values, record.tensors, saved.source))
            if same_processes and "random" in record.values:
                loads.append(_random_state(record, worker.subnet.device))
            if not same:
                loads.append(partial(put_buffers, worker.subnet, held, saved.buffers))
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{saved.source} is damaged: {type(error).__name__}: {first_line(error)}") from error
    # Nothing is refused from here on.
    for worker in job.workers:
        _hold(worker, plan.held(worker.index), changing)
    job.continue_at(saved.about["round"], saved.step(job))
    for worker in job.workers:
        for kind, views in network_state(worker, plan.held(worker.index), worker.subnet.flats).items():
            for name, view in views.items() if kind in saved.network else ():
                view.copy_(saved.network[kind][name])
    for action in loads:
        action()
    job.mark_anchors()
    for action in own:
        action()


def _check_kinds(job: SavedJob, saved: Saved) -> None:
    """Raise UserError where averages or tensors of the state do not fit."""
    follows = any(worker.average is not None for worker in job.workers)
    if follows and not saved.about["averages"]:
        raise UserError(f"{saved.source} has no averages of the weights; call job.follow after loading it")
    if saved.about["averages"] and not follows:
        raise UserError(f"{saved.source} has averages of the weights; give theirs to job.follow before loading it")
    subnet = job.workers[0].subnet
    known = {name for name, _, _ in weight_places(subnet, [range(chain.num_blocks) for chain in job.chains])}
    for kind, names in saved.names.items():
        if unknown := names - known:
            raise UserError(
                f"{saved.source} has a tensor {min(unknown)!r} ({kind}) that this network has not; it belongs to "
                "another network"
            )


def _check_network(worker: Worker, held: Held, saved: Saved) -> None:
    kinds = [WEIGHTS, *([AVERAGE] if worker.average is not None else [])]
    kinds += [VELOCITY] if VELOCITY in saved.network else []
    for kind in kinds:
        tensors = saved.network.get(kind, {})
        for name, _, shape in weight_places(worker.subnet, held):
            if name not in tensors or tensors[name].shape != shape:
                what = repr(name) if kind == WEIGHTS else f"{name!r} ({kind})"
                raise UserError(
                    f"{saved.source} has no tensor {what} of the shape {tuple(shape)}; it belongs to another network, "
                    "or is the part of another process"
                )


def _hold(worker: Worker, held: Held, changing: set[tuple[int | None, str]]) -> None:
    """Forget all state, and take the structure of a plan.

    changing: as `Subnet.changing`.
    """
    capacities = tuple(len(blocks) for blocks in held)
    if capacities != worker.subnet.capacities:
        before = {id(parameter) for parameter in worker.subnet.model.parameters()}
        worker.subnet.resize(capacities, worker.subnet.empty(capacities))
        follow_resize(worker.subnet, worker.optimizers, before, {})
        if worker.average is not None:
            worker.average.resize(capacities, worker.average.empty(capacities))
    worker.reset_state()
    for subnet in filter(None, (worker.subnet, worker.average)):
        subnet.hold(held)
        subnet.changing = set(changing)
    worker.reset_state()
    worker.state.clear()
    worker.fragments = []


def _from_record(
    worker: Worker, held: Held, record: Record, source: str, *, whole: bool, with_optimizers: bool
) -> Iterator[Callable[[], None]]:
    """Check a record, and yield the actions that load it.

    whole: the record is that of this worker in the same plan; otherwise only settings are taken from it.
    """
    values, tensors = record.values, record.tensors
    if unknown := tensors.keys() - keys_of(values) if whole else ():
        raise UserError(f"{source} has a tensor {min(unknown)!r} that nothing refers to; it is damaged")
    optimizers: list[dict[str, Any]] = values["optimizers"] if with_optimizers else []
    if optimizers:
        check_optimizers(worker, held, optimizers, source, whole=whole)
        for optimizer, one in zip(worker.optimizers, optimizers, strict=True):
            yield load_groups(optimizer, [decode(group, tensors) for group in one["groups"]])
    average: dict[str, Any] = values.get("average", {"n_averaged": 0, "buffers": {}})
    yield partial(_set_count, worker, int(average["n_averaged"]))
    if not whole:
        return
    for number, one in enumerate(optimizers):
        yield load_state(worker, number, one["state"], tensors, held)
    if optimizers:
        yield load_arrived(worker, values["arrived"], tensors, held)
    yield _buffers(worker.subnet, held, values["buffers"], tensors, source)
    if worker.average is not None:
        yield _buffers(worker.average, held, average["buffers"], tensors, source)


def _set_count(worker: Worker, count: int) -> None:
    """Set the number of steps that an average has seen."""
    if worker.averaged is not None:
        worker.averaged.n_averaged.fill_(count)


def _buffers(
    subnet: Subnet,
    held: Held,
    saved: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    source: str,
) -> Callable[[], None]:
    """Check the buffers in no flat tensor; return what loads them."""
    values = {name: decode(value, tensors) for name, value in saved.items()}
    without, everything = other_buffer_names(subnet, held)
    if different := (without - values.keys()) | (values.keys() - everything):
        raise UserError(
            f"{source} and this network differ in the buffer {min(different)!r}; it belongs to another network"
        )
    return partial(put_buffers, subnet, held, values)


def _random_state(record: Record, device: torch.device) -> Callable[[], None]:
    """Return what gives torch's generators in this process their state."""
    states = {name: decode(state, record.tensors) for name, state in record.values["random"].items()}

    def apply() -> None:
        torch.set_rng_state(states["cpu"])
        if device.type == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)

    return apply
