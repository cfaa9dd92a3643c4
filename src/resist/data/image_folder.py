"""Photographs in one folder for each class: the data sets "folder" and "imagenet".

    DIR/train/CLASS/*    DIR/val/CLASS/*        also in subfolders, as in train/CLASS/images/*

Classes are the folders below train/. Classes, and the files of a class, are sorted by the bytes of their names, so that
all machines number them in the same way. Hidden files, and files without an image suffix, are ignored. Listing reads
only names, sizes and times; it opens no image.

Training: a random crop (8 to 100 % of the area), resized, and mirrored with probability 0.5. Testing: the shorter side
resized to 8/7 of the image size, then a center crop. Images are transferred as bytes; the device normalizes batches.
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
from resist.data.loader import Stream, in_order, seeded
from resist.errors import UserError

if TYPE_CHECKING:  # its import takes seconds, which only users of photographs should wait for
    from torchvision.transforms import v2

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
LAYOUT = "`data_dir` has to contain train/CLASS/* and val/CLASS/*"


@dataclass(frozen=True)
class Listing:
    """Files of a split with their labels.

    The columns are arrays and not lists of strings, so that reading processes share their memory.

    Attributes:
        root: Folder that the names are relative to.
        names: (num,) bytes: paths of the files.
        labels: (num,) int64: class numbers.
        sizes: (num,) int64: file sizes in bytes.
        times: (num,) int64: times of modification in ns.
        left_out: A line for each group of files or folders that were left out.
    """

    root: Path
    names: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    times: np.ndarray
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.root / os.fsdecode(bytes(self.names[index]))

    def digest(self, *, times: bool = False) -> str:
        """Return a hash of names, labels, sizes and, on request, times."""
        key = blake2b(digest_size=8)
        for part in (self.names, self.labels, self.sizes, *((self.times,) if times else ())):
            key.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
        return key.hexdigest()

    def without(self, bad: np.ndarray, reason: str) -> "Listing":
        """Return a listing without some files.

        Args:
            bad: (num_bad,) int64: indices of the files to leave out.
            reason: A verb phrase for the line in `left_out`, such as "cannot be read".
        """
        if not len(bad):
            return self
        keep = np.ones(len(self), bool)
        keep[bad] = False
        line = f"{self.root}: left out {len(bad)} {'files that' if len(bad) > 1 else 'file that'} {reason}, first "
        return Listing(
            self.root,
            self.names[keep],
            self.labels[keep],
            self.sizes[keep],
            self.times[keep],
            (*self.left_out, line + str(self.path(int(bad[0])).relative_to(self.root))),
        )


def class_names(data_dir: Path) -> list[str]:
    """Return the names of the class folders below train/, sorted.

    Raises:
        UserError: There are none, or train/ cannot be read.
    """
    train = data_dir / "train"
    try:
        names = _folders(train)
    except OSError as error:
        raise UserError(f"{train}: {error.strerror}; {LAYOUT}") from error
    if not names:
        raise UserError(f"{train}: contains no class folders; {LAYOUT}")
    return names


def _folders(root: Path) -> list[str]:
    """Names of the folders in `root` that are not hidden, sorted by their bytes."""
    with os.scandir(root) as entries:
        return sorted((e.name for e in entries if e.is_dir() and not e.name.startswith(".")), key=os.fsencode)


def list_split(root: Path, classes: list[str], *, skip_bad: bool) -> Listing:
    """List the images of a split.

    Args:
        root: DIR/train or DIR/val.
        classes: Names of the classes, in the order of their numbers. A class need not have a folder.
        skip_bad: Leave out empty class folders, and folders that are not a class, instead of raising an error.

    Raises:
        UserError: The folder cannot be read or contains no images; without `skip_bad` also for an empty class folder or
            one that is not a class.
    """
    rows: list[tuple[bytes, int, int, int]] = []
    empty: list[str] = []
    unknown: list[str] = []
    try:
        numbers = {name: number for number, name in enumerate(classes)}
        for name in _folders(root):
            if name not in numbers:
                unknown.append(name)
                continue
            files = sorted(_images(os.fsencode(root / name), os.fsencode(name)))
            rows += [(path, numbers[name], size, time) for path, size, time in files]
            empty += [] if files else [name]
    except OSError as error:
        raise UserError(f"{os.fsdecode(error.filename or root)}: {error.strerror}; {LAYOUT}") from error
    left_out: list[str] = []
    for names, problem in ((unknown, "is not a class of train/"), (empty, "contains no images")):
        if names and not skip_bad:
            raise UserError(f"{root / names[0]}: {problem}; fix or delete it, or give `skip_bad_files`")
        if names:
            plural = "s" * (len(names) > 1)
            left_out.append(f"{root}: left out {len(names)} folder{plural}, first {names[0]}: {problem}")
    if not rows:
        raise UserError(f"{root}: contains no images in class folders; {LAYOUT}")
    names, labels, sizes, times = zip(*rows, strict=True)
    return Listing(
        root,
        np.array(names),
        np.array(labels, np.int64),
        np.array(sizes, np.int64),
        np.array(times, np.int64),
        tuple(left_out),
    )


def _images(folder: bytes, name: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(path relative to the root, bytes, ns) of each image in a folder and its subfolders."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                yield from _images(entry.path, name + b"/" + entry.name)
            elif os.fsdecode(entry.name).lower().endswith(SUFFIXES):
                stat = entry.stat()
                yield name + b"/" + entry.name, stat.st_size, stat.st_mtime_ns


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
    """

    listing: Listing
    num_classes: int
    size: int = IMAGE_SIZE
    data_workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.listing)

    def to(self, device: torch.device | str) -> "Photographs":
        """Return the same photographs with batches on `device`."""
        return replace(self, device=torch.device(device))

    def loader(
        self, *, batch_size: int, seed: int, worker: int, workers: int, sampling: str = "all"
    ) -> "PhotographLoader":
        """Return the augmented training batches of one worker.

        Batches are a pure function of (seed, worker, step): a loader that starts at step t, also in another process or
        with another number of `data_workers`, returns the batches of an uninterrupted one. `seed` and `worker` decide
        the order of the images, and together with the step and the position in the batch the crop and the mirroring
        of each. With `sampling="shard"`, `seed` alone decides which images belong to which worker.

        Args:
            batch_size: Images in a batch.
            seed: Seed of the run, the same for all workers.
            worker: Number of the worker. Any integer that is not a worker's number, such as -1, gives batches that
                are independent of all workers'.
            workers: Number of workers that the images are divided among, for `sampling="shard"`.
            sampling: "all" or "shard", see `Order`.
        """
        stream = Stream(
            Reader(self.listing, augmentation(self.size)),
            batch_size=batch_size,
            seed=seed,
            worker=worker,
            workers=workers,
            sampling=sampling,
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

    @property
    def images_per_epoch(self) -> int:
        """Images in one pass through the images that the worker draws from."""
        return self.stream.images_per_epoch

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


def augmentation(size: int) -> "v2.Transform":
    """Return the transform for training: a random crop, mirrored at random."""
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


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
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _bad(path, f"cannot be read ({text.splitlines()[0]})") from error


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
