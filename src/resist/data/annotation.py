"""Safe reader of PascalVOC annotations.

A file may have at most a megabyte, no deep nesting, and no document type, hence no entities that expand or refer to
other files. Every error is a ValueError whose text begins with the file's name.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import torch
from torch import Tensor

from resist.data.naming import shown
from resist.data.xml_text import decode_xml

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
MAX_BYTES, MAX_DEPTH = 1_000_000, 20
# Pixels by which a box may exceed the picture; it is clipped. Some files count from 0, some round up.
SLACK = 1.0
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# What stands in <difficult> in place of 0 and 1; nothing is 0.
TRUTH = {"": 0.0, "false": 0.0, "no": 0.0, "true": 1.0, "yes": 1.0}

Box = tuple[float, float, float, float]


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


def read_annotation(file: Path, width: int, height: int, bad: list[str] | None = None) -> Objects:
    """Read the objects in a picture; there may be none.

    Args:
        file: The XML file.
        width: Width of the picture in pixels.
        height: Height of the picture in pixels.
        bad: Leave out objects with an unknown class, a wrong box or an unknown mark `difficult`, and add their errors
            to this list; None: such an object is an error.

    Raises:
        ValueError: The file is missing or damaged, belongs to a picture of another size, or has a bad object, with
            `bad` only bad ones.
    """
    root = parse(file)
    if root.tag != "annotation":
        raise ValueError(f"{shown(file)}: the root element is {root.tag[:60]!r}, not 'annotation'")
    _check_size(file, root, width, height)
    boxes, labels, difficult, errors = [], [], [], []
    elements = root.findall("object")
    for number, element in enumerate(elements, 1):
        try:
            box, label, is_difficult = _object(f"{shown(file)}: object {number}", element, width, height)
        except ValueError as error:
            if bad is None:
                raise
            errors.append(str(error))
        else:
            boxes.append(box)
            labels.append(label)
            difficult.append(is_difficult)
    if errors and len(errors) == len(elements):  # an empty photograph would teach that nothing is there
        raise ValueError(errors[0] + (f"; none of its {len(errors)} objects can be used" if len(errors) > 1 else ""))
    if bad is not None:
        bad += errors
    return Objects(
        torch.tensor(boxes, dtype=torch.float32, device="cpu").reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64, device="cpu"),
        torch.tensor(difficult, dtype=torch.bool, device="cpu"),
    )


def _check_size(file: Path, root: Element, width: int, height: int) -> None:
    """Raise ValueError where the annotation describes a picture of another size; 0 and nothing describe none."""
    texts = [_text(root, f"size/{name}") for name in ("width", "height")]
    numbers = [_number(text or "0") for text in texts]
    if all(number in (0, true) for number, true in zip(numbers, (width, height), strict=True)):
        return
    rotated = ", as after a rotation by EXIF" if numbers == [height, width] else ""
    raise ValueError(
        f"{shown(file)}: describes a picture of {texts[0][:20]} x {texts[1][:20]} pixels{rotated}; the picture has "
        f"{width} x {height}"
    )


def _object(label: str, element: Element, width: int, height: int) -> tuple[Box, int, bool]:
    """The box, label and mark `difficult` of an object. `label` begins the message of an error."""
    name = _text(element, "name")
    if name not in CLASSES:
        raise ValueError(f"{label} has the class {name[:60]!r}, which is not one of VOC's {len(CLASSES)}")
    difficult = _text(element, "difficult")
    mark = TRUTH.get(difficult.lower(), _number(difficult))
    if mark not in (0, 1):
        raise ValueError(f"{label} ({name}) has {difficult[:20]!r} for difficult, not 0 or 1")
    return _box(f"{label} ({name})", element, width, height), 1 + CLASSES.index(name), mark == 1


def _box(label: str, element: Element, width: int, height: int) -> Box:
    texts = [_text(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    left, top, right, bottom = map(_number, texts)
    box = f"{label} has the box {' '.join(text[:20] or '-' for text in texts)}"
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError(f"{box}, not four numbers")
    if right <= left or bottom <= top:
        raise ValueError(f"{box}, which has no area")
    outside = min(left, top) < 1 - SLACK or right > width + SLACK or bottom > height + SLACK
    # The files count pixels from 1 and include the last one; here pixel 1 extends from 0 to 1.
    left, top = max(left - 1, 0.0), max(top - 1, 0.0)
    right, bottom = min(right, float(width)), min(bottom, float(height))
    if outside or right <= left or bottom <= top:
        raise ValueError(f"{box}, which exceeds the picture of {width} x {height} pixels")
    return left, top, right, bottom


def _number(text: str) -> float:
    """The number that a text is, nan where it is none."""
    return float(text) if NUMBER.fullmatch(text) else math.nan


def _text(element: Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def parse(file: Path) -> Element:
    """Parse an XML file and return its root element.

    Raises:
        ValueError: The file is missing, incomplete, too large or too deeply nested, or declares a document type.
    """
    if not file.is_file():
        raise ValueError(f"{shown(file)}: not found")
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{shown(file)}: cannot be read ({error.strerror})") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{shown(file)}: larger than {MAX_BYTES:,} bytes, the most that an annotation may have")
    builder, depth = TreeBuilder(), 0

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"{shown(file)}: has elements {depth} levels deep; an annotation may have {MAX_DEPTH}")
        builder.start(name, attributes)

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(name)

    def refuse(*_: object) -> NoReturn:
        raise ValueError(f"{shown(file)}: declares a document type, which an annotation may not")

    try:
        text = decode_xml(data)
    except ValueError as error:
        raise ValueError(f"{shown(file)}: {error}") from error
    parser = expat.ParserCreate("utf-8")  # whatever the file declares
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, builder.data
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(text.encode("utf-8", "surrogatepass"), True)
    except expat.ExpatError as error:
        raise ValueError(f"{shown(file)}: not complete XML ({error})") from error
    return builder.close()
