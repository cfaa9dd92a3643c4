"""Layout of a sub-network: positions of its tensors in the flat tensors, one for each dtype.

A flat tensor reads `[chain 0, slot 0 | chain 0, slot 1 | ... | shared]`. So each part begins at a multiple of 16
elements, whatever the number of classes. This file is arithmetic on names, shapes and capacities;
`resist.subnet.network.Subnet` applies it to a model.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from resist.blocks.chain import IN_PLACE, Chain
from resist.subnet.pieces import Layout

Identity = tuple[int | None, int | None, int]  # chain, slot and member of a child; or its index


@dataclass(frozen=True)
class Place:
    """Part that a tensor belongs to, and its piece of that part.

    Attributes:
        chain: Number of the chain; None for the shared part.
        slot: Slot in the chain; 0 for the shared part.
        piece: Key of the tensor in the `Layout.pieces` of its part. `SubnetLayout.full_name` gives the global name.
    """

    chain: int | None
    slot: int
    piece: str

    @property
    def key(self) -> tuple[int | None, str]:
        """(chain, piece), equal for the corresponding tensors of all slots."""
        return self.chain, self.piece


@dataclass(frozen=True)
class Child:
    """One child of a chain's container in a sub-network.

    Attributes:
        key: Name in the sub-network's container.
        full_key: Name of the child of the full network's container that has the same index.
        index: Position in the full network's container, if block i of a chain is in slot i.
        chain: Number of the chain, or None for a child outside the chains.
        slot: Slot in the chain; 0 outside the chains; None for a bypass in the place of a block that is not held.
        member: Number of the child within its block.
    """

    key: str
    full_key: str
    index: int
    chain: int | None
    slot: int | None
    member: int = 0

    @property
    def identity(self) -> Identity:
        """Identity of the child, whatever the capacities and positions."""
        if self.chain is None or self.slot is None:
            return self.chain, None, self.index
        return self.chain, self.slot, self.member


@dataclass(frozen=True)
class SubnetLayout:
    """Layout of a sub-network's tensors of one dtype, with given capacities.

    Attributes:
        chains: Chains of the full network.
        capacities: Number of blocks of each chain in the sub-network.
        renumbered: Containers that name their children by position (`nn.ModuleList`), so that the children behind a
            shortened chain get other names.
        held: Blocks of each chain, for the chains with the form in place. Default: block i is in slot i.
        shared: Layout of the shared part.
        blocks: Layout of one block of each chain.
    """

    chains: tuple[Chain, ...]
    capacities: tuple[int, ...]
    renumbered: frozenset[str]
    held: tuple[tuple[int, ...], ...] = ()
    shared: Layout = field(default_factory=lambda: Layout({}, False))
    blocks: tuple[Layout, ...] = ()

    def with_tensors(self, tensors: Mapping[str, Tensor], channels_last: bool) -> "SubnetLayout":
        """Lay out the tensors of a network with the present capacities.

        Args:
            tensors: Parameters and buffers by dotted name. All slots of a chain are laid out as its slot 0 is.
            channels_last: Store 4-D tensors with the channels innermost.

        Returns:
            The same layout with `shared` and `blocks`.
        """
        places = [(self.place(name), tensor) for name, tensor in tensors.items()]
        blocks = (
            Layout({p.piece: t for p, t in places if (p.chain, p.slot) == (number, 0)}, channels_last, padded=True)
            for number in range(len(self.chains))
        )
        shared = Layout({p.piece: t for p, t in places if p.chain is None}, channels_last)
        return replace(self, shared=shared, blocks=tuple(blocks))

    def with_capacities(self, capacities: Sequence[int]) -> "SubnetLayout":
        """Return the layout of the same network with other capacities.

        Args:
            capacities: Number of blocks of each chain.

        Returns:
            The layout; this one if the capacities are equal.
        """
        if tuple(capacities) == self.capacities:
            return self
        return replace(self, capacities=tuple(capacities), held=())

    @property
    def numel(self) -> int:
        """Elements of the flat tensor."""
        return self._start(None) + self.shared.numel

    @property
    def padding(self) -> int:
        """Elements of the flat tensor that belong to no tensor."""
        return sum(c * block.padding for c, block in zip(self.capacities, self.blocks, strict=True))

    def _start(self, chain: int | None) -> int:
        """First element of a chain, or of the shared part, in the flat tensor."""
        return sum(c * block.numel for c, block in zip(self.capacities[:chain], self.blocks[:chain], strict=True))

    def new_flat(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate a flat tensor with this layout, not initialized but for the padding.

        Args:
            dtype: Its dtype, which may differ from that of the weights.
            device: Its device.

        Returns:
            (numel,).
        """
        flat = torch.empty(self.numel, dtype=dtype, device=device)
        for chain, (capacity, block) in enumerate(zip(self.capacities, self.blocks, strict=True)):
            for slot in range(capacity if block.padding else 0):
                self.slot(chain, slot, flat)[-block.padding :].zero_()
        return flat

    def ranges(
        self, changing: Set[tuple[int | None, str]] = frozenset(), *, blocks: bool, trained: bool = True
    ) -> list[tuple[int, int]]:
        """List the ranges of the flat tensor that train or change.

        Args:
            changing: `Place.key` of what changes besides what trains.
            blocks: List those of all slots too, and not only of the shared part.
            trained: List what trains, too.

        Returns:
            (first element, end) of each range, ascending, neighbors as one.
        """
        parts: list[tuple[int, Layout, int | None]] = []
        for chain, capacity in enumerate(self.capacities if blocks else ()):
            first, block = self._start(chain), self.blocks[chain]
            parts += [(first + slot * block.numel, block, chain) for slot in range(capacity)]
        parts.append((self._start(None), self.shared, None))
        names = {chain: {name for key, name in changing if key == chain} for chain in {chain for _, _, chain in parts}}
        ranges: list[tuple[int, int]] = []
        for first, layout, chain in parts:
            for start, end in layout.ranges(names[chain], trained=trained):
                if ranges and ranges[-1][1] == first + start:
                    start = ranges.pop()[0] - first
                ranges.append((first + start, first + end))
        return ranges

    def part(self, chain: int | None) -> Layout:
        """Return the layout of a block, or of the shared part.

        Args:
            chain: Number of the chain; None for the shared part.

        Returns:
            The layout.
        """
        return self.shared if chain is None else self.blocks[chain]

    def slot(self, chain: int | None, slot: int, flat: Tensor) -> Tensor:
        """Return one slot of a flat tensor, or its shared part.

        Args:
            chain: Number of the chain; None for the shared part.
            slot: Slot in the chain; 0 for the shared part.
            flat: Flat tensor, (numel,), with this layout.

        Returns:
            A view of `flat`, (part(chain).numel,).
        """
        part = self.part(chain)
        start = self._start(chain) + slot * part.numel
        return flat[start : start + part.numel]

    def slots(self, chain: int | None, flat: Tensor) -> Tensor:
        """Return all slots of a chain in a flat tensor, or its shared part.

        Args:
            chain: Number of the chain; None for the shared part.
            flat: Flat tensor, (numel,), with this layout.

        Returns:
            A view of `flat`, (slots, part(chain).numel).
        """
        number, numel, start = (
            1 if chain is None else self.capacities[chain],
            self.part(chain).numel,
            self._start(chain),
        )
        return flat[start : start + number * numel].view(number, numel)

    def view(self, place: Place, flat: Tensor) -> Tensor:
        """Return one tensor in a flat tensor.

        Args:
            place: Place of the tensor.
            flat: Flat tensor, (numel,), with this layout.

        Returns:
            A view of `flat` in the shape of the tensor.
        """
        return self.part(place.chain).pieces[place.piece].view(self.slot(place.chain, place.slot, flat))

    def full_name(self, place: Place, held: Sequence[Sequence[int]]) -> str:
        """Return the dotted name of a tensor in the full network.

        Args:
            place: Place of the tensor.
            held: Blocks of each chain: block `held[chain][slot]` is in that slot.

        Returns:
            The name, `layer3.5.conv1.weight` for example.
        """
        if place.chain is None:
            return place.piece
        return self.chains[place.chain].tensor_name(held[place.chain][place.slot], place.piece)

    @cached_property
    def containers(self) -> tuple[str, ...]:
        """Containers of the chains, an inner one before those around it."""
        return tuple(sorted({chain.container for chain in self.chains}, key=len, reverse=True))

    def children(self, container: str) -> list[Child]:
        """List the children of a chain's container in the sub-network.

        Args:
            container: Dotted name of the container.

        Returns:
            The children, in their order.
        """
        return list(self._children_by_key[container].values())

    def _list_children(self, container: str) -> list[Child]:
        chains = [(number, chain) for number, chain in enumerate(self.chains) if chain.container == container]
        children: list[Child] = []
        for index, full_key in enumerate(chains[0][1].keys):
            key = str(len(children)) if container in self.renumbered else full_key
            number, chain = next((item for item in chains if item[1].first <= index <= item[1].last), (None, None))
            if number is None or chain is None:
                children.append(Child(key, full_key, index, None, 0))
                continue
            block, member = divmod(index - chain.first, chain.period)
            slot = self._slot_of(number, block)
            if slot is not None or chain.form == IN_PLACE:
                children.append(Child(key, full_key, index, number, slot, member))
        return children

    def _slot_of(self, chain: int, block: int) -> int | None:
        """The slot at the position of a block, if there is one."""
        if self.held and self.chains[chain].form == IN_PLACE:
            return self.held[chain].index(block) if block in self.held[chain] else None
        return block if block < self.capacities[chain] else None

    @cached_property
    def _children_by_key(self) -> dict[str, dict[str, Child]]:
        return {
            container: {child.key: child for child in self._list_children(container)} for container in self.containers
        }

    @cached_property
    def _places(self) -> dict[str, Place]:
        """Places that were found, by name: all workers with equal capacities have one layout."""
        return {}

    def place(self, name: str) -> Place:
        """Find the place of a tensor.

        Args:
            name: Dotted name of the tensor in the sub-network.

        Returns:
            The place.
        """
        if name not in self._places:
            self._places[name] = self._find(name)
        return self._places[name]

    def _find(self, name: str) -> Place:
        for container in self.containers:
            prefix = f"{container}." if container else ""
            if not name.startswith(prefix):
                continue
            key, _, inner = name.removeprefix(prefix).partition(".")
            child = self._children_by_key[container].get(key)
            if child is None:  # a parameter of the container itself
                continue
            if child.chain is None or child.slot is None:
                return Place(None, 0, f"{prefix}{child.full_key}.{inner}")
            return Place(child.chain, child.slot, self.chains[child.chain].piece(child.member, inner))
        return Place(None, 0, name)
