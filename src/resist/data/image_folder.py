"""Photographs in one folder for each class: the data sets "folder" and "imagenet".

    DIR/train/CLASS/*    DIR/val/CLASS/*        see `resist.data.listing`

Training: a random crop (8 to 100 % of the area), resized, and mirrored with probability 0.5; then RandAugment, if it is
given. Testing: the shorter side resized to 8/7 of the image size, then a center crop. Images are transferred as
bytes; the device normalizes batches.
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from resist.data.in_memory import normalize
from resist.data.listing import Listing, class_names, list_split
from resist.data.loader import Stream, in_order, seeded
from resist.data.sampler import Sampler
from resist.errors import UserError, first_line

if TYPE_CHECKING:  # its import takes seconds, which only users of photographs should wait for
    from torchvision.transforms import v2

logger = logging.getLogger(__name__)

# Mean and standard deviation of each channel over ImageNet, for pixels in 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Photographs:
    """Labeled photographs in files.

    Attributes:
        listing: The files and their labels.
        num_classes: Number of classes; labels are below it.
        size: Height and width in pixels of the images in a batch.
        data_workers: Processes that read for each stream of batches; 0: this process reads.
        device: Device of the batches.
        rand_augment: Number of operations and magnitude of RandAugment in training; None: without it.
    """

    listing: Listing
    num_classes: int
    size: int = IMAGE_SIZE
    data_workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rand_augment: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.listing)

    def to(self, device: torch.device | str) -> "Photographs":
        """Return the same photographs with batches on `device`."""
        return replace(self, device=torch.device(device))

    def loader(self, sampler: Sampler) -> "PhotographLoader":
        """Return the augmented training batches of one worker.

        Batches are a pure function of (seed, worker, step): a loader that starts at step t, also in another process or
        with another number of `data_workers`, returns the batches of an uninterrupted one. The sampler's seed and
        worker, the step, and the position in the batch decide the augmentation of each image.
        """
        stream = Stream(
            Reader(self.listing, augmentation(self.size, self.rand_augment)),
            sampler,
            num_data_workers=self.data_workers,
            pin_memory=self._pinned,
        )
        return PhotographLoader(self, stream)

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the images in order, without augmentation, for evaluation.

        Args:
            size: Images in a batch; the last one may have fewer.
            limit: Number of batches, at most; default: all.

        Yields:
            Images (batch, 3, size, size) float32 and labels (batch,) int64, on the device.
        """
        reader = Reader(self.listing, middle(self.size))
        for batch in in_order(reader, size, num_data_workers=self.data_workers, pin_memory=self._pinned, limit=limit):
            yield self.on_device(batch)

    def on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Move images (uint8) and labels to the device; normalize the images."""
        images, labels = (part.to(self.device, non_blocking=True) for part in batch)
        return normalize(images, MEAN, STD), labels

    def digest(self) -> str:
        """Return a hash of the files' names, labels and sizes."""
        return self.listing.digest()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user about files and folders that were left out."""
        return self.listing.left_out

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class PhotographLoader:
    """Training batches of one worker on the device, read by a stream."""

    data: Photographs
    stream: Stream

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return a step's images (batch_size, 3, size, size) and labels (batch_size,)."""
        return self.data.on_device(self.stream.batch(step))


@dataclass(frozen=True)
class Reader:
    """Items of a stream: (image, label) by index and seed.

    Attributes:
        listing: The files and their labels.
        transform: Maps a picture to a tensor; it may draw from torch's CPU generator, which is seeded for each item.
    """

    listing: Listing
    transform: "v2.Transform"

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = index_and_seed
        image = read(self.listing.path(index))
        with seeded(seed):
            return self.transform(image), int(self.listing.labels[index])


