"""Small images that live on the device as uint8. Crop, flip and normalization are batched tensor operations there.

A worker's batches are a pure function of (seed, worker, step): no data workers, no Python per image, and a run that
goes on at step t sees what an undisturbed one would see.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from resist.data.sampler import Order, generator


@dataclass(frozen=True)
class Images:
    """images: (num, channels, height, width) uint8; labels: (num,) int64; num_classes: labels are below it.
    mean, std: per channel, of pixels in 0..1. pad: pixels of random shift in training. flip: whether a mirrored image
    shows the same class."""

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    notes: ClassVar[tuple[str, ...]] = ()  # files are whole or refused

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Images":
        return Images(
            self.images.to(device), self.labels.to(device), self.num_classes, self.mean, self.std, self.pad, self.flip
        )

    def loader(self, *, batch_size: int, seed: int, worker: int, workers: int, sampling: str = "all") -> "Loader":
        """The training batches of one worker."""
        return Loader(self, batch_size=batch_size, seed=seed, worker=worker, workers=workers, sampling=sampling)

    def digest(self) -> str:
        """A short text that differs where images or labels do."""
        key = blake2b(digest_size=8)
        for part in (self.images, self.labels):
            key.update(part.cpu().contiguous().numpy().tobytes())
        return key.hexdigest()

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (batch, channels, height, width) -> float32 of mean 0 and deviation 1 over the training set."""
        return normalize(images, self.mean, self.std)

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images in order, not augmented, `size` at a time, for evaluation; `limit` batches at most."""
        for start in range(0, len(self) if limit is None else min(len(self), limit * size), size):
            yield self.normalize(self.images[start : start + size]), self.labels[start : start + size]


class Loader:
    """Training batches of one worker, in the order that `Order` says."""

    def __init__(
        self,
        data: Images,
        *,
        batch_size: int,
        seed: int,
        worker: int,
        workers: int,
        sampling: str = "all",
        augment: bool = True,
    ) -> None:
        self.data, self.seed, self.worker, self.augment = data, seed, worker, augment
        self.order = Order(
            len(data), batch_size=batch_size, seed=seed, worker=worker, workers=workers, sampling=sampling
        )

    @property
    def images_per_epoch(self) -> int:
        return self.order.images_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch_size, channels, height, width) float32 and labels (batch_size,) of this step, on the device."""
        index = self.order.indices(step).to(self.data.labels.device)
        images, labels = self.data.images[index], self.data.labels[index]
        if self.augment:
            chance = generator("augment", self.seed, self.worker, step)
            images = shift(images, self.data.pad, chance) if self.data.pad else images
            images = mirror(images, chance) if self.data.flip else images
        return self.data.normalize(images), labels


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (batch, channels, height, width) -> float32; mean and std: of each channel, of pixels in 0..1."""
    middle = torch.tensor(mean, device=images.device).view(1, -1, 1, 1) * 255
    spread = torch.tensor(std, device=images.device).view(1, -1, 1, 1) * 255
    return (images.float() - middle) / spread


def shift(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Move every image by up to `pad` pixels each way, filling with black: a random crop of the padded image."""
    num, _, height, width = images.shape
    by = torch.randint(0, 2 * pad + 1, (2, num), generator=generator).to(images.device)
    rows = by[0][:, None] + torch.arange(height, device=images.device)
    columns = by[1][:, None] + torch.arange(width, device=images.device)
    padded = F.pad(images, (pad, pad, pad, pad))
    each = torch.arange(num, device=images.device)
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror every other image, on the average, left to right."""
    which = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(which[:, None, None, None], images.flip(3), images)
