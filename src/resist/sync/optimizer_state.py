"""Optimizer state (momentum, Adam's moments) at a synchronization. Policies:

reset    forgotten, as in the authors' code
keep     stays where it is: with the shared part and with blocks that stay; a block that arrives starts at zero
travel   moves with its block, averaged over holders as the weights are; that of the shared part stays where it is
average  as `travel`, and that of the shared part is averaged over all workers too

Where every worker holds every block in both rounds (local SGD, or one worker) nothing travels: `travel` is `keep`."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from resist.errors import UserError
from resist.subnet.network import Subnet

OPTIMIZER_STATES = ("reset", "keep", "travel", "average")


def adopt_state(subnet: Subnet, optimizer: Optimizer, adopted: dict[str, Tensor]) -> None:
    """Lay the optimizer's per-weight state out as the weights are, one flat tensor per kind, kept in `adopted`.

    State that lies there already stays. A state of another shape than its parameter (Adam's step count) is left alone,
    and so is a kind that only parameters without dimensions have in their shape (the step count again).
    """
    places = list(subnet.parameter_places())
    kinds = {
        kind
        for parameter, _ in places
        for kind, value in optimizer.state.get(parameter, {}).items()
        if parameter.dim() and isinstance(value, Tensor) and value.shape == parameter.shape
    }
    for parameter, place in places:
        for kind, value in optimizer.state.get(parameter, {}).items():
            if kind not in kinds or value.shape != parameter.shape or not value.is_floating_point():
                continue
            if kind not in adopted:
                adopted[kind] = torch.zeros_like(subnet.flat)
            view = subnet.view(place, adopted[kind])
            if value.data_ptr() != view.data_ptr() or value.stride() != view.stride():
                view.copy_(value)
                optimizer.state[parameter][kind] = view


def optimizers_of(subnets: Sequence[Subnet], optimizers: Sequence[Optimizer]) -> list[list[Optimizer]]:
    """The optimizers of each sub-network: those that train parameters of it.

    Raises UserError for one that trains none, and for a sub-network that has none.
    """
    owner = {id(p): number for number, subnet in enumerate(subnets) for p in subnet.model.parameters()}
    found: list[list[Optimizer]] = [[] for _ in subnets]
    seen: dict[int, int] = {}  # id of a parameter -> the optimizer that trains it
    models = "job.model" if len(subnets) == 1 else "worker.model for each of job.workers"
    for number, optimizer in enumerate(optimizers):
        if not hasattr(optimizer, "param_groups"):
            raise UserError(f"job.step was given a {type(optimizer).__name__}; give it the optimizers themselves")
        owners = {owner[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in owner}
        if len(owners) != 1:
            trains = "no parameter of the job's network" if not owners else "the networks of several workers"
            raise UserError(f"optimizer {number} has {trains}; make it from the parameters of {models}")
        again = {id(p) for group in optimizer.param_groups for p in group["params"]} & seen.keys()
        if again:
            raise UserError(
                f"optimizers {seen[again.pop()]} and {number} train the same parameters; give each parameter to one"
            )
        seen |= {id(p): number for group in optimizer.param_groups for p in group["params"]}
        found[owners.pop()].append(optimizer)
    if not all(found):
        raise UserError(f"{len(optimizers)} optimizers, none for job.workers[{found.index([])}]; pass one for each")
    return found


def follow_resize(subnet: Subnet, optimizer: Optimizer, before: set[int], adopted: dict[str, Tensor]) -> None:
    """After `subnet.resize`: drop the parameters that went, add those that came to their counterpart's group, and
    let the state of all of them lie in the (new) flat tensors of `adopted`. `before`: ids of the parameters then."""
    places = {id(parameter): (parameter, place) for parameter, place in subnet.parameter_places()}
    group_of: dict[tuple[int | None, str], int] = {}
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) in places:
                place = places[id(parameter)][1]
                group_of[place.chain, place.name] = number
            elif id(parameter) in before:
                optimizer.state.pop(parameter, None)
        group["params"] = [p for p in group["params"] if id(p) in places or id(p) not in before]
    for key, (parameter, place) in places.items():
        if key not in before and (place.chain, place.name) in group_of:
            optimizer.param_groups[group_of[place.chain, place.name]]["params"].append(parameter)
            first = replace(place, slot=0)
            state = optimizer.state.get(next(p for p, q in places.values() if q == first), {})
            optimizer.state[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
        for kind, flat in adopted.items():
            if kind in optimizer.state.get(parameter, {}):
                optimizer.state[parameter][kind] = subnet.view(place, flat)
