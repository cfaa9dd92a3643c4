"""Sub-networks: shallow models whose weights are in one flat tensor.

A sub-network is the same model with only `capacity` blocks in each chain. Every parameter and float buffer is a view
into the flat tensor `[shared | chain 0, slot 0 | chain 0, slot 1 | ...]`. So the shared part is averaged in one
collective, a block is one message, and nothing is packed or copied. A plan only decides whose weights are in which
slot: modules, parameters and the optimizer's references stay the same from round to round.

The full network is a sub-network with every block in its slots, so it is built and filled in the same way.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.subnet.chain import IN_PLACE, Chain
from resist.subnet.layout import Child, Layout, Place, SubnetLayout, common_buffers
from resist.subnet.modules import buffers_of, children_of, named_modules, parameters_of


class Subnet:
    """One worker's network: an ordinary, shallow `nn.Module` over one flat tensor.

    Args:
        template: Network to take the structure from. It is copied without its weights, and may be on the meta device.
        chains: Chains of the full network.
        capacities: Number of blocks of each chain in the sub-network.
        device: Device of the flat tensor.
        channels_last: Store 4-D weights with the channels innermost.
        template_capacities: Number of blocks of each chain in `template`. Default: all blocks.
        template_held: Blocks of each chain in `template`, the `layout.held` of its sub-network.

    Attributes:
        model: The shallow network.
        flat: All its weights and float buffers, (numel,). New ones are not initialized: see `load`.
        layout: Position of each tensor in `flat`.
        dtype: Type of all weights and float buffers.

    Raises:
        UserError: If the parameters and float buffers of `template` have more than one dtype.
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
        template_held: tuple[tuple[int, ...], ...] = (),
    ) -> None:
        self.chains = tuple(chains)
        self.device, self.channels_last = torch.device(device), channels_last
        self.model = skeleton(template)
        present = tuple(template_capacities or (chain.num_blocks for chain in self.chains))
        lists = {c.container for c in chains if isinstance(template.get_submodule(c.container), nn.ModuleList)}
        # Only the template of a sub-network is renumbered already.
        renumbered = frozenset(lists if template_capacities else ())
        layout = SubnetLayout(self.chains, present, renumbered, template_held)
        self._common = common_buffers(template, layout, self.device)
        tensors = {name: t for name, t in _floats(self.model) if layout.place(name).key not in self._common}
        self.dtype = _only_dtype(tensors)
        self._bypasses: dict[object, nn.Module] = {}
        self.layout = replace(layout.with_tensors(tensors, channels_last), renumbered=frozenset(lists))
        self.flat = torch.empty(0, dtype=self.dtype, device=self.device)
        self.resize(capacities, self.empty(capacities))

    @property
    def capacities(self) -> tuple[int, ...]:
        """Number of blocks of each chain in the sub-network."""
        return self.layout.capacities

    @property
    def shared_layout(self) -> Layout:
        """Layout of the shared part."""
        return self.layout.shared

    @property
    def block_layouts(self) -> tuple[Layout, ...]:
        """Layout of one block of each chain."""
        return self.layout.blocks

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block of each chain."""
        return tuple(layout.numel * self.dtype.itemsize for layout in self.block_layouts)

    @property
    def shared(self) -> Tensor:
        """Shared part of the flat tensor, (shared_layout.numel,)."""
        return self.flat[: self.shared_layout.numel]

    def numel(self, capacities: Sequence[int]) -> int:
        """Compute the size of a flat tensor.

        Args:
            capacities: Number of blocks of each chain.

        Returns:
            Number of elements.
        """
        return self.layout.with_capacities(capacities).numel

    def empty(self, capacities: Sequence[int]) -> Tensor:
        """Allocate a flat tensor, not initialized.

        Args:
            capacities: Number of blocks of each chain.

        Returns:
            The tensor, (numel(capacities),).
        """
        return torch.empty(self.numel(capacities), dtype=self.dtype, device=self.device)

    def slot(self, chain: int | None, slot: int, flat: Tensor, *, capacities: Sequence[int] | None = None) -> Tensor:
        """Return one slot of a flat tensor, or its shared part.

        Args:
            chain: Number of the chain; None for the shared part.
            slot: Slot in the chain; 0 for the shared part.
            flat: Flat tensor, (numel,): the weights, or an optimizer state with the same layout.
            capacities: Capacities that `flat` is laid out for. Default: the present ones.

        Returns:
            A view of `flat`, (block_layouts[chain].numel,) or (shared_layout.numel,).
        """
        layout = self.layout if capacities is None else self.layout.with_capacities(capacities)
        return layout.slot(chain, slot, flat)

    def place(self, name: str) -> Place:
        """Find the place of a tensor.

        Args:
            name: Dotted name of the tensor in `model`.

        Returns:
            The place.
        """
        return self.layout.place(name)

    def view(self, place: Place, flat: Tensor) -> Tensor:
        """Return one tensor in a flat tensor.

        Args:
            place: Place of the tensor.
            flat: Flat tensor, (numel,), with the present layout.

        Returns:
            A view of `flat` in the shape of the tensor.
        """
        return self.layout.view(place, flat)

    def parameter_places(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """Iterate over the parameters of `model` with their places.

        Yields:
            Each parameter and its place, in the model's order.
        """
        for name, parameter in self.model.named_parameters():
            yield parameter, self.place(name)

    def resize(self, capacities: Sequence[int], flat: Tensor) -> None:
        """Change the number of blocks, and use another flat tensor.

        Parameters that remain keep their identity, so an optimizer can continue with them. The values are those of
        `flat`: the caller copies what has to be kept.

        Args:
            capacities: New number of blocks of each chain.
            flat: Flat tensor laid out for `capacities`.
        """
        layout = self.layout.with_capacities(capacities)
        self._arrange(layout)
        self.flat = flat
        self._attach()

    def _arrange(self, layout: SubnetLayout) -> None:
        """Put the children of the chains' containers where `layout` has them. New blocks are on the meta device."""
        for container in layout.containers:
            children = children_of(self.model.get_submodule(container))
            present = {
                _identity(child): module
                for child, module in zip(self.layout.children(container), children.values(), strict=True)
            }
            # Keep the children that remain. A new block gets the structure of slot 0, which every sub-network has,
            # with parameters on the meta device: no memory is allocated for them until they are attached.
            wanted: dict[str, nn.Module | None] = {}
            for child in layout.children(container):
                identity = _identity(child)
                if child.chain is not None and child.slot is None:
                    # The same one each time, so that compiled code of a plan that was seen before fits again.
                    if identity not in self._bypasses:
                        self._bypasses[identity] = copy.deepcopy(self.chains[child.chain].bypass(child.index))
                    wanted[child.key] = self._bypasses[identity]
                elif child.chain is None or identity in present:
                    wanted[child.key] = present[identity]
                else:
                    first = present[child.chain, 0, child.member]
                    assert first is not None, "blocks are modules"
                    wanted[child.key] = skeleton(first)
            # Replace the children in place. Their keys follow each other as in the full network, or by position.
            children.clear()
            children.update(wanted)
        self.layout = layout

    def _attach(self) -> None:
        """Make every parameter and float buffer a view into the flat tensor.

        The views are set as `.data`, which gives each a version counter of its own. With a common counter, a forward
        pass that writes to a buffer would look to autograd as if it had overwritten the weights.
        """
        # By id of the old tensor, so that tied tensors stay tied.
        parameters: dict[int, nn.Parameter] = {}
        buffers: dict[int, Tensor] = {}
        for prefix, module in named_modules(self.model):
            own_parameters, own_buffers = parameters_of(module), buffers_of(module)
            for key, old in own_parameters.items():
                if old is None:
                    continue
                if id(old) not in parameters:
                    view = self.view(self.place(f"{prefix}.{key}".lstrip(".")), self.flat).data
                    if old.is_meta:
                        # A parameter of a new block. It cannot change its device, so it is made here.
                        parameters[id(old)] = nn.Parameter(view, requires_grad=old.requires_grad)
                    else:
                        # A parameter that remains: the optimizer refers to it, so only its data changes.
                        old.data, parameters[id(old)] = view, old
                own_parameters[key] = parameters[id(old)]
            for key, old in own_buffers.items():
                if old is None:
                    continue
                place = self.place(f"{prefix}.{key}".lstrip("."))
                if place.key in self._common:
                    # One tensor for all blocks, outside of the flat tensor.
                    own_buffers[key] = self._common[place.key]
                elif old.is_floating_point():
                    # Statistics: averaged and sent with their block, so they are in the flat tensor too.
                    if id(old) not in buffers:
                        buffers[id(old)] = self.view(place, self.flat).data
                    own_buffers[key] = buffers[id(old)]
                else:
                    # Counters and indices stay with the module. Those of a new block begin at zero.
                    new = torch.zeros_like(old, device=self.device) if old.is_meta else old.to(self.device)
                    own_buffers[key] = new

    def twin(self, model: nn.Module) -> "Subnet":
        """Build a sub-network of the same blocks around another model.

        Args:
            model: Deep copy of this sub-network's model, whose weights may differ (an average of them, for example).
                They move into a new flat tensor.

        Returns:
            The sub-network of `model`.

        Raises:
            ValueError: If `model` has another structure.
        """
        tensors, values = dict(_floats(self.model)), dict(_floats(model))
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in values.items()}:
            raise ValueError("the two networks have different tensors")
        twin = copy.copy(self)
        twin.model, twin.flat = model, torch.empty_like(self.flat)
        with torch.no_grad():
            for name, value in values.items():
                place = self.place(name)
                if place.key not in self._common:
                    twin.view(place, twin.flat).copy_(value)
        twin._attach()
        return twin

    def check_attached(self) -> None:
        """Check that every parameter is still a view into the flat tensor.

        Raises:
            UserError: If one is not: `model.to(...)`, `model.half()` and the like move the parameters.
        """
        for name, parameter in self.model.named_parameters():
            place = self.place(name)
            known = place.piece in self.layout.part(place.chain).pieces
            if not known or parameter.data_ptr() != self.view(place, self.flat).data_ptr():
                raise UserError(
                    f"parameter {name!r} was moved out of the sub-network's flat tensor (by .to(), .cuda() or "
                    ".half(), or replaced?); give Job the device, and use autocast for lower precision; change layers "
                    "in build_model"
                )

    def hold(self, held: Sequence[Sequence[int]]) -> None:
        """Set varying attributes, and positions in place, to those of the blocks held.

        Args:
            held: Blocks of each chain: block `held[chain][slot]` is in that slot. Chains with the form in place get
                their blocks at these positions.
        """
        if any(chain.form == IN_PLACE for chain in self.chains):
            self._arrange(replace(self.layout, held=tuple(map(tuple, held))))
        for number, chain in enumerate(self.chains):
            for slot, block in enumerate(held[number]) if chain.varying else ():
                module = self.block(number, slot)
                for attribute in chain.varying:
                    attribute.put(module, block)

    def block(self, chain: int, slot: int) -> nn.Module:
        """Return the module in a slot.

        Args:
            chain: Number of the chain.
            slot: Slot in the chain.

        Returns:
            The block; a list of its members if it is several children.
        """
        container = self.chains[chain].container
        children = children_of(self.model.get_submodule(container)).values()
        members = [
            cast(nn.Module, module)
            for child, module in zip(self.layout.children(container), children, strict=True)
            if (child.chain, child.slot) == (chain, slot)
        ]
        return members[0] if len(members) == 1 else nn.ModuleList(members)

    def load(self, tensors: Mapping[str, Tensor], held: Sequence[Sequence[int]]) -> None:
        """Copy the weights of blocks and shared part into the model.

        Args:
            tensors: Weights and float buffers of the full network by global dotted name.
            held: Blocks of each chain: block `held[chain][slot]` goes into that slot.
        """
        self.hold(held)
        with torch.no_grad():
            for name, view in self.state(held).items():
                view.copy_(tensors[name])

    def state(self, held: Sequence[Sequence[int]], flat: Tensor | None = None) -> dict[str, Tensor]:
        """Return the weights and float buffers by global dotted name.

        Args:
            held: Blocks of each chain: block `held[chain][slot]` is in that slot.
            flat: Flat tensor with the present layout. Default: the weights.

        Returns:
            Views into the flat tensor, not copies.
        """
        flat = self.flat if flat is None else flat
        slots = [(chain, slot) for chain, blocks in enumerate(held) for slot in range(len(blocks))]
        places = [Place(None, 0, piece) for piece in self.shared_layout.pieces]
        places += [Place(chain, slot, piece) for chain, slot in slots for piece in self.block_layouts[chain].pieces]
        return {self.layout.full_name(place, held): self.view(place, flat) for place in places}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect all parameters and float buffers.

    Args:
        model: Any network.

    Returns:
        Tensors by dotted name, tied ones once.
    """
    return dict(_floats(model))


def skeleton(module: nn.Module) -> nn.Module:
    """Copy a module without its weights.

    Args:
        module: Module to copy. It is not changed.

    Returns:
        The copy, with parameters and float buffers on the meta device.
    """
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


def _identity(child: Child) -> tuple[int | None, int | None, int]:
    """What a child is, whatever the capacities and positions."""
    if child.chain is None or child.slot is None:
        return child.chain, None, child.index
    return child.chain, child.slot, child.member


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if buffer.is_floating_point())


def _only_dtype(tensors: Mapping[str, Tensor]) -> torch.dtype:
    dtypes = {tensor.dtype for tensor in tensors.values()}
    if len(dtypes) != 1:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes)) or "none"
        raise UserError(f"the model's parameters and float buffers have the types {names}; give it exactly one")
    return dtypes.pop()
