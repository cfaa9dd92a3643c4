"""PascalVOC: photographs with boxes around objects of twenty classes.

    DATA_DIR/VOCdevkit/VOC2007/ImageSets/Main/trainval.txt    names of the photographs in a set, one for each line
                               JPEGImages/000005.jpg
                               Annotations/000005.xml         objects of the photograph

Annotations are read and checked when a set is opened; photographs are decoded when they are requested. A box is left,
top, right, bottom in pixels from the corner of the picture: pixel 1 of the files extends from 0 to 1.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resist.data.annotation import Objects, read_annotation
from resist.data.naming import NAMED, REMEDY, count, shown
from resist.data.picture import as_rgb, size_of, use
from resist.data.suffixes import SUFFIXES
from resist.errors import UserError, first_line

# Data set -> year, and the sets to train and to test on. The objects of the test set of 2012 are not published.
VOC = {"voc2007": ("2007", ("trainval", "test")), "voc2012": ("2012", ("train", "val"))}
# Upper bound of the longer side of a resized photograph, relative to `image_size`, as in Faster R-CNN.
LONGER = 5 / 3
IMAGE_SIZE = 600

Item = tuple[Tensor, Tensor, Tensor, Tensor, int]


@dataclass(frozen=True)
class Photograph:
    """A picture file and its objects.

    Attributes:
        file: Path of the file.
        width: Width in pixels.
        height: Height in pixels.
        objects: The objects, their boxes in pixels of the file.
    """

    file: Path
    width: int
    height: int
    objects: Objects


@dataclass(frozen=True)
class VocSet:
    """A set of photographs, resized when they are read.

    Attributes:
        photographs: The files and their objects.
        image_size: Length in pixels to which the shorter side is resized, or less where the longer side would exceed
            `LONGER` times that.
        augment: Mirror photographs with probability 0.5, and leave out difficult objects.
        list_file: File that lists the names of the photographs.
        skipped: Lines about photographs and objects that were left out.
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
        """Lines for the user about photographs and objects that were left out."""
        return self.skipped

    def __getitem__(self, index_and_seed: tuple[int, int]) -> Item:
        """Decode and resize a photograph.

        Args:
            index_and_seed: Index of the photograph, and seed of its augmentation.

        Returns:
            The image (3, height, width) uint8, boxes (objects, 4) float32 in pixels of the image, labels (objects,)
            int64 from 1 to 20, difficult (objects,) bool, and the seed.

        Raises:
            UserError: The file cannot be decoded.
        """
        index, seed = index_and_seed
        photograph = self.photographs[index]
        width, height = fitted(photograph.width, photograph.height, self.image_size)
        image = _decode(photograph.file, (width, height))
        objects = self.objects(index)
        boxes, labels, difficult = objects.boxes, objects.labels, objects.difficult
        if self.augment:
            boxes, labels, difficult = boxes[~difficult], labels[~difficult], difficult[~difficult]
            if torch.rand((), generator=torch.Generator().manual_seed(seed), device="cpu") < 0.5:
                image, boxes = image.flip(2), mirrored(boxes, width)
        return image, boxes, labels, difficult, seed

    def objects(self, index: int) -> Objects:
        """Return the objects of a photograph, their boxes in pixels of the resized image, without decoding it."""
        photograph = self.photographs[index]
        width, height = fitted(photograph.width, photograph.height, self.image_size)
        scale = torch.tensor([width / photograph.width, height / photograph.height] * 2, device="cpu")
        return replace(photograph.objects, boxes=photograph.objects.boxes * scale)

    def digest(self) -> str:
        """Return a hash of the photographs' names, sizes and objects."""
        key = blake2b(digest_size=8)
        for photograph in self.photographs:
            num_bytes = photograph.file.stat().st_size
            key.update(
                f"{photograph.file.name} {photograph.width} {photograph.height} {num_bytes};".encode(
                    "utf-8", "surrogateescape"
                )
            )
            objects = photograph.objects
            for part in (objects.boxes, objects.labels, objects.difficult):
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
    """Open the training set and the test set of a year.

    Args:
        name: A key of `VOC`.
        data_dir: Directory that contains VOCdevkit; missing archives are downloaded to it.
        image_size: Length in pixels to which the shorter side is resized, at least 32; default: 600.
        splits: Names of the two sets; default: those of `VOC`.
        skip_bad_files: Leave out photographs with missing or damaged files, and bad objects of the others. For this,
            every photograph is decoded once.
        download: Download missing archives; otherwise they are an error.

    Returns:
        The training set, augmented, and the test set.

    Raises:
        UserError: A value is out of bounds, a set is unknown, or a file is missing or damaged.
    """
    year, default_splits = VOC[name]
    image_size = IMAGE_SIZE if image_size is None else image_size
    if image_size < 32:
        raise UserError(f"`image_size={image_size}` is too small for photographs; give at least 32")
    if splits and len(splits) != 2:
        raise UserError(f"`splits={' '.join(splits)}`; give two names of sets, as in trainval test")
    root = data_dir / "VOCdevkit" / f"VOC{year}"
    names = [_names(root, year, split, data_dir, download) for split in splits or default_splits]
    train, test = (_open(root, *file_and_names, skip_bad_files) for file_and_names in names)
    return (
        VocSet(train[0], image_size, True, names[0][0], train[1]),
        VocSet(test[0], image_size, False, names[1][0], test[1]),
    )


