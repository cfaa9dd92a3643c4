"""Collectives of encoded bytes over torch.distributed: an all-to-all between workers, and an all-gather.

Each process hosts consecutive workers, perhaps unequally many. So the bytes that a worker sends to the workers of one
process are neighbors, and what a process receives has one row for each worker, in their order. Both are one
`all_to_all_single` with a length for each process, and send exactly the bytes of the pieces.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class ByteCollectives(Protocol):
    """The part of `Distributed` that the handles use."""

    rank: int
    staged: bool

    @property
    def hosted_workers(self) -> Sequence[Sequence[int]]:
        """The workers of each process."""
        ...

    def begin(self, doing: str, action: Any) -> Any:
        """See `Distributed.begin`."""
        ...

    def wait(self, doing: str, work: Any) -> None:
        """See `Distributed.wait`."""
        ...

    def exchange_bytes(self, received: Tensor, sent: Tensor, lengths: Sequence[int], own: Sequence[int]) -> Any:
        """See `Distributed.exchange_bytes`."""
        ...


class PendingBytes:
    """Bytes on their way: the pieces of all workers, in progress.

    Args:
        transport: Connects the processes.
        sent: (sum(sizes),) uint8 of each hosted worker, of which piece p goes to worker p; with `gather` its own piece,
            which goes to all.
        sizes: Bytes of the piece of each worker.
        gather: Send each worker's piece to all.
    """

    def __init__(
        self, transport: ByteCollectives, sent: Sequence[Tensor], sizes: Sequence[int], *, gather: bool
    ) -> None:
        hosted, rank = transport.hosted_workers, transport.rank
        self._transport, self._gather, self._device = transport, gather, sent[0].device
        self._sizes = [sizes[worker] for worker in hosted[rank]]
        lengths = [sum(sizes[worker] for worker in workers) for workers in hosted]  # of the pieces of each process
        if gather:
            rows = [tensor for _ in hosted for tensor in sent]
            outgoing, incoming = [lengths[rank]] * len(hosted), lengths
        else:
            rows = [part for parts in zip(*(torch.split(t, lengths) for t in sent), strict=True) for part in parts]
            outgoing = [len(sent) * length for length in lengths]
            incoming = [len(workers) * lengths[rank] for workers in hosted]
        bytes_out = sent[0] if len(sent) == 1 and not gather else torch.cat(rows)
        # Kept until the messages are complete. gloo sends from CPU memory only.
        self._sent = bytes_out.cpu() if transport.staged else bytes_out
        self._received = self._sent.new_empty(sum(incoming))
        self._work = transport.begin(
            "averaging", lambda: transport.exchange_bytes(self._received, self._sent, incoming, outgoing)
        )

    def finish(self) -> list[Tensor | None]:
        """See `Transport.scatter` and `Transport.gather`."""
        self._transport.wait("averaging the shared part", self._work)
        received = self._received.to(self._device)
        if self._gather:
            return [received]
        rows = received.view(sum(map(len, self._transport.hosted_workers)), sum(self._sizes))
        return list(torch.split(rows, self._sizes, 1))
