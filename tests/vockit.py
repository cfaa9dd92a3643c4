"""Draws small photographs with objects in them, in the layout of PascalVOC, for tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLORS = {"bus": (230, 40, 40), "sheep": (40, 220, 60), "boat": (50, 60, 230)}
Object = tuple[str, tuple[float, float, float, float], bool]  # class; left, top, right, bottom from 0; difficult


def annotation(objects: Sequence[Object], width: int, height: int) -> str:
    """Boxes as VOC writes them: the first pixel is 1, and both ends belong to the object."""
    parts = [
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{left + 1}</xmin>"
        f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object>"
        for name, (left, top, right, bottom), difficult in objects
    ]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(parts)}</annotation>"


def write(root: Path, name: str, objects: Sequence[Object], width: int = 96, height: int = 72) -> None:
    """A photograph below DATA_DIR `root`: noise, with a rectangle or an ellipse (of sheep) for each object."""
    base = root / "VOCdevkit" / "VOC2007"
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(name) + sum(map(ord, name))).integers(90, 140, (height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    draw = ImageDraw.Draw(picture)
    for kind, (left, top, right, bottom), _ in objects:
        shape = draw.ellipse if kind == "sheep" else draw.rectangle
        shape((left, top, right - 1, bottom - 1), fill=COLORS[kind])
    picture.save(base / "JPEGImages" / f"{name}.jpg", quality=95)
    (base / "Annotations" / f"{name}.xml").write_text(annotation(objects, width, height))


def list_set(root: Path, split: str, names: Sequence[str]) -> None:
    folder = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def draw(root: Path, num: int = 4) -> list[str]:
    """`num` photographs with a bus, a sheep and, in every other one, a boat in them; all are `trainval` and `test`."""
    names = [f"{number:06}" for number in range(1, num + 1)]
    for i, name in enumerate(names):
        x, y = 5 * (i % 3), 4 * (i % 2)
        objects: list[Object] = [("bus", (4 + x, 6 + y, 40 + x, 34 + y), False)]
        objects.append(("sheep", (58, 20 + y, 90, 50 + y), False))
        if i % 2:
            objects.append(("boat", (10 + x, 46, 50 + x, 70), False))
        write(root, name, objects)
    for split in ("trainval", "test"):
        list_set(root, split, names)
    return names
