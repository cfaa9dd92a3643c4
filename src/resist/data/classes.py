"""Classes of photographs: the folders below train/, and what may be wrong with them."""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from resist.data.naming import few, shown
from resist.errors import UserError

LAYOUT = "`data_dir` has to contain train/CLASS/* and val/CLASS/*"


@dataclass(frozen=True)
class Entries:
    """Entries of a folder that are not hidden, each sorted by the bytes of its name.

    Attributes:
        folders: Names of folders, and of links to folders.
        lost: Names of links that lead to nothing.
        files: Names of all others.
    """

    folders: list[str]
    lost: list[str]
    files: list[str]


def entries_of(root: Path) -> Entries:
    """Return the entries of a folder.

    Raises:
        OSError: It cannot be listed.
    """
    found = Entries([], [], [])
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
            if entry.name.startswith("."):
                continue
            kind = found.lost if leads_nowhere(entry) else found.folders if entry.is_dir() else found.files
            kind.append(entry.name)
    return found


def leads_nowhere(entry: "os.DirEntry[str] | os.DirEntry[bytes]") -> bool:
    """Return True for a link that does not lead to a file or folder."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def class_names(data_dir: Path) -> list[str]:
    """Return the names of the classes, sorted by their bytes: the folders below train/.

    A link to nothing counts as a class without images, which `list_split` reports.

    Raises:
        UserError: There are fewer than two, two are the same but for their unicode form, or train/ cannot be read.
    """
    train = data_dir / "train"
    try:
        entries = entries_of(train)
    except OSError as error:
        raise UserError(f"{shown(train)}: {error.strerror}{_instead(data_dir)}; {LAYOUT}") from error
    names = sorted(entries.folders + entries.lost, key=os.fsencode)
    if not names:
        beside = f", but the files {few(entries.files)}" if entries.files else ""
        raise UserError(f"{shown(train)}: contains no class folders{beside}; {LAYOUT}")
    if len(names) == 1:
        raise UserError(f"{shown(train)}: has one class, {shown(names[0])}, and {_below(train / names[0])}")
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UserError(
                f"{shown(train)}: the classes {other!a} and {name!a} differ only by their unicode form; "
                "merge or rename them"
            )
    return names


def _instead(data_dir: Path) -> str:
    """What lies in `data_dir` in place of train/, for a message."""
    try:
        folders = entries_of(data_dir).folders
    except OSError:
        return ""
    for name in folders:
        if (data_dir / name / "train").is_dir():
            return f"; give `data_dir={shown(data_dir / name)}`, which has one"
    return f"; the folders here are {few(folders)}" if folders else ""


def _below(folder: Path) -> str:
    """What lies in the folder of the only class, and what to do, for a message."""
    top, depth = folder, 0
    try:
        while len((entries := entries_of(folder)).folders) == 1 and not entries.files and depth < 20:
            folder, depth = folder / entries.folders[0], depth + 1
    except OSError:
        return "two are needed; add another class"
    if len(entries.folders) < 2:
        return "two are needed; add another class"
    where = "" if folder == top else f" in {shown(folder.relative_to(top.parent))}"
    return (
        f"two are needed; it contains the folders {few(entries.folders)}{where}: if they are the classes, move them up "
        f"into {shown(top.parent)}"
    )


def alike(classes: Iterable[str]) -> str | None:
    """Return a line about classes that differ only by upper and lower case or spaces; None where there are none."""
    groups: dict[str, list[str]] = {}
    for name in classes:
        groups.setdefault(_folded(name), []).append(name)
    pairs = [" and ".join(map(repr, group)) for group in groups.values() if len(group) > 1]
    return f"classes that differ only by case or spaces are two: {few(pairs)}" if pairs else None


def near_miss(name: str, classes: Iterable[str]) -> str:
    """Return a hint, for a message, at the class that `name` is another spelling of; "" where there is none."""
    same = [other for other in classes if _folded(other) == _folded(name) and other != name]
    return f", which has {same[0]!a} and not {name!a}" if same else ""


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()
