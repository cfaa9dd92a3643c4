"""Flat tensors: one for each dtype of a network, with the position of each of its tensors."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from resist.blocks.chain import Chain
from resist.errors import UserError
from resist.planning.wire import FP32, part_bytes
from resist.subnet.layout import Place, SubnetLayout
from resist.subnet.tensors import tensors_of

# One flat tensor for each dtype of the weights, which is the key. The tensors of an optimizer state have the layouts of
# the weights, and may have another dtype.
Flats = dict[torch.dtype, Tensor]
PlaceKey = tuple[int | None, str]  # see `Place.key`


def laid_out(
    template: nn.Module, layout: SubnetLayout, *, loose: Mapping[PlaceKey, Tensor], channels_last: bool
) -> dict[torch.dtype, SubnetLayout]:
    """Lay out the tensors of a network.

    Float buffers that are not finite in the beginning get no position in any block of their chain.

    Args:
        template: The network, which may be on the meta device.
        layout: Layout with its capacities, which names places.
        loose: Tensors that get no position, by `Place.key`.
        channels_last: Store 4-D tensors with the channels innermost.

    Returns:
        The layouts by dtype.

    Raises:
        UserError: If nothing gets a position.
    """
    tensors = {name: tensor for name, tensor in tensors_of(template).items() if layout.place(name).key not in loose}
    infinite = {
        layout.place(name).key
        for name, tensor in tensors.items()
        if not isinstance(tensor, nn.Parameter) and not tensor.is_meta and not _is_finite(tensor)
    }
    tensors = {name: tensor for name, tensor in tensors.items() if layout.place(name).key not in infinite}
    if not tensors:
        raise UserError("the model has no parameters; there is nothing to train")
    return {
        dtype: layout.with_tensors({n: t for n, t in tensors.items() if t.dtype == dtype}, channels_last)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values())
    }


def _is_finite(tensor: Tensor) -> bool:
    short = tensor.is_floating_point() and tensor.element_size() == 1  # torch does not look for NaN in float8
    return bool((tensor.float() if short else tensor).isfinite().all())


class FlatTensors:
    """The flat tensors of a sub-network.

    Args:
        layouts: Position of each tensor in the flat tensor of its dtype.
        device: Device of the flat tensors.

    Attributes:
        layouts: As above, with the present capacities.
        device: As above.
        flats: The flat tensors by dtype, (numel,) each.
    """

    def __init__(self, layouts: dict[torch.dtype, SubnetLayout], device: torch.device) -> None:
        self.layouts, self.device = layouts, device
        self.flats: Flats = {}
        self._dtype_of = {
            (chain, piece): dtype
            for dtype, layout in layouts.items()
            for chain in (None, *range(len(layout.chains)))
            for piece in layout.part(chain).pieces
        }

    @property
    def layout(self) -> SubnetLayout:
        """Layout of one dtype, for what does not depend on the dtype: names, places and children."""
        return next(iter(self.layouts.values()))

    @property
    def chains(self) -> tuple[Chain, ...]:
        """Chains of the full network."""
        return self.layout.chains

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
        """Count the elements of all weights and float buffers, without padding.

        Args:
            capacities: Number of blocks of each chain.

        Returns:
            Number of elements.
        """
        layouts = [layout.with_capacities(capacities) for layout in self.layouts.values()]
        return sum(layout.numel - layout.padding for layout in layouts)

    def num_bytes(self, capacities: Sequence[int], format: str = FP32) -> int:
        """Count the bytes of all flat tensors.

        Args:
            capacities: Number of blocks of each chain.
            format: Wire format of what trains in single precision.

        Returns:
            Number of bytes.
        """
        total = 0
        for dtype, layout in self.layouts.items():
            own = layout.with_capacities(capacities)
            trained = own.shared.num_trained
            trained += sum(c * block.num_trained for c, block in zip(own.capacities, own.blocks, strict=True))
            encoded = format if dtype == torch.float32 else FP32
            total += part_bytes(encoded, own.numel, trained, dtype.itemsize)
        return total

    def empty(self, capacities: Sequence[int]) -> Flats:
        """Allocate flat tensors, not initialized but for the padding, which is zero.

        Args:
            capacities: Number of blocks of each chain.

        Returns:
            The tensors by dtype.
        """
        return {
            dtype: layout.with_capacities(capacities).new_flat(dtype, self.device)
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
            name: Dotted name of the tensor in the sub-network.

        Returns:
            The place.
        """
        return self.layout.place(name)

    def dtype_of(self, place: Place) -> torch.dtype:
        """Return the dtype of the weights at a place, which is the key of their flat tensor."""
        return self._dtype_of[place.key]

    def has(self, place: Place) -> bool:
        """Return True if there is a tensor of this place in the flat tensors."""
        return place.key in self._dtype_of

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

    def fits(self, place: Place, tensor: Tensor) -> bool:
        """Check a tensor against its position.

        Args:
            place: Place of the tensor.
            tensor: The present tensor.

        Returns:
            True if there is a position of its shape and dtype.
        """
        dtype = self._dtype_of.get(place.key)
        if dtype is None or dtype != tensor.dtype:
            return False
        return self.layouts[dtype].part(place.chain).pieces[place.piece].shape == tensor.shape
