"""Transfers and means over torch.distributed in progress: the handles of `resist.sync.distributed`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from resist.sync.averaging import total
from resist.sync.pending_bytes import ByteCollectives, PendingExchange


class Collectives(ByteCollectives, Protocol):
    """The part of `Distributed` that the handles use."""

    num_workers: int
    num_processes: int


class PendingMoves:
    """Point-to-point messages in progress, with the tensors that they use."""

    def __init__(
        self,
        transport: Collectives,
        works: Any,
        arrived: list[Tensor | None],
        operations: Any,
        copies: list[tuple[Tensor, Tensor]],
    ) -> None:
        self._transport, self._works = transport, works
        self._arrived, self._operations, self._copies = arrived, operations, copies

    @torch.no_grad()
    def finish(self) -> list[Tensor | None]:
        for work in self._works:
            self._transport.wait("exchanging blocks", work)
        for wire, final in self._copies:
            final.copy_(wire, non_blocking=True)  # pinned: torch keeps it until the copy is done
        return self._arrived


class PendingMean:
    """All-reduces in progress of the pieces of `wire`, whose sum becomes the mean."""

    def __init__(
        self,
        transport: Collectives,
        works: Sequence[Any],
        pieces: Sequence[Tensor],
        wire: Tensor,
        tensors: Sequence[Tensor],
        divisor: int = 1,
        scale: float = 1.0,
    ) -> None:
        self._transport, self._works, self._pieces = transport, works, pieces
        self._wire, self._tensors, self._divisor, self._scale = wire, tensors, divisor, scale

    @torch.no_grad()
    def finish(self) -> list[Tensor | None]:
        for work, piece in zip(self._works, self._pieces, strict=True):
            self._transport.wait("averaging the shared part", work)
            if self._divisor != 1:
                piece.div_(self._divisor)
            if self._scale != 1.0:
                piece.mul_(self._scale)
        first = self._tensors[0]
        if self._wire is not first:
            first.copy_(self._wire)
        for tensor in self._tensors[1:]:
            tensor.copy_(first)
        return []


class PendingShortMean:
    """The mean of numbers of fewer than 32 bits, in progress.

    Summed in float32, and rounded once.

    Each process sends a piece of its tensor to every other one, which sums the pieces that it gets, rounds their mean,
    and sends it to all: as many bytes as an all-reduce. A process that hosts several workers has to send their sum in
    float32, and then all do.
    """

    def __init__(self, transport: Collectives, tensors: Sequence[Tensor], scale: float) -> None:
        self._transport, self._tensors = transport, tensors
        processes, first = transport.num_processes, tensors[0]
        self._factor = scale / transport.num_workers
        own = first if processes == transport.num_workers else total(tensors)
        self._dtype, size = own.dtype, -(-own.numel() // processes)
        self._pieces = [min(size, max(own.numel() - rank * size, 0)) for rank in range(processes)]
        lengths = [piece * own.element_size() for piece in self._pieces]
        sent = torch.split(own.reshape(-1).view(torch.uint8), lengths)
        self._exchange = PendingExchange(transport, sent, [lengths[transport.rank]] * processes)

    @torch.no_grad()
    def finish(self) -> list[Tensor | None]:
        processes, first = self._transport.num_processes, self._tensors[0]
        rows = self._exchange.finish().view(self._dtype).view(processes, self._pieces[self._transport.rank])
        mean = total(rows.unbind()).mul_(self._factor).to(first.dtype).view(torch.uint8)
        lengths = [piece * first.element_size() for piece in self._pieces]
        gathered = PendingExchange(self._transport, [mean] * processes, lengths).finish()
        means = gathered.view(first.dtype).view(first.shape)
        for tensor in self._tensors:
            tensor.copy_(means)
        return []


def sendable(tensor: Tensor) -> Tensor:
    """Return a view in a dtype that every backend knows."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.view(torch.uint8)
