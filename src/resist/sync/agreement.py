"""Agreement: values that all processes of a job must share, and actions that succeed or fail in all of them."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import TypeVar, cast

from torch import nn

from resist.blocks.chains import Chain
from resist.errors import AgreedError, UserError
from resist.planning.strategy import Strategy
from resist.subnet.seeded import fingerprint
from resist.sync.transport import Transport

T = TypeVar("T")


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
    network, values = fingerprint(model), strategy_values(strategy)
    rules = values.pop("assign", None)  # capacities say more clearly what is different
    return {
        **values,
        "seed": seed,
        **options,
        "model": network["structure"],
        "chains": [chain.name for chain in chains],
        "capacities": [
            (round, [chain.capacities for chain in strategy.plan(chains, seed=seed, round=round).plans])
            for round in strategy.change_rounds
        ],
        "rules of the plans": rules,
        "initial weights": network["weights"],
    }


def strategy_values(strategy: Strategy) -> dict[str, object]:
    """Collect all values of a strategy, in a form for JSON.

    Args:
        strategy: The strategy.

    Returns:
        Name of each field -> its value, or the values of all stages if there are several. Functions have no value that
        two processes could compare; their plans are compared instead.
    """
    stages = [
        {
            f.name: value
            for f in fields(stage)
            if f.name != "then" and (value := _comparable(getattr(stage, f.name))) is not _FUNCTION
        }
        for stage in strategy.stages
    ]
    names = dict.fromkeys(name for stage in stages for name in stage)
    values = {name: [stage.get(name) for stage in stages] for name in ("workers", "name", *names)}
    values["workers"] = values["workers"][:1]  # equal in all stages
    return {"strategy" if k == "name" else k: v if len(v) > 1 else v[0] for k, v in values.items()}


_FUNCTION = object()


def _comparable(value: object) -> object:
    """A value in a form for JSON; `_FUNCTION` for a function."""
    if isinstance(value, str | int | float | None):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        values = {f.name: _comparable(getattr(value, f.name)) for f in fields(value)}
        return {name: item for name, item in values.items() if item is not _FUNCTION}
    if isinstance(value, Mapping):
        items = cast(Mapping[object, object], value).items()
        return {str(key): kept for key, item in items if (kept := _comparable(item)) is not _FUNCTION}
    if isinstance(value, Sequence | Set):
        items = [_comparable(item) for item in cast(Iterable[object], value)]
        return sorted(map(str, items)) if isinstance(value, Set) else [item for item in items if item is not _FUNCTION]
    return _FUNCTION if callable(value) else type(value).__name__
