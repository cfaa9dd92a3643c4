"""Photographs in one folder for each class: the data sets "folder" and "imagenet".

    DIR/train/CLASS/*    DIR/val/CLASS/*        see `resist.data.listing` and `resist.data.picture`

Training: a random crop (8 to 100 % of the area), resized, and mirrored with probability 0.5; then RandAugment, if it is
given. Testing: the shorter side resized to 8/7 of the image size, then a center crop. Images are transferred as
bytes; the device normalizes batches.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from resist.data.classes import alike, class_names
from resist.data.in_memory import normalize
from resist.data.listing import Listing, list_split
from resist.data.loader import Stream, in_order, seeded
from resist.data.naming import shown
from resist.data.picture import problem_of, read
from resist.data.readers import num_readers
from resist.data.sampler import Sampler
from resist.data.spans import WHOLE, Share
from resist.errors import UserError

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
        channels_last: Memory format of the batches: channels innermost, which convolutions compute fastest, or not.
        rand_augment: Number of operations and magnitude of RandAugment in training; None: without it.
    """

    listing: Listing
    num_classes: int
    size: int = IMAGE_SIZE
    data_workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    channels_last: bool = True
    rand_augment: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.listing)

    def to(self, device: torch.device | str, *, channels_last: bool | None = None) -> "Photographs":
        """Return the same photographs with batches on `device`.

        Args:
            device: Device of the batches.
            channels_last: Memory format of the batches; default: as before.
        """
        form = self.channels_last if channels_last is None else channels_last
        return replace(self, device=torch.device(device), channels_last=form)

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

    def batches(self, size: int, limit: int | None = None, share: Share = WHOLE) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the images in order, without augmentation, for evaluation.

        Args:
            size: Images in a batch; the last one may have fewer, or one more, see `spans`.
            limit: Number of batches, at most; default: all.
            share: The part of the batches to iterate over.

        Yields:
            Images (batch, 3, size, size) float32 and labels (batch,) int64, on the device.
        """
        reader = Reader(self.listing, middle(self.size))
        options = {"num_data_workers": self.data_workers, "pin_memory": self._pinned}
        for batch in in_order(reader, size, limit=limit, share=share, **options):
            yield self.on_device(batch)

    def on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Move images (uint8) and labels to the device, without a wait for it; normalize the images."""
        images, labels = (part.to(self.device, non_blocking=True) for part in batch)
        return normalize(images, MEAN, STD, channels_last=self.channels_last), labels

    def digest(self) -> str:
        """Return a hash of the files' names, labels and sizes."""
        return self.listing.digest()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user about files and folders that were left out, or that may not be meant."""
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


def load_folder(
    data_dir: Path, *, size: int | None = None, data_workers: int | None = 0, skip_bad: bool = False
) -> tuple[Photographs, Photographs]:
    """List the training and test photographs below `data_dir`.

    Args:
        data_dir: Folder with train/CLASS/* and val/CLASS/*.
        size: Height and width in pixels of the images in a batch; default: 224.
        data_workers: Processes that read; 0: this process reads; None: as many as the cores allow one worker.
        skip_bad: Leave out files that cannot be read, and folders that are empty, missing or not a class. For this,
            every file is read once, with `data_workers` processes; the result is kept in the user's cache folder until
            a name, size or time of a file changes.

    Returns:
        Training photographs and test photographs.

    Raises:
        UserError: Folders are missing, empty or not a class, there is one class only, or no image can be read.
    """
    classes, data_workers = class_names(data_dir), num_readers(data_workers)
    splits: list[Photographs] = []
    for split in ("train", "val"):
        listing = list_split(data_dir / split, classes, skip_bad=skip_bad)
        if skip_bad:
            listing = listing.without(unreadable(listing, data_workers))
        if not len(listing):
            raise UserError(f"{shown(data_dir / split)}: contains no image that can be read")
        if split == "train" and (line := alike(classes)):
            listing = replace(listing, left_out=(*listing.left_out, f"{shown(data_dir / split)}: {line}"))
        splits.append(Photographs(listing, len(classes), size or IMAGE_SIZE, data_workers))
    return splits[0], splits[1]


def unreadable(listing: Listing, data_workers: int) -> dict[int, str]:
    """Find the files that cannot be used in the cache, or by reading all files.

    Args:
        listing: The files.
        data_workers: Processes that read; 0: this process reads.

    Returns:
        The reason for each of them, by its index.
    """
    where = os.fsencode(listing.root.absolute())
    key = blake2b(b"%b %b" % (where, listing.digest(times=True).encode()), digest_size=12).hexdigest()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(tempfile.gettempdir() if cache.startswith("~") else cache) / "resist"  # ~: a user without a home
    file = folder / f"unusable-{key}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["unusable"]
        return {index: str(reason) for text, reason in kept.items() if (index := int(text)) < len(listing)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # A warning, since this may take minutes: Python shows it on stderr also where logging is not configured.
        text = "%s: reading all %s files once to find those that cannot be read"
        logger.warning(text, shown(listing.root), f"{len(listing):,}")
    batches = in_order(_Trial(listing), 64, num_data_workers=data_workers, collate=list)
    reasons = [reason for batch in batches for reason in batch]
    bad = {index: reason for index, reason in enumerate(reasons) if reason}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"folder": str(listing.root.absolute()), "files": len(listing), "unusable": bad}
        new = folder / f".{file.name}.{os.getpid()}"
        new.write_text(json.dumps(content) + "\n", encoding="utf-8")
        new.replace(file)
    except OSError:
        pass  # without a cache, the next run reads the files again
    return bad


@dataclass(frozen=True)
class _Trial:
    """Items of the search for bad files: why a file cannot be used, "" where it can."""

    listing: Listing

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> str:
        path = self.listing.path(index_and_seed[0])
        try:
            read(path)
        except UserError as error:
            return problem_of(error, path)
        return ""
