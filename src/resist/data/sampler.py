"""Sampler: the images of a worker's batches, a pure function of (seed, worker, step)."""

import torch
from torch import Tensor

from resist.errors import UserError
from resist.planning.plan import keyed_int

SAMPLINGS = ("all", "shard")


class Sampler:
    """Images of one worker, in a new random order each epoch.

    It also has the key of all other random draws for a batch: loaders augment images by (seed, worker, step).

    All batches have `batch_size` images: the last one of an epoch is filled from the next epoch, so that every image
    comes exactly once in an epoch and shapes do not change.

    Args:
        num: Number of images in the data set.
        batch_size: Images in a batch.
        seed: Seed of the run, the same for all workers.
        worker: Number of the worker. Any integer that is not a worker's number, such as -1, gives batches that are
            independent of all workers'.
        workers: Number of workers.
        sampling: "all": every worker draws from the whole set, each in its own order. "shard": a worker draws from a
            part of the set that is the same in every epoch and that no other worker sees. An epoch is one pass
            through the images that the worker draws from.

    Attributes:
        batch_size: Images in a batch.
        seed: Seed of the run.
        worker: Number of the worker.
        pool: (images_per_epoch,) int64: indices of the images that the worker draws from.

    Raises:
        UserError: `sampling` is unknown, or `batch_size` exceeds the images that the worker draws from.
    """

    def __init__(
        self, num: int, *, batch_size: int, seed: int, worker: int, workers: int, sampling: str = "all"
    ) -> None:
        if sampling not in SAMPLINGS:
            raise UserError(f"`sampling={sampling!r}` is not one of {', '.join(SAMPLINGS)}")
        self.batch_size, self.seed, self.worker = batch_size, seed, worker
        self.pool = torch.arange(num, device="cpu")
        if sampling == "shard":
            self.pool = torch.randperm(num, generator=generator("shard", seed), device="cpu")[worker::workers]
        if batch_size < 1 or batch_size > len(self.pool):
            raise UserError(
                f"`batch_size={batch_size}` is outside 1 to {len(self.pool)}, the images that a worker draws from"
            )
        self._orders: dict[int, Tensor] = {}

    @property
    def images_per_epoch(self) -> int:
        """Images in one pass through the images that the worker draws from."""
        return len(self.pool)

    def indices(self, step: int) -> Tensor:
        """Return the indices of a step's images, (batch_size,) int64 on the CPU."""
        num, start, end = len(self.pool), step * self.batch_size, (step + 1) * self.batch_size
        epochs = range(start // num, (end - 1) // num + 1)
        self._orders = {epoch: self._orders[epoch] if epoch in self._orders else self._order(epoch) for epoch in epochs}
        return torch.cat([self._orders[e][max(start - e * num, 0) : end - e * num] for e in epochs])

    def _order(self, epoch: int) -> Tensor:
        random = generator("order", self.seed, self.worker, epoch)
        return self.pool[torch.randperm(len(self.pool), generator=random, device="cpu")]


def generator(*key: object) -> torch.Generator:
    """Return a CPU generator that is seeded with a hash of `key`."""
    return torch.Generator().manual_seed(keyed_int(*key))
