"""Photographs in folders, one for each class, read while the network trains: `--data folder` and `--data imagenet`.

    DIR/train/CLASS/*    DIR/val/CLASS/*        images may also lie deeper, as in train/CLASS/images/*

Classes are the folders below train/, in the order of their names' bytes, and so are the files of a class: all hosts
number them alike. Hidden files, and files that do not end as images do, are passed over. Listing them reads names and
sizes alone and opens no image.

Training: a random part of the image (8 to 100 % of its area), resized, mirrored every other time. Testing: the shorter
side resized to 8/7 of the image size, the middle cut out. Images travel as bytes; the device normalizes whole batches.
"""

import json
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

if TYPE_CHECKING:  # it takes seconds to import, which only those shall wait who have photographs
    from torchvision.transforms import v2

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
LAYOUT = "--data-dir has to hold train/CLASS/* and val/CLASS/*"


@dataclass(frozen=True)
class Listing:
    """root: where the names lead from. names: (num,) bytes; labels: (num,) int64; sizes, times: (num,) int64, bytes
    and ns. Arrays, not lists of strings: processes that read share them. left_out: lines on what was passed over.
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
        return self.root / os.fsdecode(bytes(self.names[index]))

    def digest(self, *, times: bool = False) -> str:
        """A short text that differs where names, sizes or labels do (or times); of the images it reads no byte."""
        key = blake2b(digest_size=8)
        for part in (self.names, self.labels, self.sizes, *((self.times,) if times else ())):
            key.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
        return key.hexdigest()

    def without(self, bad: np.ndarray, why: str) -> "Listing":
        """The same without the files whose indices are in `bad`, which are left out because they `why`."""
        if not len(bad):
            return self
        keep = np.ones(len(self), bool)
        keep[bad] = False
        line = f"{self.root}: left out {len(bad)} {'files that' if len(bad) > 1 else 'file that'} {why}, first "
        return Listing(
            self.root,
            self.names[keep],
            self.labels[keep],
            self.sizes[keep],
            self.times[keep],
            (*self.left_out, line + str(self.path(int(bad[0])).relative_to(self.root))),
        )


def class_names(data_dir: Path) -> list[str]:
    """The classes: the folders below train/. Raises UserError where there are none."""
    train = data_dir / "train"
    try:
        names = _folders(train)
    except OSError as error:
        raise UserError(f"{train}: {error.strerror}; {LAYOUT}") from error
    if not names:
        raise UserError(f"{train}: holds no class folders; {LAYOUT}")
    return names


def _folders(root: Path) -> list[str]:
    """The names of the folders in `root`, in the order of their bytes; hidden ones are passed over."""
    with os.scandir(root) as entries:
        return sorted((e.name for e in entries if e.is_dir() and not e.name.startswith(".")), key=os.fsencode)


def list_split(root: Path, classes: list[str], *, skip_bad: bool) -> Listing:
    """The images below `root`, which is DIR/train or DIR/val.

    Raises UserError, the folder first, for a class folder without images and for a folder that is no class; with
    `skip_bad` these are left out and counted. A class without a folder has no images here.
    """
    found: list[tuple[bytes, int, int, int]] = []
    empty: list[str] = []
    strange: list[str] = []
    try:
        numbers = {name: number for number, name in enumerate(classes)}
        for name in _folders(root):
            if name not in numbers:
                strange.append(name)
                continue
            files = sorted(_images(os.fsencode(root / name), os.fsencode(name)))
            found += [(path, numbers[name], size, time) for path, size, time in files]
            empty += [] if files else [name]
    except OSError as error:
        raise UserError(f"{os.fsdecode(error.filename or root)}: {error.strerror}; {LAYOUT}") from error
    left_out: list[str] = []
    for names, what in ((strange, "is not a class of train/"), (empty, "holds no images")):
        if names and not skip_bad:
            raise UserError(f"{root / names[0]}: {what}; mend or remove it, or give --skip-bad-files")
        if names:
            left_out.append(f"{root}: left out {len(names)} folder{'s' * (len(names) > 1)}, first {names[0]}: {what}")
    if not found:
        raise UserError(f"{root}: holds no images in class folders; {LAYOUT}")
    names, labels, sizes, times = zip(*found, strict=True)
    return Listing(
        root,
        np.array(names),
        np.array(labels, np.int64),
        np.array(sizes, np.int64),
        np.array(times, np.int64),
        tuple(left_out),
    )


def _images(folder: bytes, name: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(path from the root, bytes, time) of each image in a folder and those below it."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                yield from _images(entry.path, name + b"/" + entry.name)
            elif os.fsdecode(entry.name).lower().endswith(SUFFIXES):
                stat = entry.stat()
                yield name + b"/" + entry.name, stat.st_size, stat.st_mtime_ns


# Of the photographs of ImageNet, per channel, of pixels in 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Photographs:
    """Images with one class each, in files. size: height and width that they are cut to. data_workers: processes that
    read for each stream of batches."""

    listing: Listing
    num_classes: int
    size: int = IMAGE_SIZE
    data_workers: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.listing)

    def to(self, device: torch.device | str) -> "Photographs":
        return replace(self, device=torch.device(device))

    def loader(
        self, *, batch_size: int, seed: int, worker: int, workers: int, sampling: str = "all"
    ) -> "PhotographLoader":
        """The training batches of one worker, augmented."""
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
        """The images in order, each once, not augmented, `size` at a time, for evaluation; `limit` batches at most."""
        reader = Reader(self.listing, middle(self.size))
        for batch in in_order(reader, size, num_data_workers=self.data_workers, pin_memory=self._pinned, limit=limit):
            yield self.on_device(batch)

    def on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(images (batch, 3, size, size) uint8, labels (batch,)) as the network takes them, float32."""
        images, labels = (part.to(self.device, non_blocking=True) for part in batch)
        return normalize(images, MEAN, STD), labels

    def digest(self) -> str:
        """A short text that differs where names, sizes or labels of the files do: their content is not read."""
        return self.listing.digest()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what was left out."""
        return self.listing.left_out

    @property
    def _pinned(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class PhotographLoader:
    data: Photographs
    stream: Stream

    @property
    def images_per_epoch(self) -> int:
        return self.stream.images_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch_size, 3, size, size) float32 and labels (batch_size,) of this step, on the device."""
        return self.data.on_device(self.stream.batch(step))


