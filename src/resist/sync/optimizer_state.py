"""Optimizer state policies: momentum or Adam's moments at a synchronization.

- `reset`: cleared, as in the authors' code.
- `keep`: stays with the shared part and with blocks that stay; the optimizer starts over on blocks that arrive.
- `travel`: moves with its block, averaged over holders as the weights are; that of the shared part stays.
- `average`: as `travel`, and that of the shared part is averaged over all workers.

The state of a parameter moves as a whole. What has the parameter's shape is in flat tensors laid out as the weights;
the rest (step counts, factors of another shape, numbers of Python) goes by itself, see `resist.sync.loose`. If every
worker holds every block in both rounds (local SGD, or one worker), no block moves, and `travel` is `keep`.
"""

import inspect
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from resist.subnet.flats import Flats
from resist.subnet.network import Subnet
from resist.sync.packing import InFlat, Unmovable, Value, can_move

OPTIMIZER_STATES = ("reset", "keep", "travel", "average")

# Dtype of the weights -> dtype of an optimizer state of theirs.
StateTypes = dict[torch.dtype, torch.dtype]

log = logging.getLogger(__name__)
_named: set[tuple[str, str]] = set()  # what has been logged: (optimizer, state)
_begins_with_state: dict[type, bool] = {}  # class of an optimizer -> its constructor creates the state


def flat_states(optimizers: Sequence[Optimizer], known: Mapping[str, Flats]) -> dict[str, StateTypes]:
    """List the states that are laid out as the weights.

    A state has flat tensors if most numbers of the parameters with any state have it in their own shape. States without
    (the factored moments of Adafactor) move by themselves. A state that only zero-dimensional parameters have in their
    own shape (Adam's step count) is none of them.

    Args:
        optimizers: The optimizers of one worker.
        known: State name -> flat tensors of the states that have some already.

    Returns:
        State name -> dtype of the state for each dtype of weights.
    """
    covered: defaultdict[tuple[str, torch.dtype], int] = defaultdict(int)
    total: defaultdict[torch.dtype, int] = defaultdict(int)
    types: dict[str, StateTypes] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if not isinstance(parameter, Tensor) or not state:  # pyright: ignore[reportUnnecessaryIsInstance]
                continue
            total[parameter.dtype] += parameter.numel()
            for name, value in state.items():
                if parameter.dim() and _like_a_weight(value, parameter):
                    own = types.setdefault(name, {}).setdefault(parameter.dtype, value.dtype)
                    covered[name, parameter.dtype] += parameter.numel() if own == value.dtype else 0
    for name in list(types):
        types[name] = {dtype: own for dtype, own in types[name].items() if 2 * covered[name, dtype] >= total[dtype]}
    for name, flats in known.items():
        types[name] = {**types.get(name, {}), **{dtype: flat.dtype for dtype, flat in flats.items()}}
    return {name: own for name, own in types.items() if own}


def adopt_state(subnet: Subnet, optimizers: Sequence[Optimizer], flats_of: Mapping[str, Flats]) -> None:
    """Move state that is laid out as the weights into flat tensors.

    The optimizers then work on views of them. States that are views already are not copied. The flat tensors are zero
    where a parameter has no such state.

    Args:
        subnet: The sub-network whose parameters the optimizers train.
        optimizers: Its optimizers; their state is replaced by views.
        flats_of: State name -> flat tensors by dtype of the weights.
    """
    states = states_by_id(optimizers)
    for _, parameter, place, like in subnet.placed:
        own = states.get(id(parameter), (None, dict[str, Any]()))[1]
        for name, flats in flats_of.items():
            if parameter.dtype not in flats:
                continue
            value, flat = own.get(name), flats[parameter.dtype]
            if like is not None and _is_at(value, flat, like):
                continue
            view = subnet.view(place, flats)
            if not _like_a_weight(value, parameter) or value.dtype != view.dtype:
                view.zero_()
            elif value.data_ptr() != view.data_ptr() or value.stride() != view.stride():
                view.copy_(value)
                own[name] = view


def states_by_id(optimizers: Sequence[Optimizer]) -> dict[int, tuple[Optimizer, dict[str, Any]]]:
    """Collect the states of all parameters; a look-up by parameter takes longer than one by id.

    Args:
        optimizers: The optimizers of one worker.

    Returns:
        id of the parameter -> the first optimizer that has a state of it, and the state.
    """
    return {
        id(parameter): (optimizer, cast(dict[str, Any], state))
        for optimizer in reversed(optimizers)
        for parameter, state in optimizer.state.items()
        if state
    }


def _is_at(value: object, flat: Tensor, like: Tensor) -> bool:
    """True if a value is in a flat tensor of a state where a weight is in that of the weights."""
    return (
        type(value) is Tensor
        and value.dtype == flat.dtype
        and value.data_ptr() == flat.data_ptr() + like.storage_offset() * flat.element_size()
        and value.stride() == like.stride()
        and value.shape == like.shape
    )


