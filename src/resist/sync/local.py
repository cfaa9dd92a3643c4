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


class Unconnected:
    """The transport of a process that joins a job: `Job.regroup` gives it the one that it needs.

    Args:
        strategy_workers: S, the number of workers of the strategy as it is given to all processes.
        hosted: Number of workers of this process.

    Raises:
        UserError: If this process would host no worker, or more than all.
    """

    num_processes = 1

    def __init__(self, strategy_workers: int, hosted: int = 1) -> None:
        if not 1 <= hosted <= strategy_workers:
            raise UserError(
                f"hosted={hosted} is outside 1 to {strategy_workers}, the workers of the strategy; change it"
            )
        self.num_workers, self.hosted = strategy_workers, tuple(range(hosted))

    def process_of(self, worker: int) -> int:
        """See `Transport.process_of`."""
        return 0

    def all_gather_text(self, text: str) -> list[str]:
        """See `Transport.all_gather_text`."""
        return [text]

    def close(self) -> None:
        """See `Transport.close`."""

    def transfer(self, moves: Sequence[Move]) -> Handle:
        """Refuse: there is nobody yet."""
        raise _not_joined()

    def mean(self, tensors: Sequence[Tensor], traffic_kind: str, scale: float = 1.0) -> Handle:
        """Refuse: there is nobody yet."""
        raise _not_joined()

    def scatter(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """Refuse: there is nobody yet."""
        raise _not_joined()

    def gather(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """Refuse: there is nobody yet."""
        raise _not_joined()

    def average_gradients(self, model: nn.Module, count: Callable[[int], None]) -> nn.Module:
        """Refuse: there is nobody yet."""
        raise _not_joined()


def _not_joined() -> UserError:
    return UserError("this process joins a job that runs; call job.regroup with the others before training")


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