@dataclass(frozen=True)
class Reader:
    """What a stream reads from: (image (3, size, size) uint8, label) by index and seed."""

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
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()])


def middle(size: int) -> "v2.Transform":
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(round(size * 8 / 7)), v2.CenterCrop(size), v2.PILToTensor()])


def read(path: Path) -> Image.Image:
    """The image in a file, in color. Raises UserError, the file first, where there is none or only a part of one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd palettes and damaged comments, which leave the image whole
            with Image.open(path) as image:
                return image.convert("RGB")
    except UnidentifiedImageError as error:
        reason = "is of no known format" if path.stat().st_size else "is empty"
        raise _bad(path, reason) from error
    except Exception as error:  # what the decoders raise is not said anywhere
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise _bad(path, f"cannot be read ({text.splitlines()[0]})") from error


def _bad(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: {reason}; mend or remove it, or give --skip-bad-files")


def load_folder(
    data_dir: Path, *, size: int | None = None, data_workers: int = 0, skip_bad: bool = False
) -> tuple[Photographs, Photographs]:
    """(training, test) photographs below `data_dir`.

    skip_bad: first try to read every file, with `data_workers` processes, and leave out those that cannot be. The
              result is kept in the user's cache folder until a name, size or time of a file changes.
    Raises UserError, the file or folder first, for whatever is wrong with the folders.
    """
    classes = class_names(data_dir)
    found: list[Photographs] = []
    for split in ("train", "val"):
        listing = list_split(data_dir / split, classes, skip_bad=skip_bad)
        if skip_bad:
            listing = listing.without(unreadable(listing, data_workers), "cannot be read")
        if not len(listing):
            raise UserError(f"{data_dir / split}: holds no image that can be read")
        found.append(Photographs(listing, len(classes), size or IMAGE_SIZE, data_workers))
    return found[0], found[1]


def unreadable(listing: Listing, data_workers: int) -> np.ndarray:
    """The indices of the files that cannot be read, from the cache or by trying all. (num,) int64"""
    key = blake2b(f"{listing.root.absolute()} {listing.digest(times=True)}".encode(), digest_size=12).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resist"
    file = folder / f"unreadable-{key}.json"
    try:
        return np.array(json.loads(file.read_text(encoding="utf-8"))["unreadable"], np.int64)
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{listing.root}: looking for files that cannot be read among {len(listing):,}, once", flush=True)
    flags = list(in_order(_Trial(listing), 64, num_data_workers=data_workers, collate=partial(np.array, dtype=bool)))
    bad = np.flatnonzero(~np.concatenate(flags))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {"folder": str(listing.root.absolute()), "files": len(listing), "unreadable": bad.tolist()}
        new = folder / f".{file.name}.{os.getpid()}"
        new.write_text(json.dumps(content) + "\n", encoding="utf-8")
        new.replace(file)
    except OSError:
        pass  # then they are tried again the next time
    return bad


@dataclass(frozen=True)
class _Trial:
    """Whether a file can be read."""

    listing: Listing

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> Any:
        try:
            read(self.listing.path(index_and_seed[0]))
        except UserError:
            return False
        return True