def movable_state(optimizer: Optimizer, parameter: Tensor, types: Mapping[str, StateTypes]) -> Value:
    """Describe the state of one parameter for its way to another worker.

    Args:
        optimizer: The optimizer.
        parameter: The parameter.
        types: States that have flat tensors; see `flat_states`.

    Returns:
        State name -> value, `InFlat` where it is in a flat tensor; `Unmovable` if one of them cannot move. Then the
        optimizer starts over on this parameter wherever it arrives.
    """
    moving: dict[str | int, Value] = {}
    for name, value in optimizer.state[parameter].items():
        own = types.get(name, {}).get(parameter.dtype)
        if own is not None and _like_a_weight(value, parameter) and value.dtype == own:
            moving[name] = InFlat()
        elif type(name) is str and can_move(value):
            moving[name] = value
        else:
            _name_once(optimizer, str(name), value)
            return Unmovable(type(value).__name__)
    return moving


def start_over(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Drop the whole state of some parameters.

    An optimizer that creates its state with itself (Adagrad) gets that state again.

    Args:
        optimizer: The optimizer.
        parameters: Parameters that it trains.
    """
    group_of: dict[int, dict[str, Any]] | None = None
    for parameter in parameters:
        optimizer.state.pop(parameter, None)
        if not _begins_with_state.get(type(optimizer), True):
            continue
        if group_of is None:
            group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        if id(parameter) not in group_of:
            continue
        state = _first_state(optimizer, parameter, group_of[id(parameter)])
        _begins_with_state[type(optimizer)] = bool(state)
        if state:
            optimizer.state[parameter] = state


def _first_state(optimizer: Optimizer, parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    """The state that the constructor creates for a parameter."""
    signature = inspect.signature(type(optimizer)).parameters
    options = {name: value for name, value in {**optimizer.defaults, **group}.items() if name in list(signature)[1:]}
    try:
        return dict(type(optimizer)([{**group, "params": [parameter]}], **options).state.get(parameter, {}))
    except Exception:  # of a class that cannot be called like this: it begins without state, as almost all do
        return {}


def follow_resize(
    subnet: Subnet, optimizers: Sequence[Optimizer], before: set[int], flats_of: Mapping[str, Flats]
) -> None:
    """Update the optimizers of a worker after `subnet.resize`.

    New parameters have no state yet.

    Args:
        subnet: The sub-network, with its new capacities.
        optimizers: Its optimizers; groups and state are changed in place.
        before: Ids of the parameters before the resize.
        flats_of: State name -> flat tensors that the exchange filled, laid out for the new capacities.
    """
    places = {id(parameter): (parameter, place) for parameter, place in subnet.parameter_places()}
    # 1. Remove parameters that are gone from their groups, and drop their state, which also frees its memory. Note the
    #    group of the last slot of each remaining one: all slots of a chain have the same tensors, with equal
    #    `Place.key`s. The lists stay the same objects, since an optimizer may refer to them elsewhere.
    last: dict[tuple[int | None, str], tuple[int, list[Tensor]]] = {}
    for optimizer in optimizers:
        for parameters in (cast(list[Tensor], group["params"]) for group in optimizer.param_groups):
            for parameter in parameters:
                if id(parameter) in places:
                    place = places[id(parameter)][1]
                    if place.key not in last or place.slot > last[place.key][0]:
                        last[place.key] = place.slot, parameters
                elif id(parameter) in before:
                    optimizer.state.pop(parameter, None)
            parameters[:] = [p for p in parameters if id(p) in places or id(p) not in before]
        if isinstance(optimizer, LBFGS):
            optimizer._numel_cache = None  # pyright: ignore[reportPrivateUsage]
    for key, (parameter, place) in places.items():
        # 2. A new parameter joins the group of its counterpart in the last slot.
        if key not in before and place.key in last:
            last[place.key][1].append(parameter)
        # 3. State that is laid out as the weights becomes a view of the new flat tensors: the exchange has put there
        #    what belongs to the blocks that are now in the slots.
        for state in (optimizer.state.get(parameter, {}) for optimizer in optimizers):
            for name, flats in flats_of.items():
                if name in state and parameter.dtype in flats:
                    state[name] = subnet.view(place, flats)


def _like_a_weight(value: object, parameter: Tensor) -> TypeGuard[Tensor]:
    return (
        isinstance(value, Tensor)
        and value.shape == parameter.shape
        and (value.is_floating_point() or value.is_complex())
        and can_move(value)
    )


def _name_once(optimizer: Optimizer, name: str, value: object) -> None:
    key = (type(optimizer).__name__, name)
    if key not in _named:
        _named.add(key)
        log.warning(
            "the state %r of %s (%s) cannot move with its block: the optimizer starts over on blocks that arrive",
            name,
            key[0],
            type(value).__name__,
        )
