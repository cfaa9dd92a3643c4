"""A sub-network: the same model with only `capacity` blocks in each chain, its weights views into one flat tensor.

The flat tensor reads `[shared | chain 0, slot 0 | chain 0, slot 1 | ...]`. So the shared part is one collective, a
block is one message, a whole network is one collective too, and nothing is packed or copied. A plan only says whose
weights lie in which slot: modules, parameters and the optimizer's references stay the same from round to round.

The full network is a sub-network with every block in its slots, so it is built and filled in the same way.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.subnet.chains import Chain


@dataclass(frozen=True)
class Piece:
    """Where one tensor lies: `shape` at `offset` (in elements) of its part, channels innermost if `channels_last`."""

    offset: int
    shape: torch.Size
    channels_last: bool

    def view(self, part: Tensor) -> Tensor:
        flat = part[self.offset : self.offset + self.shape.numel()]
        if self.channels_last:
            n, c, h, w = self.shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(self.shape)


class Layout:
    """The order in which the tensors of one part (the shared part, or a block) lie behind one another.

    Parameters come before buffers: an outer optimizer moves the first `num_trained` elements and no running statistics.
    Of both, tensors whose size is not a multiple of 16 elements come last, so that others stay aligned to 64 bytes
    without any padding, and the bytes on the wire are exactly those of the weights.
    """

    def __init__(self, tensors: Mapping[str, Tensor], channels_last: bool) -> None:
        self.pieces: dict[str, Piece] = {}
        self.numel = self.num_trained = 0

        def order(name: str) -> tuple[bool, bool]:
            return not isinstance(tensors[name], nn.Parameter), tensors[name].numel() % 16 != 0

        for name in sorted(tensors, key=order):
            shape = tensors[name].shape
            self.pieces[name] = Piece(self.numel, shape, channels_last and len(shape) == 4)
            self.numel += shape.numel()
            if isinstance(tensors[name], nn.Parameter):
                self.num_trained = self.numel


@dataclass(frozen=True)
class Place:
    """Whose tensor this is: of the shared part (`chain` is None) or of slot `slot` of chain number `chain`.
    `name` is the global dotted name for a shared tensor, the name within the block for the others."""

    chain: int | None
    slot: int
    name: str


class Subnet:
    """One worker's network. `model` is an ordinary, shallow `nn.Module`; `flat` holds all its weights (1-D).

    template:   the network to take the structure from; it is copied without its weights.
    capacities: blocks per chain; template_capacities: those of `template`, by default all blocks.
    """

    def __init__(
        self,
        template: nn.Module,
        chains: Sequence[Chain],
        capacities: Sequence[int],
        *,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
        template_capacities: Sequence[int] | None = None,
    ) -> None:
        self.chains = tuple(chains)
        self.device, self.channels_last = torch.device(device), channels_last
        self.model = skeleton(template)
        self.capacities = tuple(template_capacities or (chain.num_blocks for chain in self.chains))
        self._common = self._common_buffers(template)
        tensors = {name: t for name, t in _floats(self.model) if self._key(name) not in self._common}
        self.dtype = _only_dtype(tensors)
        places = [(self.place(name), tensor) for name, tensor in tensors.items()]
        self.shared_layout = Layout({p.name: t for p, t in places if p.chain is None}, channels_last)
        self.block_layouts = tuple(
            Layout({p.name: t for p, t in places if (p.chain, p.slot) == (number, 0)}, channels_last)
            for number in range(len(self.chains))
        )
        self.flat = torch.empty(0, dtype=self.dtype, device=self.device)
        self.resize(capacities, self.empty(capacities))

    @property
    def shared(self) -> Tensor:
        return self.flat[: self.shared_layout.numel]

    def numel(self, capacities: Sequence[int]) -> int:
        """Elements of a flat tensor for these capacities."""
        blocks = zip(capacities, self.block_layouts, strict=True)
        return self.shared_layout.numel + sum(capacity * layout.numel for capacity, layout in blocks)

    def empty(self, capacities: Sequence[int]) -> Tensor:
        return torch.empty(self.numel(capacities), dtype=self.dtype, device=self.device)

    def slot(self, chain: int, slot: int, flat: Tensor, capacities: Sequence[int] | None = None) -> Tensor:
        """The part of `flat` (shaped as for `capacities`, by default the present ones) that is one slot. (numel,)"""
        capacities = self.capacities if capacities is None else capacities
        start = self.numel([c if i < chain else 0 for i, c in enumerate(capacities)])
        size = self.block_layouts[chain].numel
        return flat[start + slot * size : start + (slot + 1) * size]

    def place(self, name: str) -> Place:
        """Whose tensor the model's own dotted `name` is."""
        for container in self._containers():
            prefix = f"{container}." if container else ""
            if not name.startswith(prefix):
                continue
            key, _, inner = name.removeprefix(prefix).partition(".")
            position = list(self.model.get_submodule(container)._modules).index(key)
            chain, index, key = self._children(container, self.capacities)[position]
            return Place(None, 0, f"{prefix}{key}.{inner}") if chain is None else Place(chain, index, inner)
        return Place(None, 0, name)

    def _key(self, name: str) -> tuple[int | None, str]:
        """What a tensor's dotted name has in common with those of its counterparts in other slots."""
        place = self.place(name)
        return place.chain, place.name

    def _common_buffers(self, template: nn.Module) -> dict[tuple[int | None, str], Tensor]:
        """Float buffers that several blocks use (or a block and something else), as a table of rotations: by each of
        their names. They belong to no block, so every network keeps them as they are, outside of the flat tensor."""
        named = list(template.named_buffers(remove_duplicate=False))
        users: dict[int, set[tuple[int | None, int]]] = {}
        for name, buffer in named:
            place = self.place(name)
            users.setdefault(id(buffer), set()).add((place.chain, place.slot))
        copies = {
            id(buffer): buffer.detach().to(buffer.device if buffer.is_meta else self.device, copy=True)
            for _, buffer in named
            if len(users[id(buffer)]) > 1 and buffer.is_floating_point()
        }
        return {self._key(name): copies[id(buffer)] for name, buffer in named if id(buffer) in copies}

    def _containers(self) -> list[str]:
        """The containers of the chains, inner ones before those that they lie in."""
        return sorted({chain.container for chain in self.chains}, key=len, reverse=True)

    def _children(self, container: str, capacities: Sequence[int]) -> list[tuple[int | None, int, str]]:
        """What the children of `container` are with these capacities: (chain number, slot, key) or (None, index, key),
        index and key being those in the full network."""
        within = [(number, chain) for number, chain in enumerate(self.chains) if chain.container == container]
        children: list[tuple[int | None, int, str]] = []
        for index, key in enumerate(within[0][1].keys):
            number, chain = next((nc for nc in within if nc[1].first <= index <= nc[1].last), (None, None))
            if number is None or chain is None:
                children.append((None, index, key))
            elif index - chain.first < capacities[number]:
                children.append((number, index - chain.first, key))
        return children

    def view(self, place: Place, flat: Tensor) -> Tensor:
        """The tensor at `place` of a flat tensor that is laid out as this sub-network is."""
        if place.chain is None:
            return self.shared_layout.pieces[place.name].view(flat[: self.shared_layout.numel])
        return self.block_layouts[place.chain].pieces[place.name].view(self.slot(place.chain, place.slot, flat))

    def parameter_places(self) -> Iterator[tuple[nn.Parameter, Place]]:
        for name, parameter in self.model.named_parameters():
            yield parameter, self.place(name)

    def resize(self, capacities: Sequence[int], flat: Tensor) -> None:
        """Give the model `capacities` blocks and let `flat`, which is laid out for them, hold its weights.

        Parameters that remain keep their identity, so an optimizer goes on working with them.
        """
        for container in self._containers():
            module = self.model.get_submodule(container)
            present = self._children(container, self.capacities)
            children = cast(dict[str, nn.Module], module._modules)
            modules = {(n, i): child for (n, i, _), child in zip(present, children.values(), strict=True)}
            wanted = self._children(container, capacities)
            blocks = [modules[n, i] if (n, i) in modules else skeleton(modules[n, 0]) for n, i, _ in wanted]
            keys = [key for _, _, key in wanted]
            if isinstance(module, nn.ModuleList):  # which looks its children up by their position
                keys = [str(position) for position in range(len(blocks))]
            children.clear()
            children.update(zip(keys, blocks, strict=True))
        self.capacities = tuple(capacities)
        self.flat = flat
        self._attach()

    def _attach(self) -> None:
        """Make every parameter and float buffer a view into the flat tensor.

        As `.data`, which gives each a version counter of its own: else a forward pass that writes to a buffer would
        look to autograd as if it had overwritten the weights, too.
        """
        renewed: dict[int, nn.Parameter] = {}
        views: dict[int, Tensor] = {}
        for prefix, module in self.model.named_modules():
            for key, old in module._parameters.items():
                if old is None:
                    continue
                if id(old) not in renewed:
                    view = self.view(self.place(f"{prefix}.{key}".lstrip(".")), self.flat).data
                    if old.is_meta:
                        renewed[id(old)] = nn.Parameter(view, requires_grad=old.requires_grad)
                    else:
                        old.data, renewed[id(old)] = view, old
                module._parameters[key] = renewed[id(old)]
            for key, old in module._buffers.items():
                if old is None:
                    continue
                name = f"{prefix}.{key}".lstrip(".")
                if self._key(name) in self._common:
                    module._buffers[key] = self._common[self._key(name)]
                elif old.is_floating_point():
                    if id(old) not in views:
                        views[id(old)] = self.view(self.place(name), self.flat).data
                    module._buffers[key] = views[id(old)]
                else:
                    new = torch.zeros_like(old, device=self.device) if old.is_meta else old.to(self.device)
                    module._buffers[key] = new

    def twin(self, model: nn.Module) -> "Subnet":
        """A sub-network of the same blocks around `model`, a deep copy of this one's model whose weights may differ:
        they move into a flat tensor of their own. Raises ValueError where `model` is of another structure."""
        own, values = dict(_floats(self.model)), dict(_floats(model))
        if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in values.items()}:
            raise ValueError("the two networks have different tensors")
        twin = copy.copy(self)
        twin.model, twin.flat = model, torch.empty_like(self.flat)
        with torch.no_grad():
            for name, value in values.items():
                if self._key(name) not in self._common:
                    twin.view(twin.place(name), twin.flat).copy_(value)
        twin._attach()
        return twin

    def check_attached(self) -> None:
        """Raise where a parameter no longer lies in the flat tensor (`model.to(...)`, `model.half()` move it out)."""
        for parameter, place in self.parameter_places():
            layout = self.shared_layout if place.chain is None else self.block_layouts[place.chain]
            known = place.name in layout.pieces
            if not known or parameter.data_ptr() != self.view(place, self.flat).data_ptr():
                raise UserError(
                    f"parameter {place.name!r} was moved out of the sub-network's flat tensor (by .to(), .cuda() or "
                    ".half(), or replaced?); give Job the device, and use autocast for lower precision; change layers "
                    "in build_model"
                )

    def hold(self, held: Sequence[Sequence[int]]) -> None:
        """Give each slot the attributes of block `held[chain][slot]`, where these differ along the chain."""
        for number, chain in enumerate(self.chains):
            if not chain.varying:
                continue
            container = self.model.get_submodule(chain.container)
            children = self._children(chain.container, self.capacities)
            for (of_chain, slot, _), module in zip(children, container.children(), strict=True):
                if of_chain == number:
                    for one in chain.varying:
                        one.put(module, held[number][slot])

    def load(self, tensors: Mapping[str, Tensor], held: Sequence[Sequence[int]]) -> None:
        """Fill the weights from `tensors` (global dotted names), with block `held[chain][slot]` in each slot."""
        self.hold(held)
        with torch.no_grad():
            for name, view in self.state(held).items():
                view.copy_(tensors[name])

    def state(self, held: Sequence[Sequence[int]], flat: Tensor | None = None) -> dict[str, Tensor]:
        """The weights and float buffers by global dotted name: views, not copies. Or those of another `flat` tensor."""
        flat = self.flat if flat is None else flat
        shared = flat[: self.shared_layout.numel]
        named = {name: piece.view(shared) for name, piece in self.shared_layout.pieces.items()}
        for number, (chain, layout) in enumerate(zip(self.chains, self.block_layouts, strict=True)):
            for slot, block in enumerate(held[number]):
                part = self.slot(number, slot, flat)
                named |= {f"{chain.block_name(block)}.{name}": p.view(part) for name, p in layout.pieces.items()}
        return named


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and float buffers of a full network by global dotted name, tied ones once."""
    return dict(_floats(model))


def skeleton(module: nn.Module) -> nn.Module:
    """A deep copy whose parameters and float buffers are on the meta device: the structure without the weights."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point())


def _only_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "none"
        raise UserError(f"the model's parameters and float buffers have the types {names}; give it exactly one")
    return dtypes.pop()
