"""Local transport: one process hosts all workers, and messages are copies in memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from resist.errors import UserError
from resist.sync.averaging import mean_into
from resist.sync.transport import Handle, Move, local_moves


class Done:
    """A handle whose transfer or mean is complete already."""

    def __init__(self, arrived: list[Tensor | None]) -> None:
        self.arrived = arrived

    def finish(self) -> list[Tensor | None]:
        """See `Handle.finish`."""
        return self.arrived


class Local:
    """A transport within one process. Nothing waits, and nothing leaves the process.

    Its means are running ones, so the weights are those of several processes up to rounding.

    Args:
        workers: S, the number of workers; this process hosts all of them.
    """

    num_processes = 1

    def __init__(self, workers: int) -> None:
        self.num_workers = workers
        self.hosted = tuple(range(workers))

    def process_of(self, worker: int) -> int:
        """See `Transport.process_of`."""
        return 0

    @torch.no_grad()
    def transfer(self, moves: Sequence[Move]) -> Handle:
        """See `Transport.transfer`."""
        return Done(local_moves(moves))

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor], traffic_kind: str, scale: float = 1.0) -> Handle:
        """See `Transport.mean`."""
        mean_into(tensors[0], tensors[1:], scale)
        for tensor in tensors[1:]:
            tensor.copy_(tensors[0])
        return Done([])

    def scatter(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """See `Transport.scatter`."""
        return Done(list(torch.split(torch.stack(list(sent)), list(sizes), 1)))

    def gather(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """See `Transport.gather`."""
        return Done([torch.cat(list(sent))])

    def average_gradients(self, model: nn.Module, count: Callable[[int], None]) -> nn.Module:
        """See `Transport.average_gradients`."""
        if self.num_workers > 1:
            raise UserError(
                f"ddp runs one worker in each process, and this one hosts {self.num_workers}; "
                f"start {self.num_workers} processes (`processes={self.num_workers}`, or torchrun)"
            )
        return model

    def all_gather_text(self, text: str) -> list[str]:
        """See `Transport.all_gather_text`."""
        return [text]

    def close(self) -> None:
        """See `Transport.close`."""
