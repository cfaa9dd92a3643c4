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

from resist.blocks.attributes import Placement
from resist.blocks.chain import IN_PLACE, Chain
from resist.blocks.copying import relink, tensors_by_name
from resist.blocks.modules import buffers_of, children_of, is_float, named_modules, parameters_of
from resist.errors import UserError
from resist.subnet.buffers import Buffer, loose, put_loose, take_back
from resist.subnet.common import common_buffers, common_modules
from resist.subnet.layout import Child, Place, SubnetLayout
from resist.subnet.modes import frozen_modules
from resist.subnet.skeleton import next_hook, skeleton

# One flat tensor for each dtype of the weights, which is the key. The tensors of an optimizer state have the layouts of
# the weights, and may have another dtype.
Flats = dict[torch.dtype, Tensor]
# Begins the names of buffers that several parts of the network use, and that are loose ones of the shared part.
COMMON = "common "


class Subnet:
    """One worker's network: an ordinary, shallow `nn.Module` over one flat tensor for each dtype.

    Args:
        template: Network to take the structure from. It is copied without its weights, and may be on the meta device.
        chains: Chains of the full network.
        capacities: Number of blocks of each chain in the sub-network.
        device: Device of the flat tensors.
        channels_last: Store 4-D weights with the channels innermost.
        template_capacities: Number of blocks of each chain in `template`. Default: all blocks.
        like: Another sub-network of the same network, from which it takes the layouts.

    Attributes:
        model: The shallow network.
        flats: All its weights and float buffers, by dtype, (numel,) each. New ones are not initialized: see `load`.
        layouts: Position of each tensor in the flat tensor of its dtype.
        buffers: Its buffers by place.
        held: Blocks of each chain whose values are in the slots; see `hold`.
        changing: `Place.key` of frozen parameters and buffers that are known to change in some worker.
        hooks_before: Hooks with smaller numbers belong to the network, others are the user's.
        has_loose: True if some worker has loose buffers, from the first synchronization on.
        frozen_modules: Keys of the modules that stay in eval mode in training; see `resist.subnet.modes`.

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
        like: "Subnet | None" = None,
    ) -> None:
        self.chains = tuple(chains)
        self.device, self.channels_last = torch.device(device), channels_last
        self._placement = Placement()
        present = tuple(template_capacities or (chain.num_blocks for chain in self.chains))
        lists = {c.container for c in chains if isinstance(template.get_submodule(c.container), nn.ModuleList)}
        # Only the template of a sub-network is renumbered already.
        renumbered = frozenset(lists if template_capacities else ())
        placed = like.layout.held if like is not None and template_capacities else ()
        layout = SubnetLayout(self.chains, present, renumbered, placed)
        if like is None:
            self.hooks_before = next_hook()
            self._common: dict[tuple[int | None, str], Tensor] = common_buffers(template, layout, self.device)
            self._common_modules = common_modules(template, layout)
            self._lay_out(template, layout, frozenset(lists))
        else:
            self.hooks_before = like.hooks_before
            copies = {id(common): common.clone() for common in like._common.values()}
            self._common = {key: copies[id(common)] for key, common in like._common.items()}
            self._common_modules, self._dtype_of = like._common_modules, like._dtype_of
            self.layouts = {dtype: own.with_capacities(present) for dtype, own in like.layouts.items()}
        self.held: tuple[tuple[int, ...], ...] = tuple(tuple(range(capacity)) for capacity in capacities)
        self.changing: set[tuple[int | None, str]] = set() if like is None else set(like.changing)
        # Blocks without a slot are not copied: the work and the memory follow the sub-network, not the full one.
        left_out: list[nn.Module] = []
        for container in layout.containers:
            children = children_of(template.get_submodule(container)).values()
            for child, module in zip(layout.children(container), children, strict=True):
                if module is None or child.chain is None or child.slot is None:
                    continue
                if child.slot >= capacities[child.chain]:
                    left_out.append(module)
        self._bypasses: dict[object, nn.Module] = {}
        self.model = skeleton(
            template, without=left_out, keep=self._kept(template, layout), hooks_before=self.hooks_before
        )
        self.flats: Flats = {}
        self.resize(capacities, self.empty(capacities))
        self.frozen_modules: set[tuple[int | None, str]] = set() if like is None else like.frozen_modules
        if like is None and self.model.training:
            self.frozen_modules = frozen_modules(self.model, self.place)
        self.has_loose = bool(self.loose()) if like is None else like.has_loose

    def _lay_out(self, template: nn.Module, layout: SubnetLayout, renumbered: frozenset[str]) -> None:
        """Find the dtype and the position of each tensor."""
        tensors = {name: tensor for name, tensor in _floats(template) if layout.place(name).key not in self._common}
        # Buffers that are not finite in the beginning are not averaged, in no block of their chain: they are loose.
        infinite = {
            layout.place(name).key
            for name, buffer in template.named_buffers()
            if name in tensors and not buffer.is_meta and not bool(buffer.isfinite().all())
        }
        tensors = {name: tensor for name, tensor in tensors.items() if layout.place(name).key not in infinite}
        if not tensors:
            raise UserError("the model has no parameters; there is nothing to train")
        self._dtype_of = {layout.place(name).key: tensor.dtype for name, tensor in tensors.items()}
        self.layouts: dict[torch.dtype, SubnetLayout] = {}
        for dtype in dict.fromkeys(self._dtype_of.values()):
            own = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
            with_tensors = layout.with_tensors(own, self.channels_last)
            self.layouts[dtype] = replace(with_tensors, renumbered=renumbered)

    def _kept(self, template: nn.Module, layout: SubnetLayout) -> set[int]:
        """Ids of the float buffers of a module that are not in the flat tensors, and are copied with their values."""
        return {
            id(buffer)
            for name, buffer in template.named_buffers()
            if is_float(buffer) and not self._fits(layout.place(name), buffer)
        }

    def _fits(self, place: Place, tensor: Tensor) -> bool:
        """True for a tensor that has a piece in the flat tensors, or is common, and still has its shape and dtype."""
        if place.key in self._common:
            like = self._common[place.key]
            return (tensor.shape, tensor.dtype) == (like.shape, like.dtype)
        dtype = self._dtype_of.get(place.key)
        if dtype is None or dtype != tensor.dtype:
            return False
        return self.layouts[dtype].part(place.chain).pieces[place.piece].shape == tensor.shape

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
        kept = self._kept(self.model, self.layout)
        common = [m for name, m in named_modules(self.model) if self.place(name).key in self._common_modules]
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
                    wanted[child.key] = skeleton(
                        first, same=common, keep=kept, hooks_before=self.hooks_before, root=self.model
                    )
            # Replace the children in place. Their keys follow each other as in the full network, or by position.
            children.clear()
            children.update(wanted)
        self.layouts = layouts

    def _attach(self) -> None:
        """Make every parameter and float buffer a view into the flat tensor of its dtype.

        The views are set as `.data`, which gives each a version counter of its own. With a common counter, a forward
        pass that writes to a buffer would look to autograd as if it had overwritten the weights.
        """
        before = tensors_by_name(self.model)
        # By id of the old tensor, so that tied tensors stay tied.
        parameters: dict[int, nn.Parameter] = {}
        buffers: dict[int, Tensor] = {}
        self.buffers: dict[Place, Buffer] = {}
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
                        vars(parameters[id(old)]).update(vars(old))
                    else:
                        # A parameter that remains: the optimizer refers to it, so only its data changes.
                        old.data, parameters[id(old)] = view, old
                own_parameters[key] = parameters[id(old)]
            for key, old in own_buffers.items():
                place = self.place(f"{prefix}.{key}".lstrip("."))
                if old is not None and place.key in self._common:
                    # One tensor for all blocks, outside of the flat tensors: a loose one of the shared part.
                    common = self._common[place.key]
                    if old.is_meta or self._fits(place, old):
                        if not old.is_meta and old is not common:
                            common.copy_(old.detach())
                        own_buffers[key] = common
                    if id(common) not in buffers:
                        buffers[id(common)] = common
                        of_all = Place(None, 0, f"{COMMON}{place.chain}.{place.piece}")
                        self.buffers[of_all] = Buffer(module, key, of_all, None)
                    continue
                # Statistics are averaged and sent with their block, so they are in a flat tensor too. Loose buffers
                # stay with the module.
                view = None if old is None else buffers.get(id(old))
                if view is None and place.key in self._dtype_of:
                    view = self.view(place, self.flats).data
                self.buffers[place] = Buffer(module, key, place, view)
                if old is None:
                    continue
                if view is not None and (view.shape, view.dtype) == (old.shape, old.dtype):
                    own_buffers[key] = buffers[id(old)] = view
                else:
                    new = torch.zeros_like(old, device=self.device) if old.is_meta else old.detach().to(self.device)
                    own_buffers[key] = new
        after = tensors_by_name(self.model)
        relink(self.model, {id(old): after[name] for name, old in before.items() if after[name] is not old})

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
        twin._placement = Placement()
        with torch.no_grad():
            for name, value in values.items():
                place = self.place(name)
                if place.key not in self._common:
                    twin.view(place, twin.flats).copy_(value)
        twin._attach()
        return twin

    def take_back(self) -> None:
        """Copy tensors that were assigned into the flat tensors, as if they had been written to in place.

        These are buffers that a forward pass assigns, and new data of parameters, as in `target.data = 0.99 *
        target.data + 0.01 * online.data`. A buffer that has another shape or dtype than in the beginning becomes a
        loose one; see `loose`.
        """
        take_back(self.buffers)
        with torch.no_grad():
            for parameter, place in self.parameter_places():
                view = self.view(place, self.flats) if place.key in self._dtype_of else parameter
                if view.data_ptr() != parameter.data_ptr() and _form(view) == _form(parameter):
                    view.copy_(parameter)
                    parameter.data = view.data

    def loose(self) -> dict[tuple[int | None, int], dict[str, Tensor]]:
        """Collect the buffers whose values are not in the flat tensors.

        These are buffers of integers, float buffers that were not finite in the beginning, and those that have another
        shape or dtype than in the beginning. The count of a BatchNorm with a momentum is without effect, and left out.

        Returns:
            (chain, slot), or (None, 0) for the shared part -> name in the part -> the present tensor, not a copy.
        """
        return loose(self.buffers)

    def put_loose(self, chain: int | None, slot: int, values: Mapping[str, Tensor]) -> None:
        """Give a part the loose buffers of the block whose weights are now in it.

        Buffers that are not in `values` return to the flat tensors, or stay as they are if they have no place there.

        Args:
            chain: Number of the chain; None for the shared part.
            slot: Slot in the chain; 0 for the shared part.
            values: All loose buffers of the block, as `loose` names them. They are copied.
        """
        put_loose(self.buffers, (chain, slot), values)

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
        self.held = placed = tuple(map(tuple, held))
        if any(chain.form == IN_PLACE for chain in self.chains):
            self._arrange({dtype: replace(layout, held=placed) for dtype, layout in self.layouts.items()})
        for number, chain in enumerate(self.chains):
            slots = [(self.block(number, slot), block) for slot, block in enumerate(held[number])]
            self._placement.put(slots, chain.varying, chain=chain.name, noted=chain.noted)

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
            tensors: Weights and float buffers of the full network by global dotted name; loose buffers where it has
                them.
            held: Blocks of each chain: block `held[chain][slot]` goes into that slot.
        """
        self.hold(held)
        with torch.no_grad():
            for name, view in self.state(held).items():
                view.copy_(tensors[name])
            for place, buffer in self.buffers.items():
                name = self.layout.full_name(place, held)
                if buffer.view is None and buffer.now is not None and name in tensors:
                    buffer.now.copy_(tensors[name])

    def state(self, held: Sequence[Sequence[int]], flats: Flats | None = None) -> dict[str, Tensor]:
        """Return the weights and float buffers by global dotted name.

        Args:
            held: Blocks of each chain: block `held[chain][slot]` is in that slot.
            flats: Flat tensors with the present layouts. Default: the weights.

        Returns:
            Views into the flat tensors, not copies.
        """
        if flats is None:
            self.take_back()
            flats = self.flats
        slots = [(chain, slot) for chain, blocks in enumerate(held) for slot in range(len(blocks))]
        parts: list[tuple[int | None, int]] = [(None, 0), *slots]
        return {
            layout.full_name(place, held): layout.view(place, flats[dtype])
            for dtype, layout in self.layouts.items()
            for chain, slot in parts
            for place in (Place(chain, slot, piece) for piece in layout.part(chain).pieces)
        }


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect all parameters and buffers, those of integers too.

    Args:
        model: Any network.

    Returns:
        Tensors by dotted name, tied ones once.
    """
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Collect all parameters and float buffers.

    Args:
        model: Any network.

    Returns:
        Tensors by dotted name, tied ones once.
    """
    return dict(_floats(model))


def _identity(child: Child) -> tuple[int | None, int | None, int]:
    """What a child is, whatever the capacities and positions."""
    if child.chain is None or child.slot is None:
        return child.chain, None, child.index
    return child.chain, child.slot, child.member


def _floats(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if is_float(buffer))
