"""Safe reader of PascalVOC annotations.

A file may have at most a megabyte, no deep nesting, and no document type, hence no entities that expand or refer to
other files. Every error is a ValueError whose text begins with the file's name.
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
# Pixels by which a box may exceed the picture; it is clipped. Some files count from 0, some round up.
SLACK = 1.0


@dataclass(frozen=True)
class Objects:
    """Objects in a picture.

    Attributes:
        boxes: (objects, 4) float32: left, top, right, bottom in pixels; the first pixel extends from 0 to 1.
        labels: (objects,) int64: the position of the class in `CLASSES`, counted from 1.
        difficult: (objects,) bool: objects that PascalVOC does not count in tests.
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


def read_annotation(file: Path, width: int, height: int) -> Objects:
    """Read the objects in a picture; there may be none.

    Args:
        file: The XML file.
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.

    Raises:
        ValueError: The file is missing or damaged, has an unknown class or a wrong box, or belongs to a picture of
            another size.
    """
    root = parse(file)
    if root.tag != "annotation":
        raise ValueError(f"{file}: the root element is {root.tag[:60]!r}, not 'annotation'")
    size = [_text(root, f"size/{name}") for name in ("width", "height")]
    if all(size) and size != [str(width), str(height)]:
        raise ValueError(
            f"{file}: describes a picture of {size[0]} x {size[1]} pixels; the picture has {width} x {height}"
        )
    boxes, labels, difficult = [], [], []
    for number, element in enumerate(root.findall("object"), 1):
        name = _text(element, "name")
        if name not in CLASSES:
            raise ValueError(
                f"{file}: object {number} has the class {name[:60]!r}, which is not one of VOC's {len(CLASSES)}"
            )
        boxes.append(_box(file, f"object {number} ({name})", element, width, height))
        labels.append(1 + CLASSES.index(name))
        difficult.append(_text(element, "difficult") == "1")
    return Objects(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.tensor(difficult, dtype=torch.bool),
    )


def _box(file: Path, label: str, element: Element, width: int, height: int) -> tuple[float, float, float, float]:
    texts = [_text(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = map(float, texts)
    except ValueError:
        left = top = right = bottom = math.nan
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError(f"{file}: the box of {label} is {' '.join(t[:20] or '-' for t in texts)}, not four numbers")
    box = f"the box of {label}, {' '.join(texts)}"
    if right <= left or bottom <= top:
        raise ValueError(f"{file}: {box}, has no area")
    outside = min(left, top) < 1 - SLACK or right > width + SLACK or bottom > height + SLACK
    # The files count pixels from 1 and include the last one; here pixel 1 extends from 0 to 1.
    left, top = max(left - 1, 0.0), max(top - 1, 0.0)
    right, bottom = min(right, float(width)), min(bottom, float(height))
    if outside or right <= left or bottom <= top:
        raise ValueError(f"{file}: {box}, exceeds the picture of {width} x {height} pixels")
    return left, top, right, bottom


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def parse(file: Path) -> Element:
    """Parse an XML file and return its root element.

    Raises:
        ValueError: The file is missing, incomplete, too large or too deeply nested, or declares a document type.
    """
    if not file.is_file():
        raise ValueError(f"{file}: not found")
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{file}: larger than {MAX_BYTES:,} bytes, the most that an annotation may have")
    builder, depth = TreeBuilder(), 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{file}: has elements {depth} levels deep; an annotation may have {MAX_DEPTH}")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> NoReturn:
        raise ValueError(f"{file}: declares a document type, which an annotation may not")

    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(data, True)
    except expat.ExpatError as error:
        raise ValueError(f"{file}: not complete XML ({error})") from error
    return builder.close()
