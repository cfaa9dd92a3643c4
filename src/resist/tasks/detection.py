"""Detection of objects in photographs: Faster R-CNN's losses, and the average precision of PascalVOC."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn

from resist.data.loader import Stream, in_order
from resist.data.voc import CLASSES, IMAGE_SIZE, Item, VocSet, fitted, load_voc, longer
from resist.models.faster_rcnn import build_detector, image_transform
from resist.models.pretrained import start_from
from resist.planning.plan import keyed_int
from resist.runs.config import NetworkConfig
from resist.tasks import classification
from resist.tasks.backbone import BackboneInit
from resist.tasks.task import Batches
from resist.tasks.voc_ap import AveragePrecision, Found, Truth

# Training photographs on which BatchNorm statistics are estimated anew, so many at a time; and tested at a time.
CALIBRATION_IMAGES, CALIBRATION_BATCH, TEST_BATCH = 512, 8, 8
# Sides of a batch of images in the network are multiples of this.
DIVISOR = 32

# images, each (3, height, width) uint8; targets, each with `boxes` and `labels`; a seed for each image
Batch = tuple[list[Tensor], list[dict[str, Tensor]], list[int]]


@dataclass(frozen=True)
class Detection:
    """Photographs with boxes around objects.

    build:  makes the full network, with fresh weights.
    scores: what `test` gives, by name: points as in `voc_ap.ap`.
    start:  the run that its backbone begins with, if any. data_workers: processes that read for each stream of batches.
    """

    build: Callable[[], nn.Module]
    train: VocSet
    held_out: VocSet
    scores: dict[str, int | None]
    start: BackboneInit | None = None
    data_workers: int = 0
    notes: tuple[str, ...] = ()
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def open(config: NetworkConfig, *, download: bool = True) -> "Detection":
        train, held_out = load_voc(
            config.data,
            config.data_dir,
            image_size=config.image_size,
            splits=config.splits,
            skip_bad_files=config.skip_bad_files,
            download=download,
        )
        scores: dict[str, int | None] = {"AP50 (11 points)": 11, "AP50 (area)": None}
        if config.data != "voc2007":  # each year's own measure counts
            scores = dict(reversed(scores.items()))
        start = None if config.backbone is None else BackboneInit.read(config.backbone)
        build, notes = builder(config, len(CLASSES)), (*train.notes, *held_out.notes)
        with torch.device("meta"):
            if start is not None:
                start.check(build())
            if config.pretrained is not None:
                notes += (start_from(classification.builder(config, 1)(), config.pretrained),)
        return Detection(build, train, held_out, scores, start, config.data_workers, notes)

    def network(self) -> nn.Module:
        model = self.build()
        if self.start is not None:
            self.start.fill(model)
        return model

    def to(self, device: torch.device | str) -> "Detection":
        return replace(self, device=torch.device(device))

    def batches(self, *, batch_size: int, seed: int, worker: int, workers: int, sampling: str) -> Batches:
        stream = Stream(
            self.train,
            batch_size=batch_size,
            seed=seed,
            worker=worker,
            workers=workers,
            sampling=sampling,
            num_data_workers=self.data_workers,
            collate=collate,
            pin_memory=self.device.type == "cuda",
        )
        return OnDevice(stream, self.device)

    def split(self, batch: Batch, parts: int) -> list[Batch]:
        size = len(batch[0]) // parts
        return [
            (batch[0][at : at + size], batch[1][at : at + size], batch[2][at : at + size])
            for at in range(0, len(batch[0]), size)
        ]

    def loss(self, model: Callable[..., dict[str, Tensor]], batch: Batch) -> Tensor:
        """The sum of the detector's losses. Which anchors and regions it looks at is drawn, by the batch's seeds."""
        images, targets, seeds = batch
        with drawn_by(keyed_int("regions", *seeds), self.device):
            losses = model(floats(images), targets)
        return torch.stack(list(losses.values())).sum()

    def calibration(self, seed: int) -> Iterator[Tensor]:
        """Augmented photographs as the network's own transform leaves them."""
        size = min(CALIBRATION_BATCH, len(self.train))
        stream = Stream(
            self.train,
            batch_size=size,
            seed=seed,
            worker=-1,
            workers=1,
            num_data_workers=self.data_workers,
            collate=collate,
        )
        transform = image_transform(self.train.image_size, longer(self.train.image_size))
        for step in range(-(-min(CALIBRATION_IMAGES, len(self.train)) // size)):
            yield transform(floats(stream.batch(step)[0]))[0].tensors.to(self.device)

    @torch.inference_mode()
    def test(self, model: nn.Module) -> dict[str, float]:
        measured = AveragePrecision()
        model.eval()
        for items in in_order(self.held_out, TEST_BATCH, num_data_workers=self.data_workers, collate=list):
            images = [image.to(self.device) for image, *_ in items]
            for said, (_, boxes, labels, difficult, _) in zip(model(floats(images)), items, strict=True):
                found = Found(*(said[kind].cpu() for kind in ("boxes", "labels", "scores")))
                measured.add(found, Truth(boxes, labels, difficult))
        return {name: measured.mean(points) for name, points in self.scores.items()}

    def digest(self) -> str:
        return f"{self.train.digest()} {self.held_out.digest()}"


class OnDevice:
    """The batches of a stream, on a device."""

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream, self.device = stream, device

    @property
    def images_per_epoch(self) -> int:
        return self.stream.images_per_epoch

    def batch(self, step: int) -> Batch:
        images, targets, seeds = self.stream.batch(step)
        move = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        return [move(image) for image in images], [{k: move(v) for k, v in one.items()} for one in targets], seeds


def builder(config: NetworkConfig, num_classes: int) -> Callable[[], nn.Module]:
    """What builds the full network of these options. num_classes: of objects, background not among them."""
    body, size = classification.builder(config, 1), image_size(config)  # the class of an image is of no matter
    return lambda: build_detector(body(), num_classes, size, longer(size))


def image_size(config: NetworkConfig) -> int:
    """The shorter side of an image, in pixels."""
    return IMAGE_SIZE if config.image_size is None else config.image_size


def common_shape(config: NetworkConfig) -> tuple[int, int, int]:
    """(channels, height, width) of the tensor that a photograph of 500 x 375 pixels becomes, as most of VOC are."""
    width, height = (-(-side // DIVISOR) * DIVISOR for side in fitted(500, 375, image_size(config)))
    return 3, height, width


def collate(items: list[Item]) -> Batch:
    return (
        [image for image, *_ in items],
        [{"boxes": boxes, "labels": labels} for _, boxes, labels, _, _ in items],
        [seed for *_, seed in items],
    )


def floats(images: list[Tensor]) -> list[Tensor]:
    return [image.float() / 255 for image in images]


@contextlib.contextmanager
def drawn_by(seed: int, device: torch.device) -> Iterator[None]:
    """Inside it torch's generators of the host and of `device` are seeded; they are restored afterwards."""
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=device.type):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        yield
