"""State of an optimizer, measured: what it keeps for each parameter, and what of it is sent.

For each shape and dtype of the network's parameters, the optimizer takes a step on one such parameter: on the meta
device, or if the optimizer reads numbers, on the CPU. What it then has decides the memory, and by the rules of
`resist.sync` also what is sent: state that is laid out as the weights, and packed bytes for the rest.
"""

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist.blocks.chains import Chain
from resist.cost.sizes import StateSizes
from resist.subnet.network import Subnet
from resist.sync.loose import STATE
from resist.sync.optimizer_state import flat_states, movable_state
from resist.sync.optimizers import innermost
from resist.sync.packing import InFlat, pack
from resist.sync.state_formats import kind_of

BuildOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Parts = dict[int | None, list[tuple[str, nn.Parameter]]]


class StateMeter:
    """Measures the state of an optimizer, once for each shape and dtype.

    Args:
        build_optimizer: Makes the optimizer from the parameters.

    Attributes:
        reads_numbers: The optimizer cannot take a step on the meta device.
    """

    def __init__(self, build_optimizer: BuildOptimizer) -> None:
        self._build, self.reads_numbers = build_optimizer, False
        self._classes: set[type] = set()
        self._known: dict[tuple[torch.Size, torch.dtype], dict[str, Any]] = {}

    def num_bytes(self, parameters: Iterable[nn.Parameter]) -> int:
        """Count the bytes of the state of some parameters.

        Args:
            parameters: The parameters, on any device; frozen ones have no state.
        """
        values = [value for parameter in parameters for value in self.state_of(parameter).values()]
        return sum(value.numel() * value.itemsize for value in values if isinstance(value, Tensor))

    def state_of(self, parameter: nn.Parameter) -> dict[str, Any]:
        """Return the state of one parameter after a step; its tensors are zeros that take no memory."""
        key = parameter.shape, parameter.dtype
        if not parameter.requires_grad:
            return {}
        if key not in self._known:
            try:
                state = self._step(parameter, "meta")
            except (RuntimeError, NotImplementedError):
                self.reads_numbers, state = True, self._step(parameter, "cpu")
            self._known[key] = {name: _without_memory(value) for name, value in state.items()}
        return self._known[key]

    def _step(self, like: nn.Parameter, device: str) -> dict[str, Any]:
        parameter = nn.Parameter(torch.zeros(like.shape, dtype=like.dtype, device=device))
        parameter.grad = torch.ones_like(parameter)
        optimizer = self._build([parameter])
        self._classes.add(type(innermost(optimizer)))
        optimizer.step()
        return dict(optimizer.state.get(parameter, {}))

    def sizes(self, template: nn.Module, chains: Sequence[Chain], capacities: Sequence[Sequence[int]]) -> StateSizes:
        """Count the bytes of the state that is exchanged at a synchronization.

        Single numbers, such as counts of steps, are taken to be equal in all workers, which do not send them then.

        Args:
            template: The full network, on any device.
            chains: Its chains.
            capacities: For each worker, its number of blocks of each chain.
        """
        subnet = Subnet(template, chains, [1] * len(chains), device="meta")
        parts: Parts = {number: [] for number in (None, *range(len(chains)))}
        for parameter, place in subnet.parameter_places():
            parts[place.chain].append((place.piece, parameter))
        types: dict[str, dict[torch.dtype, torch.dtype]] = {}
        for held in dict.fromkeys(map(tuple, capacities)):
            parameters = [p for chain, part in parts.items() for _, p in part * (1 if chain is None else held[chain])]
            for name, own in flat_states([self._optimizer(parameters)], {}).items():
                types[name] = {**own, **types.get(name, {})}
        loose = [self._loose_bytes(part, types) for part in parts.values()]
        kinds = tuple(kind_of(name, self._classes, types) for name in types)
        return StateSizes(tuple(types.values()), loose[0], tuple(loose[1:]), kinds)

    def _loose_bytes(self, part: Sequence[tuple[str, nn.Parameter]], types: Any) -> int:
        """Packed bytes of the state of a part that is not laid out as the weights; 0 where it is equal everywhere."""
        optimizer, tree, differs = self._optimizer([parameter for _, parameter in part]), dict[str, Any](), False
        for (piece, _), (parameter, state) in zip(part, optimizer.state.items(), strict=True):
            if state:
                tree[piece] = movable_state(optimizer, cast(Tensor, parameter), types)
                values = tree[piece].items() if isinstance(tree[piece], dict) else ()
                differs |= any(_depends_on_gradients(value) for _, value in values)
        return len(pack({STATE: tree}, torch.device("cpu"))) if differs else 0

    def _optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Something with the state of an optimizer, for copies of the parameters that take no memory."""
        state = {nn.Parameter(_without_memory(p), requires_grad=p.requires_grad): self.state_of(p) for p in parameters}
        return cast(Optimizer, SimpleNamespace(state=state))


def _depends_on_gradients(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_depends_on_gradients, cast(dict[str, object], value).values()))
    if isinstance(value, list | tuple):
        return any(map(_depends_on_gradients, cast(Sequence[object], value)))
    return isinstance(value, Tensor) and value.dim() > 0 and not isinstance(value, InFlat)


def _without_memory(value: Any) -> Any:
    plain = isinstance(value, Tensor) and value.layout == torch.strided
    return torch.zeros((), dtype=value.dtype, device="cpu").expand(value.shape) if plain else value
