"""The interface between the algorithm and the wire.

Every worker passes the same list of moves in the same order, its own and the others': the schedule is known to all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

# Texts up to this size, 8 bytes less, go round in one message.
PACKET_BYTES = 1024


@dataclass(frozen=True)
class Move:
    """One tensor on its way from worker `source` to worker `target`.

    kind:     what it is booked as: "blocks", "state" or "evaluate".
    outgoing: the tensor to read, where the source is hosted here, else None.
    incoming: the tensor to write, where the target is hosted here. It may be None for a move between two workers of one
              process: the receiver then reads `outgoing` itself.
    """

    kind: str
    source: int
    target: int
    num_bytes: int
    outgoing: Tensor | None = None
    incoming: Tensor | None = None


class Handle(Protocol):
    """An exchange that is under way."""

    def finish(self) -> list[Tensor | None]:
        """Wait for all of it. Returns what arrived, move by move; None where the target is elsewhere."""
        ...


class Transport(Protocol):
    """Carries tensors between workers.

    num_workers: S, which belongs to the algorithm.
    hosted:      the workers that live in this process, ascending.
    num_processes: how many processes share the workers out.
    """

    num_workers: int
    hosted: tuple[int, ...]
    num_processes: int

    def process_of(self, worker: int) -> int:
        """The number of the process that hosts `worker`."""
        ...

    def transfer(self, moves: Sequence[Move]) -> Handle:
        """Begin all moves as one batch. Local ones are done at once."""
        ...

    def mean(self, tensors: Sequence[Tensor], kind: str) -> Handle:
        """Begin to replace `tensors`, one for each hosted worker, by the mean over all workers, in place."""
        ...

    def average_gradients(self, model: nn.Module, count: Callable[[int], None]) -> nn.Module:
        """`model` in a wrapper that averages its gradients over all workers in every backward pass.

        count: called with the bytes of gradients whenever some are averaged.
        """
        ...

    def all_gather_text(self, text: str) -> list[str]:
        """The texts of all processes, in their order. Waits for all of them."""
        ...

    def close(self) -> None: ...


def local_moves(moves: Sequence[Move]) -> list[Tensor | None]:
    """Do those moves whose two ends are here."""
    arrived: list[Tensor | None] = []
    for move in moves:
        if move.outgoing is not None and move.incoming is not None:
            move.incoming.copy_(move.outgoing)
        arrived.append(move.incoming if move.incoming is not None else move.outgoing)
    return arrived


def hosted_workers(workers: int, processes: int) -> list[tuple[int, ...]]:
    """Which workers each process hosts: consecutive ones, as evenly as can be."""
    return [
        tuple(range(process * workers // processes, (process + 1) * workers // processes))
        for process in range(processes)
    ]


def workers_of(process: int, hosted: Sequence[Sequence[int]]) -> str:
    """ "workers 2, 3": those of a process, in words. hosted: what `hosting` gave."""
    return f"worker{'s' if len(hosted[process]) > 1 else ''} {', '.join(map(str, hosted[process]))}"
