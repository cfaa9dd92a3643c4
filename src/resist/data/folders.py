"""Photographs in folders, one for each class, read while the network trains: `--data folder` and `--data imagenet`.

Training: a random part of the image (8 to 100 % of its area), resized, mirrored every other time. Testing: the shorter
side resized to 8/7 of the image size, the middle cut out. Images travel as bytes; the device normalises whole batches.
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

from resist.data.images import normalise
from resist.data.listing import Listing, class_names, list_split
from resist.data.stream import Stream, in_order, seeded
from resist.errors import UserError

if TYPE_CHECKING:  # it takes seconds to import, which only those shall wait who have photographs
    from torchvision.transforms import v2

# Of the photographs of ImageNet, per channel, of pixels in 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE = 224


@dataclass(frozen=True)
class Photographs:
    """Images with one class each, in files. size: height and width that they are cut to. loaders: processes that read
    for each stream of batches."""

    listing: Listing
    num_classes: int
    size: int = IMAGE_SIZE
    loaders: int = 0
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
            Reader(self.listing, augmentation(self.size)), batch_size=batch_size, seed=seed, worker=worker,
            workers=workers, sampling=sampling, num_loaders=self.loaders, pin_memory=self._pinned,
        )
        return PhotographLoader(self, stream)

    def batches(self, size: int, limit: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The images in order, each once, not augmented, `size` at a time, for evaluation; `limit` batches at most."""
        reader = Reader(self.listing, middle(self.size))
        for batch in in_order(reader, size, num_loaders=self.loaders, pin_memory=self._pinned, limit=limit):
            yield self.on_device(batch)

    def on_device(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(images (batch, 3, size, size) uint8, labels (batch,)) as the network takes them, float32."""
        images, labels = (part.to(self.device, non_blocking=True) for part in batch)
        return normalise(images, MEAN, STD), labels

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
    """The image in a file, in colour. Raises UserError, the file first, where there is none or only a part of one."""
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
    data_dir: Path, *, size: int | None = None, loaders: int = 0, skip_bad: bool = False
) -> tuple[Photographs, Photographs]:
    """(training, test) photographs below `data_dir`.

    skip_bad: first try to read every file, with `loaders` processes, and leave out those that cannot be. What was found
              is kept in the user's cache folder until a name, size or time of a file changes.
    Raises UserError, the file or folder first, for whatever is wrong with the folders.
    """
    classes = class_names(data_dir)
    found: list[Photographs] = []
    for split in ("train", "val"):
        listing = list_split(data_dir / split, classes, skip_bad=skip_bad)
        if skip_bad:
            listing = listing.without(unreadable(listing, loaders), "cannot be read")
        if not len(listing):
            raise UserError(f"{data_dir / split}: holds no image that can be read")
        found.append(Photographs(listing, len(classes), size or IMAGE_SIZE, loaders))
    return found[0], found[1]


def unreadable(listing: Listing, loaders: int) -> np.ndarray:
    """The indices of the files that cannot be read, from the cache or by trying all. (num,) int64"""
    key = blake2b(f"{listing.root.absolute()} {listing.digest(times=True)}".encode(), digest_size=12).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "resist"
    file = folder / f"unreadable-{key}.json"
    try:
        return np.array(json.loads(file.read_text(encoding="utf-8"))["unreadable"], np.int64)
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{listing.root}: looking for files that cannot be read among {len(listing):,}, once", flush=True)
    flags = list(in_order(_Trial(listing), 64, num_loaders=loaders, collate=partial(np.array, dtype=bool)))
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
