"""Which photographs lie in a folder, and of which class they are: names and sizes alone, no image is opened.

    DIR/train/CLASS/*    DIR/val/CLASS/*        images may also lie deeper, as in train/CLASS/images/*

Classes are the folders below train/, in the order of their names' bytes, and so are the files of a class: all hosts
number them alike. Hidden files, and files that do not end as images do, are passed over.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from resist.errors import UserError

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
            self.root, self.names[keep], self.labels[keep], self.sizes[keep], self.times[keep],
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
        root, np.array(names), np.array(labels, np.int64), np.array(sizes, np.int64), np.array(times, np.int64),
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
