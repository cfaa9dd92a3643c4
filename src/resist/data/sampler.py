"""Which images a worker takes at each step: a pure function of (seed, worker, step)."""

import torch
from torch import Tensor

from resist.errors import UserError
from resist.planning.plan import keyed_int

SAMPLINGS = ("all", "shard")


class Order:
    """The images of one worker, in a new random order each epoch.

    All batches have `batch_size` images: the one at the end of an epoch is filled from the next, so every image comes
    exactly once an epoch and no shape changes.

    num:      images of the data set.
    sampling: "all": the whole set, each worker in an order of its own; "shard": a part of the set, the same in every
              epoch, that no other worker sees. An epoch is one pass through what the worker draws from.
    """

    def __init__(
        self, num: int, *, batch_size: int, seed: int, worker: int, workers: int, sampling: str = "all"
    ) -> None:
        if sampling not in SAMPLINGS:
            raise UserError(f"sampling={sampling!r} is not one of {', '.join(SAMPLINGS)}")
        self.batch_size, self.seed, self.worker = batch_size, seed, worker
        self.own = torch.arange(num)
        if sampling == "shard":
            self.own = torch.randperm(num, generator=generator("shard", seed))[worker::workers]
        if batch_size < 1 or batch_size > len(self.own):
            raise UserError(
                f"batch_size={batch_size} is outside 1 to {len(self.own)}, the images that a worker draws from"
            )
        self._orders: dict[int, Tensor] = {}

    @property
    def images_per_epoch(self) -> int:
        return len(self.own)

    def indices(self, step: int) -> Tensor:
        """Which images this step takes. (batch_size,) int64 on the host."""
        num, start, end = len(self.own), step * self.batch_size, (step + 1) * self.batch_size
        epochs = range(start // num, (end - 1) // num + 1)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in epochs}
        return torch.cat([self._orders[e][max(start - e * num, 0) : end - e * num] for e in epochs])

    def _order(self, epoch: int) -> Tensor:
        return self.own[torch.randperm(len(self.own), generator=generator("order", self.seed, self.worker, epoch))]


def generator(*key: object) -> torch.Generator:
    """A generator of the host that depends on `key` alone."""
    return torch.Generator().manual_seed(keyed_int(*key))
