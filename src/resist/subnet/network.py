"""Sub-networks: shallow models whose weights are in one flat tensor for each dtype.

A sub-network is the same model with only `capacity` blocks in each chain. Every parameter and float buffer is a view
into the flat tensor of its dtype, `[chain 0, slot 0 | chain 0, slot 1 | ... | shared]`. So the shared part is averaged
in one collective, a block is one message, and nothing is packed or copied. A plan only decides whose weights are in
which slot: modules, parameters and the optimizer's references stay the same from round to round. Most networks have one
dtype, and so one flat tensor.

The full network is a sub-network with every block in its slots, so it is built and filled in the same way.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from resist.blocks.chain import IN_PLACE, Chain
from resist.blocks.modules import buffers_of, children_of, is_float, named_modules
from resist.blocks.placement import Placement
from resist.errors import UserError
from resist.subnet.buffers import Buffer, loose, put_loose, take_back
from resist.subnet.common import common_buffers, common_modules
from resist.subnet.flats import Flats, FlatTensors, PlaceKey, laid_out
from resist.subnet.layout import Child, Identity, Place, SubnetLayout
from resist.subnet.modes import frozen_modules
from resist.subnet.python_state import PYTHON, PythonState
from resist.subnet.skeleton import next_hook, skeleton
from resist.subnet.structure import Structure
from resist.subnet.tensors import tensors_of

# Begins the names of buffers that several parts of the network use, and that are loose ones of the shared part.
COMMON = "common "


class Placed(NamedTuple):
    """A parameter of a sub-network.

    Attributes:
        name: Its dotted name in the sub-network.
        parameter: The parameter.
        place: Its place.
        view: The view into the flat tensor of its dtype; None if it has no place there.
    """

    name: str
    parameter: nn.Parameter
    place: Place
    view: Tensor | None


class Subnet(FlatTensors):
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
        channels_last: As above.
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
        self.channels_last = channels_last
        present = tuple(template_capacities or (chain.num_blocks for chain in chains))
        lists = frozenset(c.container for c in chains if isinstance(template.get_submodule(c.container), nn.ModuleList))
        # Only the template of a sub-network is renumbered already.
        layout = SubnetLayout(
            tuple(chains),
            present,
            renumbered=lists if template_capacities else frozenset(),
            held=like.layout.held if like is not None and template_capacities else (),
        )
        if like is None:
            self.hooks_before = next_hook()
            self._common: dict[PlaceKey, Tensor] = common_buffers(template, layout, torch.device(device))
            self._common_modules = common_modules(template, layout)
            layouts = laid_out(template, layout, loose=self._common, channels_last=channels_last)
            layouts = {dtype: replace(own, renumbered=lists) for dtype, own in layouts.items()}
        else:
            self.hooks_before = like.hooks_before
            copies = {id(common): common.clone() for common in like._common.values()}
            self._common = {key: copies[id(common)] for key, common in like._common.items()}
            self._common_modules = like._common_modules
            layouts = {dtype: own.with_capacities(present) for dtype, own in like.layouts.items()}
        super().__init__(layouts, torch.device(device))
        self.held: tuple[tuple[int, ...], ...] = tuple(tuple(range(capacity)) for capacity in capacities)
        self.changing: set[PlaceKey] = set() if like is None else set(like.changing)
        self.buffers: dict[Place, Buffer] = {}
        self._registered: frozenset[PlaceKey] | None = None if like is None else like._registered
        self._placement, self._bypasses = Placement(), dict[object, nn.Module]()
        self._structure: Structure | None = None
        self._placed: list[Placed] = []
        self.model = self._copier(template, layout, _left_out(template, layout, capacities))(template)
        self.resize(capacities, self.empty(capacities))
        if self._registered is None:
            self._registered = frozenset(place.key for place in self.buffers)
        first = [self.block(chain, 0) for chain in range(len(self.chains))] if like is None else []
        self._python = PythonState(self.chains, first) if like is None else like._python
        self.frozen_modules: set[PlaceKey] = set() if like is None else like.frozen_modules
        if like is None and self.model.training:
            self.frozen_modules = frozen_modules(self.model, self.place)
        self.has_loose = bool(self.loose()) if like is None else like.has_loose

    def _copier(self, network: nn.Module, layout: SubnetLayout, instead: Mapping[int, object]) -> partial[nn.Module]:
        """Return a function that copies a network with the given layout, or a module in it, without weights."""
        common, kept = dict[int, object](), set[int]()
        for name, buffer in network.named_buffers():
            place = layout.place(name)
            like = self._common.get(place.key)
            if like is not None and (like.shape, like.dtype) == (buffer.shape, buffer.dtype):
                common[id(buffer)] = like
            elif is_float(buffer) and not self.fits(place, buffer):
                kept.add(id(buffer))
        options = {"device": self.device, "keep": kept, "hooks_before": self.hooks_before, "root": network}
        return partial(skeleton, instead={**instead, **common}, **options)

    def parameter_places(self) -> Iterator[tuple[nn.Parameter, Place]]:
        """Iterate over the parameters of `model` with their places.

        Yields:
            Each parameter and its place, in the model's order.
        """
        self.refresh()
        return ((parameter, place) for _, parameter, place, _ in self._placed)

    @property
    def placed(self) -> Sequence[Placed]:
        """The parameters of `model`, in its order, with their places and views, as of the last `refresh`."""
        return self._placed

    def refresh(self) -> None:
        """Find the parameters and buffers that were replaced, added or removed.

        `take_back`, `check_attached`, `loose` and `parameter_places` do so.
        """
        if self._structure is None or not self._structure.stays():
            self._structure = Structure(self.model)
            self._placed = [self._with_view(*named) for named in self.model.named_parameters()]
            self._note_late_buffers()

    def _with_view(self, name: str, parameter: nn.Parameter) -> Placed:
        place = self.place(name)
        return Placed(name, parameter, place, self.view(place, self.flats) if self.has(place) else None)

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
        """Put the children of the chains' containers where `layouts` have them. New blocks have no memory yet."""
        self._structure = None
        layout = next(iter(layouts.values()))
        copied = self._copier(self.model, self.layout, self._common_parts)
        for container in layout.containers:
            children = children_of(self.model.get_submodule(container))
            old = zip(self.layout.children(container), children.values(), strict=True)
            present = {child.identity: module for child, module in old}
            wanted = {child.key: self._child(child, present, copied) for child in layout.children(container)}
            # Replace the children in place. Their keys follow each other as in the full network, or by position.
            children.clear()
            children.update(wanted)
        self.layouts = layouts

    def _child(
        self, child: Child, present: Mapping[Identity, nn.Module | None], copied: Callable[[nn.Module], nn.Module]
    ) -> nn.Module | None:
        """Return a child that remains, a bypass, or a new block with the structure of that in slot 0."""
        if child.chain is not None and child.slot is None:
            # The same one each time, so that compiled code of a plan that was seen before fits again.
            if child.identity not in self._bypasses:
                self._bypasses[child.identity] = copy.deepcopy(self.chains[child.chain].bypass(child.index))
            return self._bypasses[child.identity]
        if child.chain is None or child.identity in present:
            return present[child.identity]
        first = present[child.chain, 0, child.member]
        assert first is not None, "blocks are modules"
        return copied(first)

    @property
    def _common_parts(self) -> dict[int, object]:
        """The modules that several parts of the network use, and their tensors, each by its own id."""
        modules = [m for name, m in named_modules(self.model) if self.place(name).key in self._common_modules]
        tensors = (t for m in modules for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))
        return {id(part): part for part in (*modules, *tensors)}

    def _attach(self) -> None:
        """Make every parameter and float buffer a view into the flat tensor of its dtype.

        The tensors keep their identity, for optimizers and whatever else refers to them: only their `.data` changes,
        which leaves each a version counter of its own. With a common counter, a forward pass that writes to a buffer
        would look to autograd as if it had overwritten the weights.
        """
        self._structure = None
        for parameter, place in self.parameter_places():
            parameter.data = self.view(place, self.flats)
        before, self.buffers = self.buffers, {}
        tied: dict[int, Tensor | None] = {}  # views by id of the buffer, None for common ones
        for prefix, module in named_modules(self.model):
            own = buffers_of(module)
            for key, now in own.items():
                place = self.place(f"{prefix}.{key}".lstrip("."))
                if now is not None and (common := self._common.get(place.key)) is not None:
                    # One tensor for all blocks, outside of the flat tensors: a loose one of the shared part.
                    if now is not common and (now.shape, now.dtype) == (common.shape, common.dtype):
                        own[key] = common.copy_(now.detach())
                    if id(common) not in tied:
                        tied[id(common)], place = None, Place(None, 0, f"{COMMON}{place.chain}.{place.piece}")
                        self.buffers[place] = Buffer(module, key, place, None)
                    continue
                # Statistics are averaged and sent with their block, so they are in a flat tensor too. Loose buffers
                # stay with the module.
                view = None if now is None else tied.get(id(now))
                if view is None and self.has(place):
                    view = before[place].view if place in before else now
                    if view is None or not self.fits(place, view):
                        view = self.view(place, self.flats).data
                    view.data = self.view(place, self.flats)
                self.buffers[place] = Buffer(module, key, place, view, late=self._is_late(place))
                if view is not None and now is not None and (view.shape, view.dtype) == (now.shape, now.dtype):
                    own[key] = tied[id(now)] = view

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
        tensors, values = tensors_of(self.model), tensors_of(model)
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in values.items()}:
            raise ValueError("the two networks have different tensors")
        twin = copy.copy(self)
        twin.model, twin.flats, twin.buffers = model, self.empty(self.capacities), {}
        twin._placement, twin._bypasses = Placement(), {}
        buffers = ((self.place(name).key, b) for name, b in model.named_buffers(remove_duplicate=False))
        twin._common = {key: buffer for key, buffer in buffers if key in self._common}
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
        self.refresh()
        take_back(self.buffers)
        with torch.no_grad():
            for _, parameter, _, view in self._placed:
                if view is not None and view.data_ptr() != parameter.data_ptr() and _form(view) == _form(parameter):
                    view.copy_(parameter)
                    parameter.data = view.data

    def loose(self) -> dict[tuple[int | None, int], dict[str, Tensor]]:
        """Collect what goes with the blocks and is not in the flat tensors.

        These are buffers of integers, float buffers that were not finite in the beginning, and those that have another
        shape or dtype than in the beginning, or were registered later. The count of a BatchNorm with a momentum is
        without effect, and left out. Attributes that a block has changed are one tensor of bytes, `PYTHON`.

        Returns:
            (chain, slot), or (None, 0) for the shared part -> name in the part -> the present tensor, not a copy.
        """
        self.refresh()
        found = loose(self.buffers)
        for chain, blocks in enumerate(self.held):
            for slot, number in enumerate(blocks):
                packed = self._python.pack(self.block(chain, slot), chain, number)
                if packed is not None:
                    found.setdefault((chain, slot), {})[PYTHON] = packed
        return found

    def _note_late_buffers(self) -> None:
        """Add the buffers that were registered since the last time."""
        for prefix, module in named_modules(self.model):
            for key in buffers_of(module).keys():  # noqa: SIM118, of a scripted module too
                place = self.place(f"{prefix}.{key}".lstrip("."))
                if place not in self.buffers and self._is_late(place):
                    self.buffers[place] = Buffer(module, key, place, None, late=True)

    def put_loose(self, chain: int | None, slot: int, values: Mapping[str, Tensor]) -> None:
        """Give a part the loose buffers of the block whose weights are now in it.

        Buffers that are not in `values` return to the flat tensors, or stay as they are if they have no place there.

        Args:
            chain: Number of the chain; None for the shared part.
            slot: Slot in the chain; 0 for the shared part.
            values: All loose buffers of the block, as `loose` names them. They are copied.
        """
        buffers = {name: value for name, value in values.items() if name != PYTHON}
        part = self.model if chain is None else self.block(chain, slot)
        for name in buffers:
            if (place := Place(chain, slot, name)) not in self.buffers and self._is_late(place):
                module, _, key = name.rpartition(".")
                self.buffers[place] = Buffer(part.get_submodule(module), key, place, None, late=True)
        put_loose(self.buffers, (chain, slot), buffers)
        if chain is not None:
            self._python.put(part, chain, self.held[chain][slot], values.get(PYTHON))

    def _is_late(self, place: Place) -> bool:
        """True for a buffer that was not registered when the network was built."""
        return self._registered is not None and place.key not in self._registered and place.key not in self._common

    def check_attached(self) -> None:
        """Check that every parameter is still a view into the flat tensor of its dtype.

        Raises:
            UserError: If one is not: `model.to(...)`, `model.half()` and the like move the parameters.
        """
        self.refresh()
        for name, parameter, _, view in self._placed:
            if view is None or parameter.data_ptr() != view.data_ptr():
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


def _left_out(template: nn.Module, layout: SubnetLayout, capacities: Sequence[int]) -> dict[int, object]:
    """Stand-ins for the blocks without a slot, so that work and memory follow the sub-network, not the full one."""
    left_out: dict[int, object] = {}
    for container in layout.containers:
        children = children_of(template.get_submodule(container)).values()
        for child, module in zip(layout.children(container), children, strict=True):
            if child.chain is not None and child.slot is not None and child.slot >= capacities[child.chain]:
                left_out[id(module)] = nn.Identity()
    return left_out