def augmentation(size: int, rand_augment: tuple[int, int] | None = None) -> "v2.Transform":
    """Return the transform for training.

    It is a random crop, mirrored at random, then RandAugment if it is given.

    Args:
        size: Height and width of the crop in pixels.
        rand_augment: Number of operations and magnitude (0 to 30) of RandAugment (Cubuk et al., 2020).
    """
    from torchvision.transforms import InterpolationMode, v2

    transforms: list[v2.Transform] = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
    if rand_augment is not None:
        num_ops, magnitude = rand_augment
        transforms.append(v2.RandAugment(num_ops, magnitude, interpolation=InterpolationMode.BILINEAR))
    return v2.Compose([*transforms, v2.PILToTensor()])


def middle(size: int) -> "v2.Transform":
    """Return the transform for testing: resize and center crop."""
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size), v2.PILToTensor()])


def read(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        UserError: The file is not an image, incomplete, or cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual palettes and damaged comments, which do not harm the image
            with Image.open(path) as image:
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        reason = "unknown image format" if path.stat().st_size else "the file is empty"
        raise _bad(path, reason) from error
    except Exception as error:  # it is not documented which exceptions the decoders raise
        raise _bad(path, f"cannot be read ({getattr(error, 'strerror', None) or first_line(error)})") from error


def _bad(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; fix or delete it, or give `skip_bad_files`")


def load_folder(
    data_dir: Path, *, size: int | None = None, data_workers: int = 0, skip_bad: bool = False
) -> tuple[Photographs, Photographs]:
    """List the training and test photographs below `data_dir`.

    Args:
        data_dir: Folder with train/CLASS/* and val/CLASS/*.
        size: Height and width in pixels of the images in a batch; default: 224.
        data_workers: Processes that read; 0: this process reads.
        skip_bad: Leave out files that cannot be read, and folders that are empty or not a class. For this, every file
            is read once, with `data_workers` processes; the result is kept in the user's cache folder until a name,
            size or time of a file changes.

    Returns:
        Training photographs and test photographs.

    Raises:
        UserError: Folders are missing, empty or not a class, or no image can be read.
    """
    classes = class_names(data_dir)
    splits: list[Photographs] = []
    for split in ("train", "val"):
        listing = list_split(data_dir / split, classes, skip_bad=skip_bad)
        if skip_bad:
            listing = listing.without(unreadable(listing, data_workers), "cannot be read")
        if not len(listing):
            raise UserError(f"{data_dir / split}: contains no image that can be read")
        splits.append(Photographs(listing, len(classes), size or IMAGE_SIZE, data_workers))
    return splits[0], splits[1]


def unreadable(listing: Listing, data_workers: int) -> np.ndarray:
    """Find unreadable files in the cache, or by reading all files.

    Args:
        listing: The files.
        data_workers: Processes that read; 0: this process reads.

    Returns:
        (num_bad,) int64: indices of the files, ascending.
    """
    key = blake2b(f"{listing.root.absolute()} {listing.digest(times=True)}".encode(), digest_size=12).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resist"
    file = folder / f"unreadable-{key}.json"
    try:
        return np.array(json.loads(file.read_text(encoding="utf-8"))["unreadable"], np.int64)
    except (OSError, ValueError, KeyError, TypeError):
        # A warning, since this may take minutes: Python shows it on stderr also where logging is not configured.
        text = "%s: reading all %s files once to find those that cannot be read"
        logger.warning(text, listing.root, f"{len(listing):,}")
    flags = list(in_order(_Trial(listing), 64, num_data_workers=data_workers, collate=partial(np.array, dtype=bool)))
    bad = np.flatnonzero(~np.concatenate(flags))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"folder": str(listing.root.absolute()), "files": len(listing), "unreadable": bad.tolist()}
        new = folder / f".{file.name}.{os.getpid()}"
        new.write_text(json.dumps(content) + "\n", encoding="utf-8")
        new.replace(file)
    except OSError:
        pass  # without a cache, the next run reads the files again
    return bad


@dataclass(frozen=True)
class _Trial:
    """Items of the search for bad files: True where a file can be read."""

    listing: Listing

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> Any:
        try:
            read(self.listing.path(index_and_seed[0]))
        except UserError:
            return False
        return True
