"""The state and the settings of a worker's optimizers as JSON values and named tensors, and back.

Each value of an optimizer's state is under the global dotted name of its parameter; a parameter outside of the network
has one such as `#0.1.2`: optimizer, group, position.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist.errors import UserError
from resist.state.names import Held, parameters_by_name
from resist.state.values import decode, encode, join
from resist.subnet.layout import Place
from resist.sync.averaging import VELOCITY
from resist.sync.worker import Worker

# Settings of how a step is computed, not of what: they follow the device, and stay as this job has them.
OF_DEVICE = ("foreach", "fused", "capturable")


def parameter_names(optimizer: Optimizer, number: int, names: dict[int, str]) -> list[list[str]]:
    """Name the parameters of each group of an optimizer.

    Args:
        optimizer: The optimizer.
        number: Its number among those of the worker.
        names: Id of a parameter of the network -> global dotted name. Other parameters are named by their position.

    Returns:
        The names of each group.
    """
    groups = optimizer.param_groups
    return [
        [names.get(id(p), f"#{number}.{at}.{position}") for position, p in enumerate(group["params"])]
        for at, group in enumerate(groups)
    ]


def optimizer_record(
    worker: Worker, number: int, held: Held, tensors: dict[str, Tensor], path: tuple[str, ...]
) -> dict[str, Any]:
    """Write an optimizer as JSON values.

    Args:
        worker: The worker.
        number: Number of the optimizer among those of the worker.
        held: Blocks of each chain, in the order of the slots.
        tensors: Key -> tensor. Tensors are added, not copied.
        path: Beginning of their keys.

    Returns:
        Class, parameters, settings of the groups, and state.

    Raises:
        UserError: If a value cannot be saved. Names it.
    """
    optimizer, what = worker.optimizers[number], f"optimizer {number} of worker {worker.index}"
    names = {id(p): name for name, p in parameters_by_name(worker.subnet, held).items()}
    groups = optimizer.param_groups
    named = parameter_names(optimizer, number, names)
    for group, own in zip(groups, named, strict=True):
        names |= dict(zip(map(id, group["params"]), own, strict=True))
    device = worker.subnet.device
    state: list[Any] = []
    for key, value in cast(dict[Any, Any], optimizer.state).items():
        if isinstance(key, Tensor) and id(key) not in names:
            continue  # of a parameter that the optimizer does not train any more
        name = names[id(key)] if isinstance(key, Tensor) else None
        where = name if name is not None else f"#{number}.state.{len(state)}"
        encoded = encode(
            dict(cast(dict[Any, Any], value)) if isinstance(value, dict) else value,
            tensors,
            path=(*path, where),
            what=f"{what}: state of {name or key!r}",
            device=device,
        )
        state.append(
            [name, encoded] if name is not None else [None, encoded, encode(key, tensors, path=path, what=what)]
        )
    return {
        "class": type(optimizer).__name__,
        "parameters": named,
        "groups": [
            encode(
                {key: value for key, value in group.items() if key != "params"},
                tensors,
                path=(*path, f"#{number}.groups.{at}"),
                what=f"{what}, group {at}",
            )
            for at, group in enumerate(groups)
        ],
        "state": state,
    }


def arrived_state(worker: Worker, held: Held, tensors: dict[str, Tensor], path: tuple[str, ...]) -> list[list[Any]]:
    """Write the state from other workers that no optimizer uses yet.

    Args:
        worker: The worker.
        held: Blocks of each chain, in the order of the slots.
        tensors: Key -> tensor. Tensors are added, not copied.
        path: Beginning of their keys.

    Returns:
        Parameter, state name and JSON value of each.
    """
    found: list[list[Any]] = []
    states: dict[int, dict[str, Any]] = {}
    for optimizer in worker.optimizers:
        states |= {id(p): state for p, state in cast(dict[Any, Any], optimizer.state).items()}
    for parameter, place in worker.subnet.parameter_places():
        name, dtype = worker.subnet.layout.full_name(place, held), worker.subnet.dtype_of(place)
        for state_name, flats in worker.state.items():
            if state_name == VELOCITY or dtype not in flats or state_name in states.get(id(parameter), {}):
                continue
            view = worker.subnet.view(place, flats)
            if bool(view.any()):
                key = join(*path, name, state_name)
                tensors[key] = view
                found.append([name, state_name, {"tensor": key}])
    return found


def check_optimizers(
    worker: Worker, held: Held, saved: Sequence[Mapping[str, Any]], source: str, *, whole: bool
) -> None:
    """Raise UserError where optimizers differ from the saved ones.

    Args:
        worker: The worker.
        held: Blocks of each chain that it will hold.
        saved: The values of `optimizer_record`.
        source: Where they come from, for messages.
        whole: Compare the parameters, too.
    """
    mine = worker.optimizers
    if len(mine) != len(saved):
        remedy = "; give them to job.attach, or pass them, before loading" if not mine else ""
        raise UserError(f"{source} has {len(saved)} optimizers of worker {worker.index}, this job {len(mine)}{remedy}")
    names = _known_names(worker, held)
    for number, (optimizer, one) in enumerate(zip(mine, saved, strict=True)):
        what = f"optimizer {number} of worker {worker.index}"
        if one["class"] != type(optimizer).__name__:
            raise UserError(f"{what} is {one['class']} in {source}, and {type(optimizer).__name__} here; use the same")
        groups = optimizer.param_groups
        if len(groups) != len(one["groups"]):
            raise UserError(
                f"{what} has {len(one['groups'])} groups in {source}, and {len(groups)} here; make the same"
            )
        for at, own in enumerate(one["parameters"] if whole else ()):
            expected, there = names[number, at], set(cast(list[str], own))
            if different := expected ^ there:
                name, where = min(different), "here" if min(different) in expected else "there"
                raise UserError(f"{what}, group {at}, is another one in {source}: it trains {name!r} only {where}")


def _known_names(worker: Worker, held: Held) -> dict[tuple[int, int], set[str]]:
    """Names of the parameters of each group, for `held`.

    The keys are the numbers of optimizer and group.
    """
    subnet = worker.subnet
    place_of = {id(parameter): place for parameter, place in subnet.parameter_places()}
    found: dict[tuple[int, int], set[str]] = {}
    last: dict[tuple[int | None, str], tuple[int, set[str]]] = {}
    for number, optimizer in enumerate(worker.optimizers):
        for at, group in enumerate(optimizer.param_groups):
            names = found[number, at] = set[str]()
            for position, parameter in enumerate(group["params"]):
                place = place_of.get(id(parameter))
                if place is None:
                    names.add(f"#{number}.{at}.{position}")
                elif place.chain is None or place.slot < len(held[place.chain]):
                    names.add(subnet.layout.full_name(place, held))
                    if place.key not in last or place.slot > last[place.key][0]:
                        last[place.key] = place.slot, names
    for (chain, piece), (_, names) in last.items():  # a new slot joins the group of the last one, see `follow_resize`
        if chain is not None:
            new = range(subnet.capacities[chain], len(held[chain]))
            names |= {subnet.layout.full_name(Place(chain, slot, piece), held) for slot in new}
    return found


def load_groups(optimizer: Optimizer, saved: Sequence[dict[str, Any]]) -> Callable[[], None]:
    """Return what gives the groups of an optimizer their settings, but for those of the device."""

    def apply() -> None:
        for group, values in zip(optimizer.param_groups, saved, strict=True):
            for name, value in values.items():
                present = group.get(name)
                if name in OF_DEVICE and name in group:
                    continue
                if isinstance(present, Tensor) and isinstance(value, Tensor):
                    present.copy_(value)  # a compiled step and a scheduler refer to it
                else:
                    group[name] = value

    return apply


def load_state(
    worker: Worker, number: int, saved: Sequence[Sequence[Any]], tensors: Mapping[str, Tensor], held: Held
) -> Callable[[], None]:
    """Check the state of one optimizer, and return what loads it."""
    for _, encoded, *_ in saved:
        decode(encoded, tensors)  # raises where something is missing

    def apply() -> None:
        optimizer = worker.optimizers[number]
        parameters = parameters_by_name(worker.subnet, held)
        names = {id(p): name for name, p in parameters.items()}
        groups = optimizer.param_groups
        target: dict[str, tuple[nn.Parameter, dict[str, Any]]] = {}
        for group, own in zip(groups, parameter_names(optimizer, number, names), strict=True):
            target |= {name: (p, group) for name, p in zip(own, group["params"], strict=True)}
        for name, encoded, *key in saved:
            if name is None:
                optimizer.state[decode(key[0], tensors)] = decode(encoded, tensors)
                continue
            parameter, group = target[name]
            entries: list[list[Any]] | None = cast(Any, encoded)["dict"] if isinstance(encoded, dict) else None
            if entries is None:
                optimizer.state[parameter] = decode(encoded, tensors)
                continue
            for state_name, value in entries:
                optimizer.state[parameter][state_name] = decode(
                    value,
                    tensors,
                    place=lambda t, host, n=str(state_name), p=parameter, g=group: placed(t, n, p, g, host=host),
                )

    return apply


def placed(tensor: Tensor, name: str, parameter: Tensor, group: Mapping[str, Any], *, host: bool) -> Tensor:
    """Move a tensor of an optimizer's state to its device.

    Args:
        tensor: The tensor, in CPU memory.
        name: Name of the state.
        parameter: The parameter that it belongs to.
        group: Group of the parameter.
        host: Whether it was in CPU memory when the parameter was not.

    Returns:
        The tensor. State of the parameter's shape has its device and memory format; a step count is in CPU memory,
        except for optimizers that are `fused` or `capturable`.
    """
    if tensor.dim() == 0 and (name == "step" or parameter.dim() > 0):
        if group.get("fused") or group.get("capturable"):
            # Their kernels take step counts in single precision only.
            return tensor.to(parameter.device, torch.float32 if name == "step" else tensor.dtype)
        return tensor if host or name == "step" else tensor.to(parameter.device)
    if host:
        return tensor
    if tensor.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)
    return tensor.to(parameter.device)


def load_arrived(
    worker: Worker, saved: Sequence[Sequence[Any]], tensors: Mapping[str, Tensor], held: Held
) -> Callable[[], None]:
    """Check what `arrived_state` has written; return what loads it."""
    found = {(name, state_name): decode(value, tensors) for name, state_name, value in saved}

    def apply() -> None:
        for _, place in worker.subnet.parameter_places():
            name, dtype = worker.subnet.layout.full_name(place, held), worker.subnet.dtype_of(place)
            for (own, state_name), tensor in found.items():
                if own == name:
                    worker.state_flat(state_name, dtype, tensor.dtype)
                    worker.subnet.view(place, worker.state[state_name]).copy_(tensor)

    return apply
