"""Small images in device memory, augmented and normalized in batches there.

Images are stored as uint8. A worker's batches are a pure function of (seed, worker, step): no data workers, no Python
code per image, and a run that is resumed at step t sees the batches of an uninterrupted one.

Nothing here waits for the device: what is drawn on the host goes there in one asynchronous copy a batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
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
        channels_last: Memory format of the batches: channels innermost, which convolutions compute fastest, or not.
        notes: Lines for the user about files that were left out; always empty here.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    channels_last: bool = True

    notes: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str, *, channels_last: bool | None = None) -> "Images":
        """Return the same images in the memory of `device`.

        Args:
            device: Device of images and batches.
            channels_last: Memory format of the batches; default: as before.
        """
        form = self.channels_last if channels_last is None else channels_last
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), channels_last=form)

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
        return normalize(images, self.mean, self.std, channels_last=self.channels_last)

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
        """Return the batch of a step, on the device of the images. Does not wait for the device.

        Returns:
            Images (batch_size, channels, height, width) float32 and labels (batch_size,) int64.
        """
        data, index = self.data, self.sampler.indices(step)
        shifts = flips = index[:0]
        if self.augment:
            random, num = generator("augment", self.sampler.seed, self.sampler.worker, step), len(index)
            if data.pad:
                shifts = torch.randint(0, 2 * data.pad + 1, (2, num), generator=random, device="cpu")
            if data.flip:
                flips = (torch.rand(num, generator=random, device="cpu") < 0.5).long()
        drawn = send(torch.cat([index, shifts.view(-1), flips]), data.labels.device)
        index, shifts, flips = drawn.split([len(index), shifts.numel(), len(flips)])
        images, labels = data.images[index], data.labels[index]
        images = shift(images, data.pad, shifts.view(2, -1)) if len(shifts) else images
        images = mirror(images, flips) if len(flips) else images
        return data.normalize(images), labels


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. Does not wait for the device.

    Args:
        tensor: A tensor in CPU memory.
        device: A device; where it is the CPU, the result is `tensor`.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], *, channels_last: bool) -> Tensor:
    """Normalize images. Waits for the device only where it has not normalized with these numbers before.

    Args:
        images: (batch, channels, height, width) uint8.
        mean: Mean of each channel, for pixels in 0..1.
        std: Standard deviation of each channel, for pixels in 0..1.
        channels_last: Memory format of the result.

    Returns:
        (batch, channels, height, width) float32.
    """
    center, spread = _moments(mean, std, images.device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, copy=True, memory_format=memory_format).sub_(center).div_(spread)


@lru_cache(maxsize=64)
def _moments(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pixels in 0..255, (1, channels, 1, 1) each, made once for a device."""
    with torch.inference_mode(mode=False):  # they serve training too
        center, spread = (torch.tensor(values, device=device).view(1, -1, 1, 1) * 255 for values in (mean, std))
        return center, spread


def shift(images: Tensor, pad: int, shifts: Tensor) -> Tensor:
    """Take a crop of each image padded with black.

    Args:
        images: (batch, channels, height, width).
        pad: Padding on each side, in pixels.
        shifts: (2, batch) int64: first row and first column of each crop in the padded image, 0 to 2 `pad`.
    """
    num, _, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: each crop by its first row and column
    return windows[torch.arange(num, device=images.device), :, shifts[0], shifts[1]]


def mirror(images: Tensor, flips: Tensor) -> Tensor:
    """Mirror images left to right.

    Args:
        images: (batch, channels, height, width).
        flips: (batch,) int64: 1 for the images to mirror, 0 for others.
    """
    return torch.where(flips[:, None, None, None] > 0, images.flip(3), images)
