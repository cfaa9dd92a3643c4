"""Small images in device memory, augmented and normalized in batches there.

Images are stored as uint8. A worker's batches are a pure function of (seed, worker, step): no data workers, no Python
code per image, and a run that is resumed at step t sees the batches of an uninterrupted one.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from resist.data.sampler import Sampler, generator
from resist.data.spans import WHOLE, Share, spans


@dataclass(frozen=True)
class Images:
    """Labeled images in memory.

    Attributes:
        images: (num, channels, height, width) uint8.
        labels: (num,) int64.
        num_classes: Number of classes; labels are below it.
        mean: Mean of each channel over the training set, for pixels in 0..1.
        std: Standard deviation of each channel, likewise.
        pad: Largest random shift in training, in pixels.
        flip: Mirror images in training; True where a mirrored image shows the same class.
        notes: Lines for the user about files that were left out; always empty here.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool

    notes: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> "Images":
        """Return the same images in the memory of `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def loader(self, sampler: Sampler) -> "Loader":
        """Return the training batches of one worker; see `Loader`."""
        return Loader(self, sampler)

    def digest(self) -> str:
        """Return a hash of images and labels."""
        key = blake2b(digest_size=8)
        for part in (self.images, self.labels):
            key.update(part.cpu().contiguous().numpy().tobytes())
        return key.hexdigest()

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize uint8 images to float32 with the data set's mean and std."""
        return normalize(images, self.mean, self.std)

    def batches(self, size: int, limit: int | None = None, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the images in order, without augmentation, for evaluation.

        Args:
            size: Images in a batch; the last one may have fewer, or one more, see `spans`.
            limit: Number of batches, at most; default: all.
            share: The part of the batches to iterate over.

        Yields:
            Images (batch, channels, height, width) float32 and labels (batch,) int64.
        """
        for span in share.of(spans(len(self), size)[:limit]):
            yield self.normalize(self.images[span.start : span.stop]), self.labels[span.start : span.stop]


class Loader:
    """Training batches of one worker from images in memory.

    They are a pure function of (seed, worker, step).

    Args:
        data: The images.
        sampler: The images of each batch, and the key of their augmentation.
        augment: Shift and mirror the images at random.
    """

    def __init__(self, data: Images, sampler: Sampler, *, augment: bool = True) -> None:
        self.data, self.sampler, self.augment = data, sampler, augment

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the batch of a step, on the device of the images.

        Returns:
            Images (batch_size, channels, height, width) float32 and labels (batch_size,) int64.
        """
        index = self.sampler.indices(step).to(self.data.labels.device)
        images, labels = self.data.images[index], self.data.labels[index]
        if self.augment:
            random = generator("augment", self.sampler.seed, self.sampler.worker, step)
            images = shift(images, self.data.pad, random) if self.data.pad else images
            images = mirror(images, random) if self.data.flip else images
        return self.data.normalize(images), labels


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Normalize images.

    Args:
        images: (batch, channels, height, width) uint8.
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel, for pixels in 0..1.

    Returns:
        (batch, channels, height, width) float32.
    """
    center = torch.tensor(mean, device=images.device).view(1, -1, 1, 1) * 255
    spread = torch.tensor(std, device=images.device).view(1, -1, 1, 1) * 255
    return (images.float() - center) / spread


def shift(images: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Take a random crop of each image padded with black.

    Args:
        images: (batch, channels, height, width).
        pad: Padding on each side, which is the largest shift, in pixels.
        generator: CPU generator of the shifts.
    """
    num, _, height, width = images.shape
    offsets = torch.randint(0, 2 * pad + 1, (2, num), generator=generator).to(images.device)
    rows = offsets[0][:, None] + torch.arange(height, device=images.device)
    columns = offsets[1][:, None] + torch.arange(width, device=images.device)
    padded = F.pad(images, (pad, pad, pad, pad))
    each = torch.arange(num, device=images.device)
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def mirror(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 0.5."""
    mirrored = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)
