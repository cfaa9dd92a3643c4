"""A folder of photographs, small ones: each class is a color of its own."""

from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}


def write(path: Path, color: tuple[int, int, int], size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(-20, 20, (size[1], size[0], 1))
    Image.fromarray((np.array(color) + noise).clip(0, 255).astype(np.uint8)).save(path)


def make_folder(root: Path, train: int = 8, val: int = 3) -> Path:
    """root/train and root/val with so many images of each class, PNG and JPEG of different sizes."""
    for split, num in (("train", train), ("val", val)):
        for name, color in COLORS.items():
            for i in range(num):
                suffix = ("png", "JPEG")[i % 2]
                write(root / split / name / f"{name}_{i}.{suffix}", color, (40 + 3 * i, 52 - 2 * i))
    return root
