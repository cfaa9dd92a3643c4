"""PascalVOC: photographs with boxes around the objects of twenty classes, in the layout of the challenge.

    DATA_DIR/VOCdevkit/VOC2007/ImageSets/Main/trainval.txt    the names of the photographs in a set, one a line
                               JPEGImages/000005.jpg
                               Annotations/000005.xml         its objects

Annotations are read when a set is opened, and what is wrong with them is found then; photographs are decoded when they
are asked for. A box is left, top, right, bottom in pixels from the picture's corner: pixel 1 of the files is 0 to 1.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resist.data.annotation import CLASSES, Objects, read_annotation
from resist.errors import UserError

# Data set -> year, and the sets to train and to test on. There is no answer to the test set of 2012.
VOC = {"voc2007": ("2007", ("trainval", "test")), "voc2012": ("2012", ("train", "val"))}
# The longer side of a photograph is at most so many times what its shorter side is brought to, as in Faster R-CNN.
LONGER = 5 / 3
IMAGE_SIZE = 600
REMEDY = "mend or remove it, or go on without it by --skip-bad-files"

Item = tuple[Tensor, Tensor, Tensor, Tensor, int]


@dataclass(frozen=True)
class Photograph:
    """A file and the objects in it. objects: in pixels of the file."""

    file: Path
    width: int
    height: int
    objects: Objects


@dataclass(frozen=True)
class VocSet:
    """A set of photographs, brought to a size.

    image_size: the shorter side of what is given, in pixels, unless the longer one would exceed LONGER times that.
    augment:    every other photograph is mirrored, on the average; objects that are marked as difficult are left out.
    list_file:  what lists the set. skipped: what is wrong with photographs of it that were left out.
    """

    photographs: tuple[Photograph, ...]
    image_size: int
    augment: bool
    list_file: Path
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.photographs)

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines on what was left out."""
        num = len(self.skipped)
        if not num:
            return ()
        return (f"{self.list_file}: left out {num} photograph{'s' * (num > 1)}, first {self.skipped[0]}",)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> Item:
        """(image (3, height, width) uint8, boxes (objects, 4) float32, labels (objects,) int64 from 1 to 20, difficult
        (objects,) bool, the seed). Raises UserError that names the file where it cannot be decoded."""
        index, seed = index_and_seed
        one = self.photographs[index]
        width, height = fitted(one.width, one.height, self.image_size)
        image = _decode(one.file, (width, height))
        boxes = one.objects.boxes * torch.tensor([width / one.width, height / one.height] * 2)
        labels, difficult = one.objects.labels, one.objects.difficult
        if self.augment:
            boxes, labels, difficult = boxes[~difficult], labels[~difficult], difficult[~difficult]
            if torch.rand((), generator=torch.Generator().manual_seed(seed)) < 0.5:
                image, boxes = image.flip(2), mirrored(boxes, width)
        return image, boxes, labels, difficult, seed

    def digest(self) -> str:
        """A short text that differs where photographs (by name and size) or objects do."""
        key = blake2b(digest_size=8)
        for one in self.photographs:
            key.update(f"{one.file.name} {one.width} {one.height} {one.file.stat().st_size};".encode())
            for part in (one.objects.boxes, one.objects.labels, one.objects.difficult):
                key.update(part.numpy().tobytes())
        return key.hexdigest()


def load_voc(
    name: str,
    data_dir: Path,
    *,
    image_size: int | None = None,
    splits: Sequence[str] = (),
    skip_bad_files: bool = False,
    download: bool = True,
) -> tuple[VocSet, VocSet]:
    """(to train on, to test on). splits: names of the two sets, instead of those usual for this year.

    Raises UserError in one line, the file first, for a file that is missing or damaged; with skip_bad_files it goes on
    without it, having decoded every photograph once to see that it can be.
    """
    year, usual = VOC[name]
    image_size = IMAGE_SIZE if image_size is None else image_size
    if image_size < 32:
        raise UserError(f"--image-size {image_size} is too small for photographs; give at least 32")
    if splits and len(splits) != 2:
        raise UserError(f"--splits {' '.join(splits)} is not two names of sets, as in --splits trainval test")
    root = data_dir / "VOCdevkit" / f"VOC{year}"
    names = [_names(root, year, split, data_dir, download) for split in splits or usual]
    train, test = (_open(root, *each, skip_bad_files) for each in names)
    return (
        VocSet(train[0], image_size, True, names[0][0], train[1]),
        VocSet(test[0], image_size, False, names[1][0], test[1]),
    )


