"""Collectives of bytes over torch.distributed: to each process its own, pieces between workers, and an all-gather.

Each process hosts consecutive workers, perhaps unequally many. So the bytes that a worker sends to the workers of one
process are neighbors, and what a process receives has one row for each worker, in their order. All are messages between
two processes, of exactly the bytes of the pieces: gloo takes half as long for them as for its all-to-all.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from resist.sync.staging import stage


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

    def exchange_bytes(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> Any:
        """See `Distributed.exchange_bytes`."""
        ...


class PendingExchange:
    """Bytes from each process to each process, in progress.

    Where gloo has to send from the host, it waits for the device, once.

    Args:
        transport: Connects the processes.
        sent: (bytes,) uint8 for each process, perhaps the same tensor. Not to be changed before `finish`.
        incoming: Bytes from each process.
    """

    def __init__(self, transport: ByteCollectives, sent: Sequence[Tensor], incoming: Sequence[int]) -> None:
        self._transport, self._final = transport, sent[0].new_empty(sum(incoming))
        host = stage(sent, [self._final]) if transport.staged else (sent, [self._final])
        self._sent, (self._received,) = host  # kept until the messages are complete
        received = torch.split(self._received, list(incoming))
        self._works = transport.begin("averaging", lambda: transport.exchange_bytes(received, self._sent))

    def finish(self) -> Tensor:
        """Wait until all bytes have arrived: (sum(incoming),) uint8, in the order of the processes."""
        for work in self._works:
            self._transport.wait("averaging the shared part", work)
        if self._received is not self._final:
            self._final.copy_(self._received, non_blocking=True)  # pinned: torch keeps it until the copy is done
        return self._final


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
        self._workers, self._gather = sum(map(len, hosted)), gather
        self._sizes = [sizes[worker] for worker in hosted[rank]]
        lengths = [sum(sizes[worker] for worker in workers) for workers in hosted]  # of the pieces of each process
        if gather:
            own = sent[0] if len(sent) == 1 else torch.cat(list(sent))
            parts, incoming = [own] * len(hosted), lengths
        else:
            split = zip(*(torch.split(tensor, lengths) for tensor in sent), strict=True)
            parts = [rows[0] if len(sent) == 1 else torch.cat(rows) for rows in split]
            incoming = [len(workers) * lengths[rank] for workers in hosted]
        self._exchange = PendingExchange(transport, parts, incoming)

    def finish(self) -> list[Tensor | None]:
        """See `Transport.scatter` and `Transport.gather`."""
        received = self._exchange.finish()
        if self._gather:
            return [received]
        return list(torch.split(received.view(self._workers, sum(self._sizes)), self._sizes, 1))
