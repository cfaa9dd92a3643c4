"""Agreement: values that all processes of a job must share, and actions that succeed or fail in all of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from resist.errors import AgreedError, DivergedError, UserError
from resist.planning.strategy import Strategy
from resist.subnet.chains import Chain
from resist.subnet.network import Flats
from resist.subnet.seeded import fingerprint
from resist.sync.averaging import VELOCITY, all_finite
from resist.sync.transport import Transport
from resist.sync.worker import StateTypes, Worker

T = TypeVar("T")
K = TypeVar("K")
V = TypeVar("V")


def check_agreement(transport: Transport, values: Mapping[str, object]) -> None:
    """Compare `values` over all processes. Waits for all of them.

    Args:
        transport: Connects the processes.
        values: The values of this process, which must be the same in all of them. Compared as JSON.

    Raises:
        AgreedError: In every process, if two of them differ. Names the first key, in the order of `values`, that does.
    """
    texts = transport.all_gather_text(json.dumps(values, default=str))
    first = json.loads(texts[0])
    for process, text in enumerate(texts):
        compared = json.loads(text)
        for key in first | compared:
            if first.get(key) != compared.get(key):
                quote = "`" * key.isidentifier()  # not around the names of what is not an option
                raise AgreedError(
                    f"process {process} was started with {quote}{key}={compared.get(key)}{quote}, process 0 with "
                    f"{quote}{key}={first.get(key)}{quote}; start all of them with the same arguments"
                )


def run_everywhere(transport: Transport, action: Callable[[], T]) -> T:
    """Run an action in all processes; all fail if one does.

    Waits for all processes, so that none goes on to wait for a process that has failed.

    Args:
        transport: Connects the processes.
        action: Function to call in this process.

    Returns:
        The result of `action` in this process.

    Raises:
        AgreedError: In every process, with the text of the first UserError that any process raised.
    """
    result, failure, cause = None, "", None
    try:
        result = action()
    except UserError as error:
        failure, cause = str(error), error.__cause__
    for process, text in enumerate(transport.all_gather_text(failure)):
        if text.strip():
            where = f" (process {process})" if transport.num_processes > 1 else ""
            raise AgreedError(text.strip() + where) from cause
    return result  # type: ignore[return-value]  # it is set: no process failed


def job_values(
    strategy: Strategy, *, seed: int, chains: Sequence[Chain], model: nn.Module, options: Mapping[str, object]
) -> dict[str, object]:
    """Collect the values that must be equal in all processes.

    They are compared by `check_agreement`. Causes come before their consequences, since the first difference is the one
    that is reported: another strategy also has other capacities, and another seed other initial weights.

    Args:
        strategy: The strategy.
        seed: The seed of plans and initial weights.
        chains: The chains that are partitioned.
        model: The full network; its tensors are compared by digests of their shapes and of their values.
        options: Further options by name.

    Returns:
        The values by name.
    """
    network = fingerprint(model)
    return {
        "workers": strategy.workers,
        "strategy": [(s.name, s.local_steps, s.optimizer_state, s.outer, s.at_round) for s in strategy.stages],
        "seed": seed,
        **options,
        "model": network["structure"],
        "chains": [chain.name for chain in chains],
        "capacities": [
            chain.capacities
            for round in strategy.change_rounds
            for chain in strategy.plan(chains, seed=seed, round=round).plans
        ],
        "initial weights": network["weights"],
    }


@dataclass(frozen=True)
class RoundAgreement:
    """Values about a round's end that all processes agree on.

    Attributes:
        states: Names of the optimizer states that any worker has, sorted, each with its dtype for each dtype of the
            weights.
        nonfinite: Workers with NaN or inf in their round, each with the reason.
    """

    states: dict[str, StateTypes]
    nonfinite: dict[int, str]


def agree_on_round(transport: Transport, workers: Sequence[Worker], *, nonfinite: Mapping[int, str]) -> RoundAgreement:
    """Agree on the payloads of the exchange at a round's end.

    Waits for all processes, and for the device. A worker has no optimizer state yet if a GradScaler has skipped all its
    steps. The list of payloads has to be the same in all processes, so it has the states that any worker has.

    Args:
        transport: Connects the processes.
        workers: The hosted workers, after `Worker.collect_state`. Weights with NaN or inf are found here.
        nonfinite: Hosted workers with NaN or inf elsewhere, each with the reason.

    Returns:
        The states and the workers with NaN or inf of all processes.

    Raises:
        UserError: If `nonfinite` has a worker that is not hosted here.
        AgreedError: If only some processes have averages.
    """
    hosted = [worker.index for worker in workers]
    if others := nonfinite.keys() - set(hosted):
        raise UserError(f"nonfinite has worker {min(others)}, and this process hosts {hosted}; name only those")
    detected = {
        w.index: "weights that are not finite" for w in workers if not all(map(all_finite, w.subnet.flats.values()))
    }
    values = {
        "averages": any(worker.average for worker in workers),
        "state": _types(_merged([w.state for w in workers])),
        "nonfinite": {**detected, **nonfinite},
    }
    processes = [json.loads(text) for text in transport.all_gather_text(json.dumps(values))]
    if len({process["averages"] for process in processes}) > 1:
        raise AgreedError("job.follow was called in some processes and not in others; call it in all of them")
    return RoundAgreement(
        states={
            name: {_dtype(dtype): _dtype(own) for dtype, own in sorted(types.items())}
            for name, types in sorted(_merged([process["state"] for process in processes]).items())
        },
        nonfinite={int(worker): reason for process in processes for worker, reason in process["nonfinite"].items()},
    )


def _merged(tables: Sequence[Mapping[str, Mapping[K, V]]]) -> dict[str, dict[K, V]]:
    """Tables of tables as one; of several entries the first counts."""
    merged: dict[str, dict[K, V]] = {}
    for table in tables:
        for name, own in table.items():
            merged[name] = {**own, **merged.get(name, {})}
    return merged


def _types(states: Mapping[str, Flats]) -> dict[str, dict[str, str]]:
    """The dtypes of optimizer states, by dtype of the weights, for JSON."""
    return {
        name: {str(dtype): str(flat.dtype) for dtype, flat in flats.items()}
        for name, flats in states.items()
        if name != VELOCITY
    }


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