def fitted(width: int, height: int, image_size: int) -> tuple[int, int]:
    """The size that a picture is brought to: its shorter side image_size, or its longer one LONGER times that."""
    scale = min(image_size / min(width, height), longer(image_size) / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def longer(image_size: int) -> int:
    return int(image_size * LONGER)


def mirrored(boxes: Tensor, width: float) -> Tensor:
    """Boxes (objects, 4) in the mirror image of a picture that is `width` wide."""
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([width - right, top, width - left, bottom], dim=1)


def _names(root: Path, year: str, split: str, data_dir: Path, download: bool) -> tuple[Path, list[str]]:
    """The file that lists a set, and the names in it; the set is downloaded where it is not there."""
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        _fetch(file, year, split, data_dir, download)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({_reason(error)}); restore it") from error
    names = [line.strip() for line in lines if line.strip()]
    for number, one in enumerate(names, 1):
        if not one.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"{file}: name {number} is {one[:60]!r}, not that of a photograph; give a list of names")
    if not names:
        raise UserError(f"{file}: lists no photograph; restore it, or name another set by --splits")
    return file, names


def _fetch(file: Path, year: str, split: str, data_dir: Path, download: bool) -> None:
    from torchvision.datasets import VOCDetection

    known = ("train", "val", "trainval", *(("test",) if year == "2007" else ()))
    if split not in known:
        there = sorted(p.stem for p in file.parent.glob("*.txt") if "_" not in p.stem) or known
        raise UserError(f"{file}: is not there; --splits takes two of {', '.join(there)}")
    try:
        if not download:
            raise RuntimeError("downloading is off")
        data_dir.mkdir(parents=True, exist_ok=True)
        VOCDetection(data_dir, year=year, image_set=split, download=True)
    except Exception as error:  # whatever the network raises
        raise UserError(
            f"{file}: is not there and cannot be downloaded ({_reason(error)}); unpack the archives of VOC{year} into "
            f"{data_dir}"
        ) from error


def _open(
    root: Path, file: Path, names: list[str], skip_bad_files: bool
) -> tuple[tuple[Photograph, ...], tuple[str, ...]]:
    """The photographs of the set that `file` lists, and what is wrong with the others."""
    with ThreadPoolExecutor(8) as pool:  # files are waited for, and decoded outside of Python's lock
        read = _tolerant if skip_bad_files else _photograph
        found = list(pool.map(lambda name: read(root, name), names))
    photographs = tuple(one for one in found if isinstance(one, Photograph))
    skipped = tuple(one for one in found if isinstance(one, str))
    if not photographs:
        raise UserError(f"{file}: none of its {len(names)} photographs can be used; first, {skipped[0]}")
    return photographs, skipped


def _tolerant(root: Path, name: str) -> Photograph | str:
    try:
        one = _photograph(root, name)
        _decode(one.file, (1, 1))
        return one
    except UserError as error:
        return str(error).removesuffix(f"; {REMEDY}")


def _photograph(root: Path, name: str) -> Photograph:
    file = root / "JPEGImages" / f"{name}.jpg"
    width, height = _picture(file, lambda picture: picture.size)
    annotation = root / "Annotations" / f"{name}.xml"
    try:
        return Photograph(file, width, height, read_annotation(annotation, width, height))
    except ValueError as error:
        raise UserError(f"{error}; {REMEDY}") from error


def _decode(file: Path, size: tuple[int, int]) -> Tensor:
    """(3, height, width) uint8 of a photograph brought to size (width, height)."""
    picture = _picture(file, lambda picture: picture.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _picture(file: Path, use: Callable[[Image.Image], Any]) -> Any:
    """`use` of the picture in a file. Raises UserError, the file first, for whatever is wrong with it."""
    if not file.is_file():
        raise UserError(f"{file}: is not there; {REMEDY}")
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as picture:
            return use(picture)
    except Exception as error:  # decoders raise whatever they meet
        raise UserError(f"{file}: is not a picture that can be read ({_reason(error)}); {REMEDY}") from error


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


__all__ = ["CLASSES", "VOC", "Objects", "Photograph", "VocSet", "load_voc"]
