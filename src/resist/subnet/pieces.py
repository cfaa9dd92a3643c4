"""Pieces: positions of the tensors of one block, or of the shared part, in its piece of a flat tensor."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Parts begin at a multiple of these elements, 64 bytes in float32: matrices at such addresses are read fastest.
ALIGNED = 16


@dataclass(frozen=True)
class Piece:
    """Position of one tensor in its part of the flat tensor.

    Attributes:
        offset: First element, counted from the beginning of the part.
        shape: Shape of the tensor.
        channels_last: Store a tensor (out_channels, in_channels, height, width) with the input channels innermost.
    """

    offset: int
    shape: torch.Size
    channels_last: bool

    def view(self, part: Tensor) -> Tensor:
        """View this piece in its own shape.

        Args:
            part: The part of the flat tensor, 1-D.

        Returns:
            A view of `part`.
        """
        flat = part[self.offset : self.offset + self.shape.numel()]
        if self.channels_last:
            n, c, h, w = self.shape
            return flat.view(n, h, w, c).permute(0, 3, 1, 2)
        return flat.view(self.shape)


class Layout:
    """Order of the tensors of the shared part, or of one block.

    Parameters that train come together, then running statistics and other buffers. So what changes in a round is
    usually one range. Tensors whose size is not a multiple of `ALIGNED` elements come last in their group, and frozen
    parameters come before all, or after all if their size is not one. So all large matrices are aligned without
    padding between them. A block whose size is not such a multiple ends in padding, fewer than `ALIGNED` elements that
    are zero and go with it in every message, so that the next slot is aligned too.

    Args:
        tensors: Parameters and buffers of the part by name, of one dtype.
        channels_last: Store 4-D tensors with the channels innermost.
        padded: End in padding, if necessary.

    Attributes:
        pieces: Position of each tensor by name.
        numel: Elements of the part, with padding.
        padding: Elements of the padding, at the end.
        statistics: Names of the running statistics of norms.
        frozen: Names of the parameters that do not train.
        resting: Names of everything that does not train.
    """

    def __init__(self, tensors: Mapping[str, Tensor], channels_last: bool, *, padded: bool = False) -> None:
        self.pieces: dict[str, Piece] = {}
        self.numel = 0
        groups = {name: _group(name, tensor) for name, tensor in tensors.items()}
        self.statistics = frozenset(name for name, group in groups.items() if group == _STATISTICS)
        self.frozen = frozenset(name for name, group in groups.items() if group == _FROZEN)
        self.resting = tuple(name for name, group in groups.items() if group != _TRAINED)

        def order(name: str) -> tuple[int, bool]:
            odd = tensors[name].numel() % ALIGNED != 0
            return -1 if groups[name] == _FROZEN and not odd else groups[name], odd

        for name in sorted(tensors, key=order):
            shape = tensors[name].shape
            self.pieces[name] = Piece(self.numel, shape, channels_last and len(shape) == 4)
            self.numel += shape.numel()
        self.padding = -self.numel % ALIGNED if padded else 0
        self.numel += self.padding

    @property
    def trained(self) -> tuple[int, int]:
        """(first element, end) of what trains, which is one range."""
        (found,) = self.ranges(frozenset()) or [(0, 0)]
        return found

    @property
    def num_trained(self) -> int:
        """Elements of the parameters that train."""
        start, end = self.trained
        return end - start

    def ranges(self, changing: Set[str], *, trained: bool = True) -> list[tuple[int, int]]:
        """List the ranges that train or change.

        Args:
            changing: Names of the pieces that change besides those that train.
            trained: List what trains, too.

        Returns:
            (first element, end) of each range, ascending, neighbors as one; with the padding behind the last one.
        """
        ranges: list[tuple[int, int]] = []
        resting = set(self.resting) - changing
        for name, piece in self.pieces.items():
            if name not in resting and (trained or name in self.resting) and piece.shape.numel():
                start, end = piece.offset, piece.offset + piece.shape.numel()
                if ranges and start == ranges[-1][1]:
                    start = ranges.pop()[0]
                ranges.append((start, end))
        if ranges and ranges[-1][1] == self.numel - self.padding:
            ranges[-1] = ranges[-1][0], self.numel
        return ranges


# Groups of tensors.
_TRAINED, _STATISTICS, _BUFFER, _FROZEN = range(4)


def _group(name: str, tensor: Tensor) -> int:
    if isinstance(tensor, nn.Parameter):
        return _TRAINED if tensor.requires_grad else _FROZEN
    return _STATISTICS if name.endswith(("running_mean", "running_var")) else _BUFFER
