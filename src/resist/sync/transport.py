"""Transport: the interface between the algorithm and the network.

All processes pass the same list of moves in the same order, those of other processes included, since every process
computes the same schedule. So a message needs no header, and the two ends of a move find each other by its position.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

# Texts of up to this size, minus 8 bytes for their length, are gathered by one message.
PACKET_BYTES = 1024


@dataclass(frozen=True)
class Move:
    """A tensor to send from worker `source` to worker `target`.

    Attributes:
        traffic_kind: The account on which it is booked: "blocks", "state", "replica" or "evaluate".
        source: The worker that sends.
        target: The worker that receives.
        num_bytes: Size of the tensor in bytes.
        outgoing: The tensor to read if this process hosts the source, else None.
        incoming: The tensor to write if this process hosts the target, else None. It may be None if one process hosts
            both workers: the receiver then reads `outgoing` itself, and nothing is copied.
    """

    traffic_kind: str
    source: int
    target: int
    num_bytes: int
    outgoing: Tensor | None = None
    incoming: Tensor | None = None


class Handle(Protocol):
    """A transfer or a mean in progress."""

    def finish(self) -> list[Tensor | None]:
        """Wait until it is complete.

        Returns:
            The received tensor of each move, or None if another process hosts the target. Empty for a mean.
        """
        ...


class Transport(Protocol):
    """Carries tensors between workers, and texts between processes.

    Attributes:
        num_workers: S, the number of workers of the algorithm.
        hosted: The workers of this process, ascending.
        num_processes: The number of processes that host the workers.
    """

    num_workers: int
    hosted: tuple[int, ...]
    num_processes: int

    def process_of(self, worker: int) -> int:
        """Return the number of the process that hosts a worker.

        Args:
            worker: Number of the worker.

        Returns:
            Number of the process.
        """
        ...

    def transfer(self, moves: Sequence[Move]) -> Handle:
        """Begin all moves as one batch.

        Moves within this process are done at once.

        Args:
            moves: The moves of all processes, the same list in every process.

        Returns:
            A handle. Do not change the outgoing tensors or read the incoming ones before its `finish`.

        Raises:
            WorkerLostError: If another process is lost; also by the handle's `finish`.
        """
        ...

    def mean(self, tensors: Sequence[Tensor], traffic_kind: str, scale: float = 1.0) -> Handle:
        """Begin to replace tensors by their mean over all workers.

        All processes have to call it. The tensors are changed in place. The result has the same bits in all workers.
        Dtypes of fewer than 32 bits are summed in float32 and rounded once.

        Args:
            tensors: One tensor for each hosted worker, of the same shape. Do not read them before the handle's
                `finish`.
            traffic_kind: The account on which it is booked: "shared" or "state".
            scale: Factor of the mean, before it is rounded.

        Returns:
            A handle, whose `finish` returns an empty list.

        Raises:
            WorkerLostError: If another process is lost; also by the handle's `finish`.
        """
        ...

    def scatter(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """Begin to send a piece of each worker's bytes to each worker. All processes have to call it.

        Args:
            sent: (sum(sizes),) uint8 of each hosted worker: the pieces for all workers, in their order. Do not change
                them before the handle's `finish`.
            sizes: Bytes of the piece for each worker.
            traffic_kind: The account on which it is booked: "shared" or "state".

        Returns:
            A handle, whose `finish` returns (num_workers, sizes[worker]) uint8 for each hosted worker: its piece from
            each worker.

        Raises:
            WorkerLostError: If another process is lost; also by the handle's `finish`.
        """
        ...

    def gather(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """Begin to send the bytes of each worker to all workers. All processes have to call it.

        Args:
            sent: (sizes[worker],) uint8 of each hosted worker.
            sizes: Bytes of each worker.
            traffic_kind: The account on which it is booked: "shared" or "state".

        Returns:
            A handle, whose `finish` returns one (sum(sizes),) uint8: the bytes of all workers, in their order.

        Raises:
            WorkerLostError: If another process is lost; also by the handle's `finish`.
        """
        ...

    def average_gradients(self, model: nn.Module, count: Callable[[int], None]) -> nn.Module:
        """Wrap `model` to average its gradients in each backward pass.

        Args:
            model: The network of the only hosted worker.
            count: Called with the number of bytes whenever gradients are averaged.

        Returns:
            The network to train instead of `model`.

        Raises:
            UserError: If a process hosts several workers.
        """
        ...

    def all_gather_text(self, text: str) -> list[str]:
        """Gather the texts of all processes. Waits for all of them.

        Args:
            text: Text of this process.

        Returns:
            The text of each process, in the order of the processes.

        Raises:
            WorkerLostError: If another process is lost.
        """
        ...

    def close(self) -> None:
        """Leave the process group, if there is one."""
        ...


def local_moves(moves: Sequence[Move]) -> list[Tensor | None]:
    """Carry out moves within this process.

    Args:
        moves: Moves whose source and target are hosted by this process.

    Returns:
        The received tensor of each move.
    """
    arrived: list[Tensor | None] = []
    for move in moves:
        if move.outgoing is not None and move.incoming is not None:
            move.incoming.copy_(move.outgoing)
        arrived.append(move.incoming if move.incoming is not None else move.outgoing)
    return arrived


def hosted_workers(workers: int, processes: int) -> list[tuple[int, ...]]:
    """Distribute the workers over processes.

    Args:
        workers: Number of workers.
        processes: Number of processes.

    Returns:
        The workers of each process: consecutive ones, with counts that differ by at most one.
    """
    return [
        tuple(range(process * workers // processes, (process + 1) * workers // processes))
        for process in range(processes)
    ]


def workers_of(process: int, hosted: Sequence[Sequence[int]]) -> str:
    """Describe the workers of a process.

    Args:
        process: The number of the process.
        hosted: The workers of each process, from `hosted_workers`.

    Returns:
        A text such as "workers 2, 3".
    """
    return f"worker{'s' if len(hosted[process]) > 1 else ''} {', '.join(map(str, hosted[process]))}"
