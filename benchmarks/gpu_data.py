"""Make parts of CIFAR-10 of under 60 MB, for machines that get files in small pieces.

    python benchmarks/gpu_data.py --data-dir DIR --out FOLDER

DIR has torchvision's folder cifar-10-batches-py. A part is a file of numpy with images (num, 3, 32, 32) uint8, labels
(num,) uint8, the number of its first image, that of the training images in all parts, and the digests of both sets.
`read_parts` reads them, and refuses parts that are missing or of other images.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from resist.data import Images, load, normalization_of

MOST_BYTES = 60_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", required=True, help="folder of cifar-10-batches-py")
    parser.add_argument("--out", type=Path, required=True, help="folder of the parts")
    args = parser.parse_args()
    train, test = load("cifar10", args.data_dir, download=False)
    assert isinstance(train, Images)
    assert isinstance(test, Images)
    for file in write_parts(train, test, args.out):
        print(file, file.stat().st_size)


def write_parts(train: Images, test: Images, out: Path, most_bytes: int = MOST_BYTES) -> list[Path]:
    """Write the parts.

    Args:
        train: Training images.
        test: Test images.
        out: Folder of the parts; it has none yet.
        most_bytes: Largest size of the images of a part, which compression makes somewhat smaller.

    Returns:
        The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    if present := sorted(out.glob("cifar10-*.npz")):
        raise SystemExit(f"{present[0]} is there already; give another folder, or remove its parts")
    images = torch.cat([train.images, test.images]).numpy()
    labels = torch.cat([train.labels, test.labels]).numpy().astype(np.uint8)
    # Compression takes 8 % off photographs of this size; a part that is too large all the same is refused below.
    number = math.ceil(0.95 * images.nbytes / most_bytes)
    size, files = math.ceil(len(images) / number), []
    about = {"num_train": len(train), "digests": [train.digest(), test.digest()]}
    for part in range(number):
        first = part * size
        files.append(out / f"cifar10-{part + 1}-of-{number}.npz")
        own = slice(first, first + size)
        np.savez_compressed(files[-1], images=images[own], labels=labels[own], first=first, **about)
        assert files[-1].stat().st_size < most_bytes, f"{files[-1]} has {files[-1].stat().st_size} bytes"
    return files


def read_parts(folder: Path) -> tuple[Images, Images]:
    """Read training and test images from their parts.

    Args:
        folder: Folder of the parts.

    Raises:
        SystemExit: Parts are missing, or are not those of one data set.
    """
    files = {file.name: file for file in folder.glob("cifar10-*-of-*.npz")}
    if not files:
        raise SystemExit(f"{folder} has no parts of CIFAR-10; make them by benchmarks/gpu_data.py")
    number = int(next(iter(files)).removesuffix(".npz").rpartition("-")[2])
    wanted = [f"cifar10-{part + 1}-of-{number}.npz" for part in range(number)]
    if missing := [name for name in wanted if name not in files]:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}; bring these parts, too")
    parts = [dict(np.load(files[name])) for name in wanted]
    images = torch.from_numpy(np.concatenate([part["images"] for part in parts]))
    labels = torch.from_numpy(np.concatenate([part["labels"] for part in parts])).long()
    split = int(parts[0]["num_train"])
    mean, std = normalization_of("cifar10")
    whole = Images(images, labels, 10, mean, std, pad=4, flip=True)
    train = replace(whole, images=images[:split], labels=labels[:split])
    test = replace(whole, images=images[split:], labels=labels[split:])
    if [train.digest(), test.digest()] != parts[0]["digests"].tolist():
        raise SystemExit(f"the parts in {folder} are not those of one data set; make them again by gpu_data.py")
    return train, test


if __name__ == "__main__":
    main()
