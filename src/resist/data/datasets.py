"""Data sets by name, each with training and test images.

- `digits`: 1,797 handwritten digits of scikit-learn, enlarged from 8x8 to 16x16, in three equal channels; every fifth
  is for testing.
- `cifar10`: 60,000 photographs of 32x32 in 10 classes; downloaded by torchvision when missing.
- `cifar100`: the same in 100 classes.
- `synthetic`: noise with a faint mark of its class, for benchmarks.
- `folder`: photographs in train/CLASS/* and val/CLASS/* below `data_dir`, read during training.
- `imagenet`: the same, with the 1,000 classes of ImageNet.
"""

import contextlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from resist.data.classes import class_names
from resist.data.image_folder import IMAGE_SIZE, MEAN, STD, Photographs, load_folder
from resist.data.in_memory import Images
from resist.data.naming import shown
from resist.data.voc import VOC
from resist.errors import UserError, first_line

# Data sets of photographs, which are streamed from files; the others are small enough to stay in memory.
FOLDERS = ("folder", "imagenet")
DATASETS = ("digits", "cifar10", "cifar100", "synthetic", *FOLDERS)
# Images for training and for testing of those that stay in memory.
NUM_IMAGES = {"digits": 1797, "cifar10": 60_000, "cifar100": 60_000, "synthetic": 2048 + 512}
# Mean and standard deviation of each channel over the training set, for pixels in 0..1. Those of digits are computed.
NORMALIZATION = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "synthetic": ((0.44,) * 3, (0.25,) * 3),
    **dict.fromkeys(FOLDERS, (MEAN, STD)),
}


def load(
    name: str,
    data_dir: str | Path = "data",
    *,
    download: bool = True,
    image_size: int | None = None,
    data_workers: int | None = 0,
    skip_bad_files: bool = False,
    rand_augment: tuple[int, int] | None = None,
) -> tuple[Images, Images] | tuple[Photographs, Photographs]:
    """Load a data set.

    Args:
        name: One of `DATASETS`.
        data_dir: Directory of the files; missing files are downloaded to it.
        download: Download missing files; otherwise they are an error.
        image_size: Height and width of photographs in pixels; default: 224.
        data_workers: Processes that read photographs; 0: this process reads; None: as many as the cores allow one
            worker.
        skip_bad_files: Leave out photographs that cannot be read, see `load_folder`.
        rand_augment: Operations and magnitude of RandAugment, for training photographs; None: without it.

    Returns:
        Training images and test images.

    Raises:
        UserError: The name is unknown, or files are missing or damaged and cannot be downloaded.
    """
    check_name(name)
    if name == "digits":
        return _digits()
    if name == "synthetic":
        return _synthetic(2048, 0), _synthetic(512, 1)
    if name in ("cifar10", "cifar100"):
        return _cifar(name, Path(data_dir), download)
    if name == "imagenet":
        check_imagenet(Path(data_dir))
    train, test = load_folder(Path(data_dir), size=image_size, data_workers=data_workers, skip_bad=skip_bad_files)
    return replace(train, rand_augment=rand_augment), test


def check_name(name: str) -> None:
    """Raise UserError if `name` is not one of `DATASETS`."""
    if name not in DATASETS:
        detection = f", or for detection {' or '.join(VOC)}" if name not in VOC else "; it is for detection"
        raise UserError(f"`data={name}` is not known; choose one of {', '.join(DATASETS)}{detection}")


def check_imagenet(data_dir: Path) -> None:
    """Raise UserError if `data_dir` does not have the 1,000 classes of ImageNet."""
    num_classes = len(class_names(data_dir))
    if num_classes != 1000:
        raise UserError(
            f"{shown(data_dir / 'train')}: has {num_classes} class folders, ImageNet 1,000; give `data=folder`"
        )


def image_size_of(name: str) -> int:
    """Return the height and width of a data set's images in pixels.

    For photographs, whose size can be chosen, this is the default.
    """
    check_name(name)
    return IMAGE_SIZE if name in FOLDERS else 16 if name == "digits" else 32


def num_classes_of(name: str, data_dir: str | Path = "data") -> int:
    """Return a data set's number of classes; for `folder`, count the folders."""
    check_name(name)
    if name == "folder":
        return len(class_names(Path(data_dir)))
    return {"imagenet": 1000, "cifar100": 100}.get(name, 10)


def device_bytes(name: str) -> int:
    """Return the bytes of a data set in the memory of a device, training and test images; 0 if it is streamed."""
    if name not in NUM_IMAGES:
        return 0
    return NUM_IMAGES[name] * (3 * image_size_of(name) ** 2 + torch.int64.itemsize)


def normalization_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the (mean, standard deviation) of each channel, for pixels in 0..1."""
    check_name(name)
    if name == "digits":
        images = _digits()[0]
        return images.mean, images.std
    return NORMALIZATION[name]


def _digits() -> tuple[Images, Images]:
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    pixels = torch.from_numpy(bunch.images).float()[:, None] * (255 / 16)
    large = F.interpolate(pixels, size=(16, 16), mode="bilinear", align_corners=False).round().to(torch.uint8)
    large = large.expand(-1, 3, -1, -1).contiguous()  # the networks take color
    labels = torch.from_numpy(bunch.target).long()
    test = torch.arange(len(labels), device="cpu") % 5 == 0
    mean, std = (large[~test].float() / 255).mean().item(), (large[~test].float() / 255).std().item()

    def part(which: torch.Tensor) -> Images:
        return Images(large[which], labels[which], 10, (mean,) * 3, (std,) * 3, pad=1, flip=False)

    return part(~test), part(test)


def _cifar(name: str, data_dir: Path, download: bool) -> tuple[Images, Images]:
    from torchvision import datasets

    dataset_class = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    folder = dataset_class.base_folder
    with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints that it verifies the files
        try:
            sets = [dataset_class(data_dir, train=train) for train in (True, False)]
        except (RuntimeError, OSError, EOFError, ValueError) as missing:
            try:
                if not download:
                    raise RuntimeError("downloading is off") from missing
                data_dir.mkdir(parents=True, exist_ok=True)
                sets = [dataset_class(data_dir, train=train, download=True) for train in (True, False)]
            except Exception as error:  # any error of the connection or of the files
                raise UserError(
                    f"`data={name}` is not complete below {shown(data_dir)} and cannot be downloaded "
                    f"({first_line(error)}); put the files of {dataset_class.filename} into {shown(data_dir / folder)}"
                ) from error
    mean, std = NORMALIZATION[name]
    train, test = (
        Images(
            torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(s.targets, device="cpu"),
            len(s.classes),
            mean,
            std,
            pad=4,
            flip=True,
        )
        for s in sets
    )
    return train, test


def _synthetic(num: int, salt: int) -> Images:
    generator = torch.Generator().manual_seed(salt)
    labels = torch.arange(num, device="cpu") % 10
    images = torch.randint(0, 224, (num, 3, 32, 32), generator=generator, dtype=torch.uint8, device="cpu")
    rows = 3 * labels[:, None] + torch.arange(2, device="cpu")
    images[torch.arange(num, device="cpu")[:, None], :, rows] += 31
    return Images(images, labels, 10, *NORMALIZATION["synthetic"], pad=4, flip=True)
