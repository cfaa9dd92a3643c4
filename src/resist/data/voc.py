"""PascalVOC: photographs with boxes around objects of twenty classes.

    DATA_DIR/VOCdevkit/VOC2007/ImageSets/Main/trainval.txt    names of the photographs in a set, one for each line
                               JPEGImages/000005.jpg
                               Annotations/000005.xml         objects of the photograph

Annotations are read and checked when a set is opened; photographs are decoded when they are requested. A box is left,
top, right, bottom in pixels from the corner of the picture: pixel 1 of the files extends from 0 to 1.
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

from resist.data.annotation import Objects, read_annotation
from resist.errors import UserError, first_line

# Data set -> year, and the sets to train and to test on. The objects of the test set of 2012 are not published.
VOC = {"voc2007": ("2007", ("trainval", "test")), "voc2012": ("2012", ("train", "val"))}
# Upper bound of the longer side of a resized photograph, relative to `image_size`, as in Faster R-CNN.
LONGER = 5 / 3
IMAGE_SIZE = 600
REMEDY = "fix or delete it, or leave it out with `skip_bad_files`"

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
        skipped: The error of each photograph that was left out.
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
        """Lines for the user about photographs that were left out."""
        num = len(self.skipped)
        if not num:
            return ()
        return (f"{self.list_file}: left out {num} photograph{'s' * (num > 1)}, first {self.skipped[0]}",)

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
        boxes = photograph.objects.boxes * torch.tensor([width / photograph.width, height / photograph.height] * 2)
        labels, difficult = photograph.objects.labels, photograph.objects.difficult
        if self.augment:
            boxes, labels, difficult = boxes[~difficult], labels[~difficult], difficult[~difficult]
            if torch.rand((), generator=torch.Generator().manual_seed(seed)) < 0.5:
                image, boxes = image.flip(2), mirrored(boxes, width)
        return image, boxes, labels, difficult, seed

    def digest(self) -> str:
        """Return a hash of the photographs' names, sizes and objects."""
        key = blake2b(digest_size=8)
        for photograph in self.photographs:
            num_bytes = photograph.file.stat().st_size
            key.update(f"{photograph.file.name} {photograph.width} {photograph.height} {num_bytes};".encode())
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
        skip_bad_files: Leave out photographs with missing or damaged files. For this, every photograph is decoded once.
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
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({first_line(error)}); restore it") from error
    names = [line.strip() for line in lines if line.strip()]
    for number, name in enumerate(names, 1):
        if not name.replace("_", "").replace("-", "").isalnum():  # nothing that could lead out of the directory
            raise UserError(f"{file}: name {number} is {name[:60]!r}, not that of a photograph; give a list of names")
    if not names:
        raise UserError(f"{file}: lists no photograph; restore it, or name another set with `splits`")
    return file, names


def _fetch(file: Path, year: str, split: str, data_dir: Path, download: bool) -> None:
    from torchvision.datasets import VOCDetection

    published = ("train", "val", "trainval", *(("test",) if year == "2007" else ()))
    if split not in published:
        available = sorted(p.stem for p in file.parent.glob("*.txt") if "_" not in p.stem) or published
        raise UserError(f"{file}: not found; give `splits` two of {', '.join(available)}")
    try:
        if not download:
            raise RuntimeError("downloading is off")
        data_dir.mkdir(parents=True, exist_ok=True)
        VOCDetection(data_dir, year=year, image_set=split, download=True)
    except Exception as error:  # any error of the connection or of the archive
        raise UserError(
            f"{file}: not found, and cannot be downloaded ({first_line(error)}); unpack the archives of VOC{year} into "
            f"{data_dir}"
        ) from error


def _open(
    root: Path, file: Path, names: list[str], skip_bad_files: bool
) -> tuple[tuple[Photograph, ...], tuple[str, ...]]:
    """The photographs of the set that `file` lists, and the errors of those that were left out."""
    with ThreadPoolExecutor(8) as pool:  # threads, since reading waits for the disk and decoding releases Python's lock
        read = _tolerant if skip_bad_files else _photograph
        results = list(pool.map(lambda name: read(root, name), names))
    photographs = tuple(result for result in results if isinstance(result, Photograph))
    skipped = tuple(result for result in results if isinstance(result, str))
    if not photographs:
        raise UserError(f"{file}: none of its {len(names)} photographs can be used; first, {skipped[0]}")
    return photographs, skipped


def _tolerant(root: Path, name: str) -> Photograph | str:
    """A photograph that can be decoded, or the error."""
    try:
        photograph = _photograph(root, name)
        _decode(photograph.file, (1, 1))
        return photograph
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
    """Decode a photograph to (3, height, width) uint8, resized to size (width, height)."""
    picture = _picture(file, lambda picture: picture.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _picture(file: Path, use: Callable[[Image.Image], Any]) -> Any:
    """Open a picture and return `use` of it; every error becomes a UserError that begins with the file."""
    if not file.is_file():
        raise UserError(f"{file}: not found; {REMEDY}")
    try:
        with Image.open(file, formats=("JPEG", "PNG")) as picture:
            return use(picture)
    except Exception as error:  # it is not documented which exceptions the decoders raise
        raise UserError(f"{file}: cannot be read as a picture ({first_line(error)}); {REMEDY}") from error
