"""Annotations of PascalVOC, read so that no file can do harm: at most a megabyte, no document type, hence no entities
that expand or that name other files, no deep nesting. Whatever is wrong raises ValueError with the file's name first.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import torch
from torch import Tensor

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MAX_BYTES, MAX_DEPTH = 1_000_000, 20
# Pixels by which a box may leave the picture and is cut: some are written from 0, some are rounded up.
SLACK = 1.0


@dataclass(frozen=True)
class Objects:
    """The objects in a picture. boxes: (objects, 4) float32, left, top, right, bottom, the first pixel being 0 to 1;
    labels: (objects,) int64, a class's place in CLASSES, from 1; difficult: (objects,) bool."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


def read_annotation(file: Path, width: int, height: int) -> Objects:
    """The objects in a picture of this size, in pixels. A picture may have none."""
    root = parse(file)
    if root.tag != "annotation":
        raise ValueError(f"{file}: is not an annotation but a {root.tag[:60]!r}")
    said = [_text(root, f"size/{name}") for name in ("width", "height")]
    if all(said) and said != [str(width), str(height)]:
        raise ValueError(f"{file}: is of a picture of {said[0]} x {said[1]} pixels; the picture has {width} x {height}")
    boxes, labels, difficult = [], [], []
    for number, one in enumerate(root.findall("object"), 1):
        name = _text(one, "name")
        if name not in CLASSES:
            raise ValueError(f"{file}: object {number} is of the class {name[:60]!r}, not of the {len(CLASSES)} of VOC")
        boxes.append(_box(file, f"object {number} ({name})", one, width, height))
        labels.append(1 + CLASSES.index(name))
        difficult.append(_text(one, "difficult") == "1")
    return Objects(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def _box(file: Path, what: str, one: Element, width: int, height: int) -> tuple[float, float, float, float]:
    texts = [_text(one, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = map(float, texts)
    except ValueError:
        left = top = right = bottom = math.nan
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError(f"{file}: the box of {what} reads {' '.join(t[:20] or '-' for t in texts)}, not four numbers")
    box = f"the box of {what}, {' '.join(texts)}"
    if right <= left or bottom <= top:
        raise ValueError(f"{file}: {box}, has no size")
    outside = min(left, top) < 1 - SLACK or right > width + SLACK or bottom > height + SLACK
    left, top = max(left - 1, 0.0), max(top - 1, 0.0)
    right, bottom = min(right, float(width)), min(bottom, float(height))
    if outside or right <= left or bottom <= top:
        raise ValueError(f"{file}: {box}, leaves the picture of {width} x {height} pixels")
    return left, top, right, bottom


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def parse(file: Path) -> Element:
    """The root element of an XML file. Raises ValueError, the file first, for what is not there, cut, or suspicious."""
    if not file.is_file():
        raise ValueError(f"{file}: is not there")
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file}: has more than {MAX_BYTES:,} bytes, which no annotation has")
    builder, depth = TreeBuilder(), 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{file}: has elements {depth} deep, which no annotation has")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> NoReturn:
        raise ValueError(f"{file}: declares a document type, which no annotation does")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ValueError(f"{file}: is not complete XML ({error})") from error
    return builder.close()
