"""Optimizer state policies: momentum or Adam's moments at a synchronization.

- `reset`: cleared, as in the authors' code.
- `keep`: stays with the shared part and with blocks that stay; zero for blocks that arrive.
- `travel`: moves with its block, averaged over holders as the weights are; that of the shared part stays.
- `average`: as `travel`, and that of the shared part is averaged over all workers.

If every worker holds every block in both rounds (local SGD, or one worker), no block moves, and `travel` is `keep`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist.errors import UserError
from resist.subnet.network import Flats, Place, Subnet, is_float

OPTIMIZER_STATES = ("reset", "keep", "travel", "average")


def adopt_state(subnet: Subnet, optimizer: Optimizer, adopted: dict[str, Flats]) -> None:
    """Move the optimizer's state into flat tensors laid out as the weights.

    Each state name has one flat tensor for each dtype of the weights, with the dtype of the state. The optimizer then
    works on views of these tensors. States that are views of them already are not copied. Two cases are left to the
    optimizer: a state whose shape is not that of its parameter (Adam's step count), and a state that only
    zero-dimensional parameters have in their own shape (again the step count).

    Args:
        subnet: The sub-network whose parameters the optimizer trains.
        optimizer: The optimizer; its state is replaced by views.
        adopted: State name -> flat tensors by dtype of the weights. Missing ones are added, filled with zeros: memory
            for one more copy of the weights each.
    """
    places = list(subnet.parameter_places())
    names = {
        name
        for parameter, _ in places
        for name, value in optimizer.state.get(parameter, {}).items()
        if parameter.dim() and isinstance(value, Tensor) and value.shape == parameter.shape
    }
    for parameter, place in places:
        for name, value in optimizer.state.get(parameter, {}).items():
            if name not in names or value.shape != parameter.shape or not is_float(value):
                continue
            flats, dtype = adopted.setdefault(name, {}), subnet.dtype_of(place)
            if dtype not in flats:
                flats[dtype] = torch.zeros_like(subnet.flats[dtype], dtype=value.dtype)
            view = subnet.view(place, flats)
            if value.data_ptr() != view.data_ptr() or value.stride() != view.stride():
                view.copy_(value)
                optimizer.state[parameter][name] = view


def optimizers_of(subnets: Sequence[Subnet], optimizers: Sequence[Optimizer]) -> list[list[Optimizer]]:
    """Group optimizers by the sub-network whose parameters they train.

    Args:
        subnets: The sub-networks of the hosted workers.
        optimizers: Their optimizers, in any order.

    Returns:
        The optimizers of each sub-network.

    Raises:
        UserError: If an optimizer trains the parameters of no sub-network or of several, if two optimizers train the
            same parameter, or if a sub-network has no optimizer.
    """
    subnet_of = {id(p): number for number, subnet in enumerate(subnets) for p in subnet.model.parameters()}
    grouped: list[list[Optimizer]] = [[] for _ in subnets]
    trained_by: dict[int, int] = {}  # id of a parameter -> number of the optimizer
    models = "job.model" if len(subnets) == 1 else "worker.model for each of job.workers"
    for number, optimizer in enumerate(optimizers):
        if not hasattr(optimizer, "param_groups"):
            raise UserError(f"job.step was given a {type(optimizer).__name__}; give it the optimizers themselves")
        parameters = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = {subnet_of[parameter] for parameter in parameters & subnet_of.keys()}
        if len(trained) != 1:
            trains = "no parameter of the job's network" if not trained else "the networks of several workers"
            raise UserError(f"optimizer {number} has {trains}; make it from the parameters of {models}")
        twice = parameters & trained_by.keys()
        if twice:
            raise UserError(
                f"optimizers {trained_by[twice.pop()]} and {number} train the same parameters; give each parameter to "
                "one"
            )
        trained_by |= dict.fromkeys(parameters, number)
        grouped[trained.pop()].append(optimizer)
    if not all(grouped):
        raise UserError(f"{len(optimizers)} optimizers, none for job.workers[{grouped.index([])}]; pass one for each")
    return grouped


def follow_resize(subnet: Subnet, optimizer: Optimizer, before: set[int], adopted: Mapping[str, Flats]) -> None:
    """Update an optimizer after its parameters have changed in `subnet.resize`.

    Args:
        subnet: The sub-network, with its new capacities.
        optimizer: Its optimizer; groups and state are changed in place.
        before: Ids of the parameters before the resize.
        adopted: State name -> flat tensors that the exchange filled, laid out for the new capacities.
    """
    places = {id(parameter): (parameter, place) for parameter, place in subnet.parameter_places()}
    # 1. Remove parameters that are gone from their groups, and drop their state, which also frees its memory. Note the
    #    group of each remaining one: all slots of a chain have the same tensors, with equal `Place.key`s.
    group_of: dict[tuple[int | None, str], int] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) in places:
                group_of[places[id(parameter)][1].key] = number
            elif id(parameter) in before:
                optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) in places or id(p) not in before]
    for key, (parameter, place) in places.items():
        # 2. A new parameter joins the group of its counterparts in other slots. It starts with a copy of the state of
        #    slot 0, for the values that are not laid out as weights (Adam's step count).
        if key not in before and place.key in group_of:
            optimizer.param_groups[group_of[place.key]]["params"].append(parameter)
            state = optimizer.state.get(_in_first_slot(places, place), {})
            optimizer.state[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        # 3. State that is laid out as the weights becomes a view of the new flat tensors, for old and new parameters:
        #    the exchange has put there what belongs to the blocks that are now in the slots.
        for name, flats in adopted.items():
            if name in optimizer.state.get(parameter, {}) and subnet.dtype_of(place) in flats:
                optimizer.state[parameter][name] = subnet.view(place, flats)


def _in_first_slot(places: Mapping[int, tuple[nn.Parameter, Place]], place: Place) -> nn.Parameter:
    """The counterpart of the parameter at `place` in slot 0 of its chain."""
    first = replace(place, slot=0)
    return next(parameter for parameter, other in places.values() if other == first)
