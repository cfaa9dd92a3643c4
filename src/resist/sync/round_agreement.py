"""What all processes agree on at the end of a round, before anything is exchanged."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from resist.errors import AgreedError, DivergedError, UserError
from resist.subnet.changes import from_text, to_text
from resist.sync import loose as loose_values
from resist.sync.averaging import VELOCITY, all_finite, averaged_ranges, first_nonfinite
from resist.sync.loose import Described, LooseParts, collect_loose
from resist.sync.optimizer_state import StateTypes, flat_states
from resist.sync.round_end import RoundEnd
from resist.sync.transport import Transport
from resist.sync.worker import Worker


@dataclass(frozen=True)
class RoundAgreement:
    """Values about a round's end that all processes agree on.

    Attributes:
        states: Names of the optimizer states that any worker has in flat tensors, sorted, each with its dtype for each
            dtype of weights.
        nonfinite: Workers with NaN or inf in their round, each with the reason.
        joined: Workers that join, and have nothing to give.
        loose: Hosted worker -> its loose values; see `resist.sync.loose`.
        described: The descriptions of those of all workers.
    """

    states: dict[str, StateTypes]
    nonfinite: dict[int, str]
    loose: dict[int, LooseParts]
    described: Described
    joined: frozenset[int] = frozenset()

    @property
    def left_out(self) -> frozenset[int]:
        """Workers that are left out of every mean."""
        return self.joined | self.nonfinite.keys()


def agree_on_round(
    transport: Transport,
    workers: Sequence[Worker],
    end: RoundEnd,
    nonfinite: Mapping[int, str],
    joined: frozenset[int] = frozenset(),
) -> RoundAgreement:
    """Agree on the payloads of the exchange at a round's end.

    Waits for all processes, and for the device. A worker has no optimizer state yet if a GradScaler has skipped all its
    steps. The list of payloads has to be the same in all processes, so it has the states that any worker has; if they
    differ, processes answer a second time.

    Args:
        transport: Connects the processes.
        workers: The hosted workers. Weights with NaN or inf are found here.
        end: The end of the round.
        nonfinite: Hosted workers with NaN or inf elsewhere, each with the reason.
        joined: All workers that join at this end of a round.

    Returns:
        The states and the workers with NaN or inf of all processes, and the loose values.

    Raises:
        UserError: If a parameter was moved out of the flat tensor, or `nonfinite` has a worker that is not hosted here.
        AgreedError: If processes are at different steps, if workers have other optimizers, or if only some processes
            have averages.
    """
    for worker in workers:
        worker.take_back()
    for worker in workers if end.strategy.optimizer_state == "reset" else ():
        worker.reset_state()
    hosted = [worker.index for worker in workers]
    if others := nonfinite.keys() - set(hosted):
        raise UserError(f"nonfinite has worker {min(others)}, and this process hosts {hosted}; name only those")
    changed = {key for worker in workers for watch in worker.watches for key in watch.changed()}
    for worker in workers:  # before the check for NaN: what changed is averaged too
        worker.subnet.changing |= changed
    failed = {**_with_nonfinite_weights([w for w in workers if w.index not in joined]), **nonfinite}
    values: dict[str, Any] = {
        "round": [end.round, end.step],
        "optimizers": distinct_optimizers(workers),
        "averages": any(worker.average for worker in workers),
        "nonfinite": failed,
        "changed": to_text(changed, workers[0].subnet),
        "has_loose": any(worker.subnet.loose() for worker in workers),
    }
    own = [flat_states(w.optimizers, {n: f for n, f in w.state.items() if n != VELOCITY}) for w in workers]
    states = _merged_states([_state_texts(types) for types in own])
    while True:
        loose = {
            w.index: collect_loose(w, states, end, without_state=w.index in failed.keys() | joined) for w in workers
        }
        values |= {"state": _state_texts(states), "loose": loose_values.to_text(loose)}
        processes = [json.loads(text) for text in transport.all_gather_text(json.dumps(values, separators=(",", ":")))]
        check_progress(processes)
        states = _merged_states([process["state"] for process in processes])
        if all(process["state"] == _state_texts(states) for process in processes):
            break  # all have described the same states; else all do so now
    for worker in workers:
        for process in processes:
            worker.subnet.changing |= from_text(process["changed"], worker.subnet)
            worker.subnet.has_loose |= process["has_loose"]
        if worker.average is not None:
            worker.average.changing, worker.average.has_loose = worker.subnet.changing, worker.subnet.has_loose
    return RoundAgreement(
        states=states,
        nonfinite={int(worker): reason for process in processes for worker, reason in process["nonfinite"].items()},
        loose=loose,
        described=Described([process["loose"] for process in processes]),
        joined=joined,
    )


def _with_nonfinite_weights(workers: Sequence[Worker]) -> dict[int, str]:
    """The workers with NaN or inf in their weights, each with the reason.

    Waits for the device: once for each dtype if all are finite, as almost always.
    """
    if all_finite(*(part for worker in workers for part in averaged_ranges(worker.subnet))):
        return {}
    names = {worker.index: first_nonfinite(worker.subnet) for worker in workers}
    return {worker: f"weights that are not finite ({name})" for worker, name in names.items() if name is not None}


def distinct_optimizers(workers: Sequence[Worker]) -> list[list[str]]:
    """Return the classes of the optimizers of each worker, equal ones once."""
    names = [[type(optimizer).__name__ for optimizer in worker.optimizers] for worker in workers]
    return [own for number, own in enumerate(names) if own not in names[:number]]


def check_progress(processes: Sequence[Mapping[str, Any]]) -> None:
    """Check that processes are at the same point of training, with the same optimizers.

    Args:
        processes: For each process "round" (round and step), "optimizers" (see `distinct_optimizers`) and "averages"
            (whether it has any).

    Raises:
        AgreedError: If they differ.
    """
    first = processes[0]
    for number, process in enumerate(processes):
        if process["round"] != first["round"]:
            (round, step), (first_round, first_step) = process["round"], first["round"]
            raise AgreedError(
                f"process {number} ends round {round + 1} at step {step}, process 0 ends round {first_round + 1} at "
                f"step {first_step}; call job.step equally often in all processes, before job.synchronize and "
                "job.full_model too"
            )
        if len(process["optimizers"]) > 1 or process["optimizers"] != first["optimizers"]:
            others = cast(list[list[str]], process["optimizers"])
            own = cast(list[list[str]], first["optimizers"])[0]
            other = next((names for names in others if names != own), list[str]())
            raise AgreedError(
                f"process {number} trains a worker with {', '.join(other) or 'no optimizer'}, process 0 with "
                f"{', '.join(own) or 'no optimizer'}; give all workers the same optimizers"
            )
        if process["averages"] != first["averages"]:
            raise AgreedError("job.follow was called in some processes and not in others; call it in all of them")


def _state_texts(states: Mapping[str, StateTypes]) -> dict[str, dict[str, str]]:
    """The states in a form for JSON."""
    return {name: {str(dtype): str(own) for dtype, own in types.items()} for name, types in states.items()}


def _merged_states(processes: Sequence[Mapping[str, Mapping[str, str]]]) -> dict[str, StateTypes]:
    """The states of all processes, in one order."""
    merged: dict[str, dict[str, str]] = {}
    for states in processes:
        for name, types in states.items():
            merged[name] = {**types, **merged.get(name, {})}
    return {name: {_dtype(d): _dtype(own) for d, own in sorted(merged[name].items())} for name in sorted(merged)}


def _dtype(text: str) -> torch.dtype:
    """The dtype of a text like "torch.float32"."""
    return getattr(torch, text.removeprefix("torch."))


def diverged(nonfinite: Mapping[int, str], *, round: int, step: int) -> DivergedError:
    """Make the error for workers that have diverged.

    Args:
        nonfinite: The workers, each with the reason. The first one is named.
        round: Number of the round that cannot be completed, from 0.
        step: Optimizer steps done.

    Returns:
        The error.
    """
    worker, reason = min(nonfinite.items())
    return DivergedError(
        f"worker {worker} has {reason} at the end of round {round + 1} (step {step}): training diverged; lower the "
        "learning rate or let it rise slowly"
    )
