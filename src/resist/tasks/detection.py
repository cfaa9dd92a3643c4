"""Object detection: losses of Faster R-CNN, average precision of PascalVOC."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from resist.data.annotation import CLASSES
from resist.data.image_folder import MEAN, STD
from resist.data.loader import Stream, in_order
from resist.data.readers import allowed_readers
from resist.data.sampler import Sampler
from resist.data.spans import Share, spans
from resist.data.voc import IMAGE_SIZE, Item, VocSet, fitted, load_voc, longer
from resist.models.faster_rcnn import build_detector
from resist.models.pretrained import start_from
from resist.planning.plan import keyed_int
from resist.runs.config import NetworkConfig
from resist.subnet.batchnorm import refusing_one_value
from resist.subnet.calibration import NumberedBatches
from resist.subnet.randomness import seeded_rng
from resist.subnet.statistics import Processes
from resist.tasks import classification
from resist.tasks.backbone import BackboneInit
from resist.tasks.task import Batches, gathered
from resist.tasks.voc_ap import AveragePrecision, Found

# Training photographs on which BatchNorm statistics are re-estimated, how many in a batch of them, and in a test batch.
CALIBRATION_IMAGES, CALIBRATION_BATCH, TEST_BATCH = 512, 8, 8
# The detector pads height and width of a batch to multiples of this.
DIVISOR = 32

# Images, each (3, height, width) uint8; targets, each with `boxes` and `labels`; a seed for each image.
Batch = tuple[list[Tensor], list[dict[str, Tensor]], list[int]]


@dataclass(frozen=True)
class Detection:
    """Task of detecting objects in photographs; see `Task` for the methods.

    Attributes:
        build: Builds the full network with fresh weights.
        train: Training photographs.
        held_out: Test photographs.
        scores: Name of each score of `test`, and its `points` in `voc_ap.ap`.
        start: Initial weights of the backbone; None: fresh ones.
        data_workers: Processes that read for each stream of batches; 0: this process reads.
        notes: Lines for the user before training.
        device: Device of the batches.
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
        """Open the data of a configuration; see `resist.tasks.open_task`."""
        train, held_out = load_voc(
            config.data,
            config.data_dir,
            image_size=config.image_size,
            splits=config.splits,
            skip_bad_files=config.skip_bad_files,
            download=download,
        )
        scores: dict[str, int | None] = {"AP50 (11 points)": 11, "AP50 (area)": None}
        if config.data != "voc2007":  # the main score is the one that the challenge used in that year
            scores = dict(reversed(scores.items()))
        start = BackboneInit.read(Path(config.init_from or "")) if _from_run(config) else None
        build, notes = builder(config, len(CLASSES)), (*train.notes, *held_out.notes)
        with torch.device("meta"):
            if start is not None:
                start.check(build())
            elif config.init_from is not None:
                notes += (start_from(classification.builder(config, 1)(), config.init_from),)
        return Detection(build, train, held_out, scores, start, allowed_readers(config.data_workers), notes)

    @property
    def num_images(self) -> int:
        return len(self.train)

    def network(self) -> nn.Module:
        model = self.build()
        if self.start is not None:
            self.start.fill(model)
        return model

    def to(self, device: torch.device | str, *, channels_last: bool | None = None) -> "Detection":
        # The network makes batches of photographs of different sizes itself; its first convolution gives them the
        # memory format of its weights.
        return replace(self, device=torch.device(device))

    def batches(self, sampler: Sampler) -> Batches:
        stream = Stream(
            self.train,
            sampler,
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
        """Compute the sum of the detector's losses.

        The batch's seeds decide which anchors and regions are sampled.
        """
        images, targets, seeds = batch
        with seeded_rng(keyed_int("regions", *seeds), self.device):
            losses = model(floats(images), targets)
        return torch.stack(list(losses.values())).sum()

    @property
    def test_images(self) -> tuple[int, int, int]:
        return min(CALIBRATION_IMAGES, len(self.train)), len(self.held_out), max(CALIBRATION_BATCH, TEST_BATCH)

    def calibration(self, seed: int) -> NumberedBatches:
        """Return augmented, transformed photographs, (batch, 3, height, width)."""
        size = min(CALIBRATION_BATCH, len(self.train))
        sampler = Sampler(len(self.train), batch_size=size, seed=seed, worker=-1, workers=1)  # -1: of no worker
        transform = image_transform(self.train.image_size)

        def read(steps: range) -> Iterator[Tensor]:
            stream = Stream(self.train, sampler, num_data_workers=self.data_workers, collate=collate)
            for step in steps:
                yield transform(floats(stream.batch(step)[0]))[0].tensors.to(self.device)

        return NumberedBatches(-(-min(CALIBRATION_IMAGES, len(self.train)) // size), read)

    def test(self, model: nn.Module, processes: Processes | None = None) -> dict[str, float]:
        model.eval()
        rows = torch.cat(gathered(processes, lambda share: self._detect(model, share)))
        precision, counts = AveragePrecision(), torch.bincount(rows[:, 0].long(), minlength=len(self.held_out))
        for index, found in enumerate(rows[:, 1:].split(counts.tolist())):
            precision.add(Found(found[:, :4], found[:, 4].long(), found[:, 5]), self.held_out.objects(index))
        return {name: precision.mean(points) for name, points in self.scores.items()}

    @torch.inference_mode()
    def _detect(self, model: nn.Module, share: Share) -> Tensor:
        """Detections in a share of the test images.

        Returns:
            (detections, 7) float64: index of the image, left, top, right, bottom, class, score.
        """
        indices = itertools.chain(*share.of(spans(len(self.held_out), TEST_BATCH)))
        rows = [torch.zeros(0, 7, dtype=torch.float64, device="cpu")]
        pinned = self.device.type == "cuda"
        options = {"num_data_workers": self.data_workers, "collate": list, "pin_memory": pinned, "share": share}
        for items in in_order(self.held_out, TEST_BATCH, **options):
            images = [image.to(self.device, non_blocking=True) for image, *_ in items]
            with refusing_one_value(model, "test on at least two photographs, or give another `batchnorm`"):
                outputs = model(floats(images))
            found: list[Tensor] = []
            for output, index in zip(outputs, indices):  # noqa: B905 - the indices of all batches
                boxes, labels, scores = (output[key].double() for key in ("boxes", "labels", "scores"))
                place = torch.full_like(scores, index)
                found.append(torch.cat([place[:, None], boxes, labels[:, None], scores[:, None]], dim=1))
            rows.append(torch.cat(found).cpu())  # waits for the device
        return torch.cat(rows)

    def digest(self) -> str:
        return f"{self.train.digest()} {self.held_out.digest()}"


class OnDevice:
    """Batches of a stream, moved to a device.

    Args:
        stream: Batches in CPU memory.
        device: Device of the returned batches.
    """

    def __init__(self, stream: Stream, device: torch.device) -> None:
        self.stream, self.device = stream, device

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, images and targets on the device."""
        images, targets, seeds = self.stream.batch(step)
        move = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        on_device = [{name: move(tensor) for name, tensor in target.items()} for target in targets]
        return [move(image) for image in images], on_device, seeds


def builder(config: NetworkConfig, num_classes: int) -> Callable[[], nn.Module]:
    """Return the function that builds the full network of a configuration.

    Args:
        config: Options of network and data.
        num_classes: Number of classes of objects, without background.
    """
    of_body = replace(config, init_from=None) if _from_run(config) else config
    body, size = classification.builder(of_body, 1), image_size(config)  # its head, of one class, is removed
    return lambda: build_detector(body(), num_classes, image_transform(size))


def image_transform(size: int) -> GeneralizedRCNNTransform:
    """Return the transform of a detector's input: normalize, resize to a shorter side of `size` pixels, pad."""
    return GeneralizedRCNNTransform(size, longer(size), list(MEAN), list(STD))


def _from_run(config: NetworkConfig) -> bool:
    """Return True where the initial weights are those of a run, not of a file of timm."""
    return config.init_from is not None and not config.init_from.startswith("timm:")


def image_size(config: NetworkConfig) -> int:
    """Return the length in pixels of resized images' shorter side."""
    return IMAGE_SIZE if config.image_size is None else config.image_size


def common_shape(config: NetworkConfig) -> tuple[int, int, int]:
    """Return the (channels, height, width) of the network's usual input.

    It belongs to photographs of 500 x 375 pixels, the most common size in VOC.
    """
    width, height = (-(-side // DIVISOR) * DIVISOR for side in fitted(500, 375, image_size(config)))
    return 3, height, width


def collate(items: list[Item]) -> Batch:
    """Make a batch from items of a `VocSet`."""
    return (
        [image for image, *_ in items],
        [{"boxes": boxes, "labels": labels} for _, boxes, labels, _, _ in items],
        [seed for *_, seed in items],
    )


def floats(images: list[Tensor]) -> list[Tensor]:
    """Convert images (3, height, width) uint8 to float32 in 0..1."""
    return [image.float() / 255 for image in images]
