"""Listing of photographs in one folder for each class.

    DIR/train/CLASS/*    DIR/val/CLASS/*        also in subfolders, as in train/CLASS/images/*

Classes, and the files of a class, are sorted by the bytes of their names, so that all machines number them in the same
way. Hidden files are ignored. Only names, sizes and times are read, and the first bytes of files whose suffix is
unusual.

Nothing else is left out silently. Files that are not pictures are counted in `Listing.left_out`. A class without
pictures or without a folder, a folder that is not a class, and a link to nothing are errors, or with `skip_bad` counted
there too.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from resist.data.classes import LAYOUT, entries_of, leads_nowhere, near_miss
from resist.data.naming import REMEDY, count, few, shown
from resist.data.suffixes import is_picture, suffix_of
from resist.errors import UserError


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

    def name(self, index: int) -> str:
        """Return the path of a file relative to the root."""
        return os.fsdecode(bytes(self.names[index]))

    def path(self, index: int) -> Path:
        """Return the path of a file."""
        return self.root / self.name(index)

    def digest(self, *, times: bool = False) -> str:
        """Return a hash of names, labels, sizes and, on request, times."""
        key = blake2b(digest_size=8)
        for part in (self.names, self.labels, self.sizes, *((self.times,) if times else ())):
            key.update(f"{part.dtype} {part.shape}".encode() + part.tobytes())
        return key.hexdigest()

    def without(self, bad: Mapping[int, str]) -> "Listing":
        """Return a listing without some files.

        Args:
            bad: Indices of the files to leave out, with the reason for each.
        """
        if not bad:
            return self
        keep = np.ones(len(self), bool)
        keep[list(bad)] = False
        problems = [Problem("file", self.name(index), bad[index]) for index in sorted(bad)]
        return Listing(
            self.root,
            self.names[keep],
            self.labels[keep],
            self.sizes[keep],
            self.times[keep],
            (*self.left_out, *_lines(self.root, problems)),
        )


@dataclass(frozen=True)
class Problem:
    """Why something has to be left out.

    Attributes:
        noun: What it is: file, folder, link or class.
        name: Its path relative to the split.
        text: The problem, a verb phrase.
    """

    noun: str
    name: str
    text: str


def _lines(root: Path, problems: Sequence[Problem]) -> Iterator[str]:
    """A line for each noun: how many were left out, and the first of them."""
    for noun in dict.fromkeys(problem.noun for problem in problems):
        own = [f"{problem.name} ({problem.text})" for problem in problems if problem.noun == noun]
        yield f"{shown(root)}: left out {count(len(own), noun)}: {few(own)}"


@dataclass
class _Split:
    """What lies in the folders of a split.

    Attributes:
        root: Folder of the split.
        rows: Path relative to the root, class number, bytes and ns of each picture.
        problems: What has to be left out.
        other: Paths relative to the root of files that are not pictures.
    """

    root: Path
    rows: list[tuple[bytes, int, int, int]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    other: list[bytes] = field(default_factory=list)

    def add(self, name: str, number: int) -> None:
        """Add the files of a class folder."""
        others, problems = len(self.other), len(self.problems)
        files = sorted(self._pictures(os.fsencode(self.root / name), os.fsencode(name), ()))
        self.rows += [(path, number, size, time) for path, size, time in files]
        if not files and len(self.problems) == problems:
            kinds = _kinds(self.other[others:])
            self.problems.append(Problem("folder", name, f"contains no images{kinds and f', but {kinds}'}"))

    def _pictures(
        self, folder: bytes, name: bytes, above: tuple[tuple[int, int], ...]
    ) -> Iterator[tuple[bytes, int, int]]:
        """(path relative to the root, bytes, ns) of each picture in a folder and its subfolders.

        Args:
            folder: Path of the folder.
            name: Its path relative to the root.
            above: Device and inode of the folders that it lies in.
        """
        try:
            stat = os.stat(folder)
            with os.scandir(folder) as found:
                entries = list(found)
        except OSError as error:
            self.problems.append(Problem("folder", os.fsdecode(name), f"cannot be listed ({error.strerror})"))
            return
        here = (stat.st_dev, stat.st_ino)
        if here in above:
            self.problems.append(Problem("link", os.fsdecode(name), "leads to a folder that it lies in"))
            return
        for entry in entries:
            path = name + b"/" + entry.name
            if entry.name.startswith(b"."):
                continue
            if leads_nowhere(entry):
                self.problems.append(Problem("link", os.fsdecode(path), "leads to nothing"))
            elif entry.is_dir():
                yield from self._pictures(entry.path, path, (*above, here))
            elif entry.is_file() and is_picture(entry.path):
                stat = entry.stat()
                yield path, stat.st_size, stat.st_mtime_ns
            else:
                self.other.append(path)


def _kinds(paths: Sequence[bytes]) -> str:
    """Files that are not pictures, by their suffix: "3 files: .txt 2, no suffix 1"; "" where there are none."""
    numbers = Counter(os.fsdecode(suffix_of(path)) or "no suffix" for path in paths)
    ordered = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    kinds = few([f"{suffix} {number:,}" for suffix, number in ordered])
    return f"{count(len(paths), 'file')} of other kinds: {kinds}" if paths else ""


def _nested(rows: Sequence[tuple[bytes, int, int, int]]) -> Iterator[str]:
    """A line where the images of every class lie in several subfolders, which may be what was meant by classes."""
    below: dict[bytes, set[bytes]] = {}
    for path, *_ in rows:
        folder, *rest = path.split(b"/")
        if len(rest) == 1:
            return
        below.setdefault(folder, set()).add(rest[0])
    if min(map(len, below.values())) > 1:
        folder, subfolders = next(iter(below.items()))
        names = few([os.fsdecode(name) for name in sorted(subfolders)])
        yield f"{shown(os.fsdecode(folder))} is one class, whose images lie in its folders {names}; so with all classes"


def list_split(root: Path, classes: list[str], *, skip_bad: bool) -> Listing:
    """List the images of a split.

    Args:
        root: DIR/train or DIR/val.
        classes: Names of the classes, in the order of their numbers.
        skip_bad: Leave out what would be an error, and count it in `left_out`.

    Raises:
        UserError: The folder cannot be read or contains no images; without `skip_bad` also for a class without images
            or without a folder, a folder that is not a class, and links that cannot be followed.
    """
    try:
        entries = entries_of(root)
    except OSError as error:
        raise UserError(f"{shown(root)}: {error.strerror}; {LAYOUT}") from error
    split, numbers = _Split(root), {name: number for number, name in enumerate(classes)}
    for name in entries.folders:
        if name in numbers:
            split.add(name, numbers[name])
        else:
            split.problems.append(Problem("folder", name, f"is not a class of train/{near_miss(name, classes)}"))
    split.problems += [Problem("link", name, "leads to nothing") for name in entries.lost]
    missing = [name for name in classes if name not in {*entries.folders, *entries.lost}]
    for name in missing:
        text = "is a file, not the folder of the class" if name in entries.files else "is missing, a class of train/"
        split.problems.append(Problem("class", name, text))
    if not entries.folders:
        raise UserError(f"{shown(root)}: contains no images in class folders; {LAYOUT}")
    if split.problems and not skip_bad:
        first = split.problems[0]
        remedy = REMEDY.replace("fix or delete", "add") if first.noun == "class" else REMEDY
        more = f" (the first of {len(split.problems)} such problems)" if len(split.problems) > 1 else ""
        raise UserError(f"{shown(root / first.name)}: {first.text}{more}; {remedy}")
    left_out = [*_lines(root, split.problems)]
    if split.other:
        first = shown(os.fsdecode(min(split.other)))
        left_out.append(f"{shown(root)}: passed over {_kinds(split.other)}; first {first}")
    if entries.files:
        number = count(len(entries.files), "file")
        left_out.append(f"{shown(root)}: passed over {number} beside the class folders: {few(entries.files)}")
    if not split.rows:
        raise UserError(f"{shown(root)}: contains no images in class folders; {LAYOUT}")
    left_out += [f"{shown(root)}: {line}" for line in _nested(split.rows)]
    names, labels, sizes, times = zip(*split.rows, strict=True)
    labels, sizes, times = (np.array(column, np.int64) for column in (labels, sizes, times))
    return Listing(root, np.array(names), labels, sizes, times, tuple(left_out))