def fitted(width: int, height: int, image_size: int) -> tuple[int, int]:
    """Return the (width, height) in pixels to which a picture is resized.

    Its shorter side becomes `image_size`, or its longer one `LONGER` times that, whichever is smaller.
    """
    scale = min(image_size / min(width, height), longer(image_size) / max(width, height))
    return max(round(width * scale), 1), max(round(height * scale), 1)


def longer(image_size: int) -> int:
    """Return the upper bound of a picture's longer side in pixels."""
    return int(image_size * LONGER)


def mirrored(boxes: Tensor, width: float) -> Tensor:
    """Mirror boxes (objects, 4) left to right within `width` pixels."""
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([width - right, top, width - left, bottom], dim=1)


def _names(root: Path, year: str, split: str, data_dir: Path, download: bool) -> tuple[Path, list[str]]:
    """The file that lists a set, and the names in it; a missing set is downloaded."""
    file = root / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file():
        _fetch(file, year, split, data_dir, download)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(file)}: cannot be read ({first_line(error)}); restore it") from error
    names = [line.strip() for line in lines if line.strip()]
    for number, name in enumerate(names, 1):
        if not name.replace("_", "").replace("-", "").isalnum():  # nothing that could lead out of the directory
            raise UserError(
                f"{shown(file)}: name {number} is {name[:60]!r}, not that of a photograph; give a list of names"
            )
    if not names:
        raise UserError(f"{shown(file)}: lists no photograph; restore it, or name another set with `splits`")
    return file, names


def _fetch(file: Path, year: str, split: str, data_dir: Path, download: bool) -> None:
    from torchvision.datasets import VOCDetection

    published = ("train", "val", "trainval", *(("test",) if year == "2007" else ()))
    if split not in published:
        available = sorted(p.stem for p in file.parent.glob("*.txt") if "_" not in p.stem) or published
        raise UserError(f"{shown(file)}: not found; give `splits` two of {', '.join(available)}")
    try:
        if not download:
            raise RuntimeError("downloading is off")
        data_dir.mkdir(parents=True, exist_ok=True)
        VOCDetection(data_dir, year=year, image_set=split, download=True)
    except Exception as error:  # any error of the connection or of the archive
        raise UserError(
            f"{shown(file)}: not found, and cannot be downloaded ({first_line(error)}); unpack the archives of "
            f"VOC{year} into {shown(data_dir)}"
        ) from error


def _open(
    root: Path, file: Path, names: list[str], skip_bad_files: bool
) -> tuple[tuple[Photograph, ...], tuple[str, ...]]:
    """The photographs of the set that `file` lists, and lines about what was left out."""
    with ThreadPoolExecutor(8) as pool:  # threads, since reading waits for the disk and decoding releases Python's lock
        read = _tolerant if skip_bad_files else _strict
        results = list(pool.map(lambda name: read(root, name), names))
    photographs = tuple(result for result, _ in results if result is not None)
    bad = [errors[0] for result, errors in results if result is None]
    if not photographs:
        raise UserError(f"{shown(file)}: none of its {len(names)} photographs can be used; first, {bad[0]}")
    objects = [error for result, errors in results if result is not None for error in errors]
    return photographs, (*_lines(file, "photograph", bad), *_lines(file, "object", objects))


def _lines(file: Path, noun: str, errors: list[str]) -> Iterator[str]:
    """Lines about what was left out: its number, and the first errors, one a line."""
    if errors:
        more = "" if len(errors) <= NAMED else f", the first {NAMED}"
        yield f"{shown(file)}: left out {count(len(errors), noun)}{more}:"
        yield from errors[:NAMED]


def _strict(root: Path, name: str) -> tuple[Photograph | None, list[str]]:
    return _photograph(root, name), []


def _tolerant(root: Path, name: str) -> tuple[Photograph | None, list[str]]:
    """A photograph that can be decoded, None where it cannot, and the errors."""
    errors: list[str] = []
    try:
        photograph = _photograph(root, name, errors)
        _decode(photograph.file, (1, 1))
        return photograph, errors
    except UserError as error:
        return None, [str(error).removesuffix(f"; {REMEDY}")]


def _photograph(root: Path, name: str, bad: list[str] | None = None) -> Photograph:
    """A photograph with its objects; with `bad`, without the bad ones, whose errors are added to it.

    Raises:
        UserError: A file is missing or damaged, an object is bad and there is no `bad`, or all objects are bad.
    """
    file = _file(root / "JPEGImages", name)
    width, height = size_of(file)
    annotation = root / "Annotations" / f"{name}.xml"
    try:
        objects = read_annotation(annotation, width, height, bad)
    except ValueError as error:
        raise UserError(f"{error}; {REMEDY}") from error
    return Photograph(file, width, height, objects)


def _file(folder: Path, name: str) -> Path:
    """The file of a photograph: a .jpg, or where there is none, a file with another suffix of pictures."""
    file = folder / f"{name}.jpg"
    if file.exists():
        return file
    suffixes = [suffix.decode() for suffix in sorted(SUFFIXES)]
    others = (folder / f"{name}{suffix}" for suffix in (*suffixes, *map(str.upper, suffixes)))
    return next((other for other in others if other.is_file()), file)


def _decode(file: Path, size: tuple[int, int]) -> Tensor:
    """Decode a photograph to (3, height, width) uint8, resized to size (width, height)."""
    picture = use(file, lambda picture: as_rgb(picture).resize(size, Image.Resampling.BILINEAR))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
