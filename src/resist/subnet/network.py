"""Sub-networks: shallow models whose weights are in one flat tensor for each dtype.

A sub-network is the same model with only `capacity` blocks in each chain. Every parameter and float buffer is a view
into the flat tensor of its dtype, `[shared | chain 0, slot 0 | chain 0, slot 1 | ...]`. So the shared part is averaged
in one collective, a block is one message, and nothing is packed or copied. A plan only decides whose weights are in
which slot: modules, parameters and the optimizer's references stay the same from round to round. Most networks have one
dtype, and so one flat tensor.

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
from resist.subnet.layout import Child, Place, SubnetLayout, common_buffers
from resist.subnet.modules import buffers_of, children_of, named_modules, parameters_of

# One flat tensor for each dtype of the weights, which is the key. The tensors of an optimizer state have the layouts of
# the weights, and may have another dtype.
Flats = dict[torch.dtype, Tensor]


class Subnet:
    """One worker's network: an ordinary, shallow `nn.Module` over one flat tensor for each dtype.

    Args:
        template: Network to take the structure from. It is copied without its weights, and may be on the meta device.
        chains: Chains of the full network.
        capacities: Number of blocks of each chain in the sub-network.
        device: Device of the flat tensors.
        channels_last: Store 4-D weights with the channels innermost.
        template_capacities: Number of blocks of each chain in `template`. Default: all blocks.
        template_held: Blocks of each chain in `template`, the `layout.held` of its sub-network.

    Attributes:
        model: The shallow network.
        flats: All its weights and float buffers, by dtype, (numel,) each. New ones are not initialized: see `load`.
        layouts: Position of each tensor in the flat tensor of its dtype.

    Raises:
        UserError: If `template` has no parameters and float buffers.
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
        if not tensors:
            raise UserError("the model has no parameters; there is nothing to train")
        self._dtype_of = {layout.place(name).key: tensor.dtype for name, tensor in tensors.items()}
        self.layouts: dict[torch.dtype, SubnetLayout] = {}
        for dtype in dict.fromkeys(self._dtype_of.values()):
            own = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
            self.layouts[dtype] = replace(layout.with_tensors(own, channels_last), renumbered=frozenset(lists))
        self.flats: Flats = {}
        self._bypasses: dict[object, nn.Module] = {}
        self.resize(capacities, self.empty(capacities))

    @property
    def layout(self) -> SubnetLayout:
        """Layout of one dtype, for what does not depend on the dtype: names, places and children."""
        return next(iter(self.layouts.values()))

    @property
    def capacities(self) -> tuple[int, ...]:
        """Number of blocks of each chain in the sub-network."""
        return self.layout.capacities

    @property
    def flat(self) -> Tensor:
        """The flat tensor of a network with one dtype, (numel,)."""
        (flat,) = self.flats.values()
        return flat

    @property
    def shared(self) -> Tensor:
        """Shared part of `flat`, (layout.shared.numel,)."""
        return self.slot(None, 0, self.flat)

    @property
    def block_bytes(self) -> tuple[int, ...]:
        """Bytes of one block of each chain."""
        return tuple(
            sum(layout.blocks[chain].numel * dtype.itemsize for dtype, layout in self.layouts.items())
            for chain in range(len(self.chains))
        )

    def numel(self, capacities: Sequence[int]) -> int:
        """Count the elements of all flat tensors.

        Args:
            capacities: Number of blocks of each chain.

        Returns:
            Number of elements.
        """
        return sum(layout.with_capacities(capacities).numel for layout in self.layouts.values())

    def num_bytes(self, capacities: Sequence[int]) -> int:
        """Count the bytes of all flat tensors.

        Args:
            capacities: Number of blocks of each chain.

        Returns:
            Number of bytes.
        """
        return sum(layout.with_capacities(capacities).numel * dtype.itemsize for dtype, layout in self.layouts.items())

    def empty(self, capacities: Sequence[int]) -> Flats:
        """Allocate flat tensors, not initialized.

        Args:
            capacities: Number of blocks of each chain.

        Returns:
            The tensors by dtype.
        """
        return {
            dtype: torch.empty(layout.with_capacities(capacities).numel, dtype=dtype, device=self.device)
            for dtype, layout in self.layouts.items()
        }

    def slot(
        self,
        chain: int | None,
        slot: int,
        flat: Tensor,
        *,
        dtype: torch.dtype | None = None,
        capacities: Sequence[int] | None = None,
    ) -> Tensor:
        """Return one slot of a flat tensor, or its shared part.

        Args:
            chain: Number of the chain; None for the shared part.
            slot: Slot in the chain; 0 for the shared part.
            flat: Flat tensor, (numel,): the weights, or an optimizer state with the same layout.
            dtype: Dtype of the weights that `flat` belongs to. Default: that of `flat`.
            capacities: Capacities that `flat` is laid out for. Default: the present ones.

        Returns:
            A view of `flat`, (numel of the part,).
        """
        layout = self.layouts[dtype or flat.dtype]
        if capacities is not None:
            layout = layout.with_capacities(capacities)
        return layout.slot(chain, slot, flat)

    def place(self, name: str) -> Place:
        """Find the place of a tensor.

        Args:
            name: Dotted name of the tensor in `model`.

        Returns:
            The place.
        """
        return self.layout.place(name)

    def dtype_of(self, place: Place) -> torch.dtype:
        """Return the dtype of the weights at a place, which is the key of their flat tensor."""
        return self._dtype_of[place.key]

    def view(self, place: Place, flats: Mapping[torch.dtype, Tensor]) -> Tensor:
        """Return one tensor in the flat tensors.

        Args:
            place: Place of the tensor.
            flats: Flat tensors with the present layouts, by dtype of the weights.

        Returns:
            A view in the shape of the tensor.
        """
        dtype = self._dtype_of[place.key]
        return self.layouts[dtype].view(place, flats[dtype])

    def parameter_places(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """Iterate over the parameters of `model` with their places.

        Yields:
            Each parameter and its place, in the model's order.
        """
        for name, parameter in self.model.named_parameters():
            yield parameter, self.place(name)

    def resize(self, capacities: Sequence[int], flats: Flats) -> None:
        """Change the number of blocks, and use other flat tensors.

        Parameters that remain keep their identity, so an optimizer can continue with them. The values are those of
        `flats`: the caller copies what has to be kept.

        Args:
            capacities: New number of blocks of each chain.
            flats: Flat tensors laid out for `capacities`, by dtype.
        """
        self._arrange({dtype: layout.with_capacities(capacities) for dtype, layout in self.layouts.items()})
        self.flats = flats
        self._attach()

    def _arrange(self, layouts: dict[torch.dtype, SubnetLayout]) -> None:
        """Put the children of the chains' containers where `layouts` have them. New blocks are on the meta device."""
        layout = next(iter(layouts.values()))
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
        self.layouts = layouts

    def _attach(self) -> None:
        """Make every parameter and float buffer a view into the flat tensor of its dtype.

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
                    view = self.view(self.place(f"{prefix}.{key}".lstrip(".")), self.flats).data
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
                elif is_float(old):
                    # Statistics: averaged and sent with their block, so they are in a flat tensor too.
                    if id(old) not in buffers:
                        buffers[id(old)] = self.view(place, self.flats).data
                    own_buffers[key] = buffers[id(old)]
                else:
                    # Counters and indices stay with the module. Those of a new block begin at zero.
                    new = torch.zeros_like(old, device=self.device) if old.is_meta else old.to(self.device)
                    own_buffers[key] = new

    def twin(self, model: nn.Module) -> "Subnet":
        """Build a sub-network of the same blocks around another model.

        Args:
            model: Deep copy of this sub-network's model, whose weights may differ (an average of them, for example).
                They move into new flat tensors.

        Returns:
            The sub-network of `model`.

        Raises:
            ValueError: If `model` has another structure.
        """
        tensors, values = dict(_floats(self.model)), dict(_floats(model))
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in values.items()}:
            raise ValueError("the two networks have different tensors")
        twin = copy.copy(self)
        twin.model, twin.flats = model, self.empty(self.capacities)
        with torch.no_grad():
            for name, value in values.items():
                place = self.place(name)
                if place.key not in self._common:
                    twin.view(place, twin.flats).copy_(value)
        twin._attach()
        return twin

    def check_attached(self) -> None:
        """Check that every parameter is still a view into the flat tensor of its dtype.

        Raises:
            UserError: If one is not: `model.to(...)`, `model.half()` and the like move the parameters.
        """
        for name, parameter in self.model.named_parameters():
            place = self.place(name)
            known = place.key in self._dtype_of
            if not known or parameter.data_ptr() != self.view(place, self.flats).data_ptr():
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
            placed = tuple(map(tuple, held))
            self._arrange({dtype: replace(layout, held=placed) for dtype, layout in self.layouts.items()})
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

    def state(self, held: Sequence[Sequence[int]], flats: Flats | None = None) -> dict[str, Tensor]:
        """Return the weights and float buffers by global dotted name.

        Args:
            held: Blocks of each chain: block `held[chain][slot]` is in that slot.
            flats: Flat tensors with the present layouts. Default: the weights.

        Returns:
            Views into the flat tensors, not copies.
        """
        flats = self.flats if flats is None else flats
        slots = [(chain, slot) for chain, blocks in enumerate(held) for slot in range(len(blocks))]
        parts: list[tuple[int | None, int]] = [(None, 0), *slots]
        return {
            layout.full_name(place, held): layout.view(place, flats[dtype])
            for dtype, layout in self.layouts.items()
            for chain, slot in parts
            for place in (Place(chain, slot, piece) for piece in layout.part(chain).pieces)
        }


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
        if is_float(buffer):
            memo[id(buffer)] = buffer.detach().to("meta")
    return copy.deepcopy(module, memo)


def _identity(child: Child) -> tuple[int | None, int | None, int]:
    """What a child is, whatever the capacities and positions."""
    if child.chain is None or child.slot is None:
        return child.chain, None, child.index
    return child.chain, child.slot, child.member


def is_float(tensor: Tensor) -> bool:
    """Check for a real or complex floating-point dtype."""
    return tensor.is_floating_point() or tensor.is_complex()


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if is_float(buffer))
