"""Listing of photographs in one folder for each class.

    DIR/train/CLASS/*    DIR/val/CLASS/*        also in subfolders, as in train/CLASS/images/*

Classes are the folders below train/. Classes, and the files of a class, are sorted by the bytes of their names, so that
all machines number them in the same way. Hidden files, and files without an image suffix, are ignored. Only names,
sizes and times are read; no image is opened.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from resist.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".tif", ".tiff")
LAYOUT = "--data-dir has to contain train/CLASS/* and val/CLASS/*"


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
            raise UserError(f"{root / names[0]}: {problem}; fix or delete it, or give --skip-bad-files")
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
