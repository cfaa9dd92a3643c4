"""Image classification: cross entropy loss, top-1 and top-5 accuracy."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resist.data import Images, Mixed, Photographs, Sampler, image_size_of, load
from resist.data.readers import allowed_readers
from resist.models import build, read_model_args
from resist.models.pretrained import start_from
from resist.models.third_party import is_third_party
from resist.runs.config import NetworkConfig, OptimizationConfig
from resist.subnet.batchnorm import refusing_one_value
from resist.subnet.calibration import NumberedBatches
from resist.subnet.statistics import Processes
from resist.tasks.task import Batches, gathered

# Training images on which BatchNorm statistics are re-estimated.
CALIBRATION_IMAGES = 5000
# Images in a batch of them; fewer photographs, which are large.
CALIBRATION_BATCH, CALIBRATION_PHOTOGRAPHS = 250, 100
# The paper tests with batches of 100, which matters where the network uses the statistics of the test batch.
TEST_BATCH = 100
# Smallest number of classes for which top-5 accuracy is reported.
TOP5_CLASSES = 20


@dataclass(frozen=True)
class Classification:
    """Task of classifying images; see `Task` for the methods.

    A batch is (images (batch, channels, height, width) float32, labels (batch,) int64). Labels of mixed images are
    shares of the classes, (batch, num_classes) float32.

    Attributes:
        build: Builds the full network.
        train: Training images.
        held_out: Test images.
        label_smoothing: Share of each label that is spread over all classes in training.
        mixup: Parameter of the Beta distribution by which pairs of training images are mixed; 0: none.
        cutmix: The same for pasting a part of one image into another.
        notes: Lines for the user before training.
    """

    build: Callable[[], nn.Module]
    train: Images | Photographs
    held_out: Images | Photographs
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    notes: tuple[str, ...] = ()

    @staticmethod
    def open(config: NetworkConfig, optimization: OptimizationConfig, *, download: bool = True) -> "Classification":
        """Open the data of a configuration; see `resist.tasks.open_task`."""
        train, held_out = load(
            config.data,
            config.data_dir,
            download=download,
            image_size=config.image_size,
            data_workers=allowed_readers(config.data_workers),
            skip_bad_files=config.skip_bad_files,
            rand_augment=optimization.rand_augment,
        )
        build_model, notes = builder(config, train.num_classes), (*train.notes, *held_out.notes)
        if config.init_from is not None:
            with torch.device("meta"):
                notes += (start_from(build_model(), config.init_from),)
        o = optimization
        return Classification(build_model, train, held_out, o.label_smoothing, o.mixup, o.cutmix, notes)

    @property
    def num_images(self) -> int:
        return len(self.train)

    def network(self) -> nn.Module:
        return self.build()

    def to(self, device: torch.device | str, *, channels_last: bool | None = None) -> "Classification":
        train, held_out = (data.to(device, channels_last=channels_last) for data in (self.train, self.held_out))
        return replace(self, train=train, held_out=held_out)

    def batches(self, sampler: Sampler) -> Batches:
        loader = self.train.loader(sampler)
        if not (self.mixup or self.cutmix):
            return loader
        return Mixed(loader, sampler, self.train.num_classes, mixup=self.mixup, cutmix=self.cutmix)

    def split(self, batch: tuple[Tensor, Tensor], parts: int) -> list[tuple[Tensor, Tensor]]:
        images, labels = batch
        return list(zip(images.chunk(parts), labels.chunk(parts), strict=True))

    def loss(self, model: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)

    @property
    def test_images(self) -> tuple[int, int, int]:
        num_images, size = self._calibration_size
        return num_images, len(self.held_out), max(size, TEST_BATCH)

    @property
    def _calibration_size(self) -> tuple[int, int]:
        """Images of the calibration, and those of a batch."""
        if isinstance(self.train, Photographs):  # no image twice, since reading is slow
            return min(CALIBRATION_IMAGES, len(self.train)), min(CALIBRATION_PHOTOGRAPHS, len(self.train))
        return CALIBRATION_IMAGES, min(CALIBRATION_BATCH, len(self.train))

    def calibration(self, seed: int) -> NumberedBatches:
        """Return training images with training augmentation, to match the training statistics."""
        num_images, size = self._calibration_size
        sampler = Sampler(len(self.train), batch_size=size, seed=seed, worker=-1, workers=1)  # -1: of no worker

        def read(steps: range) -> Iterator[Tensor]:
            loader = self.batches(sampler)
            for step in steps:
                yield loader.batch(step)[0]

        return NumberedBatches(-(-num_images // size), read)

    def test(self, model: nn.Module, processes: Processes | None = None) -> dict[str, float]:
        model.eval()
        parts = gathered(processes, lambda share: hits(model, self.held_out.batches(TEST_BATCH, share=share)))
        total, *right = torch.stack(parts).sum(0).tolist()
        top1, top5 = (number / total for number in right)
        return {"accuracy": top1, **({"top5": top5} if self.train.num_classes >= TOP5_CLASSES else {})}

    def digest(self) -> str:
        return f"{self.train.digest()} {self.held_out.digest()}"


def builder(config: NetworkConfig, num_classes: int, image_size: int | None = None) -> Callable[[], nn.Module]:
    """Return the function that builds the full network of a configuration.

    Args:
        config: Options of network and data.
        num_classes: Number of logits.
        image_size: Height and width of the images in pixels; default: that of the data set.
    """
    arguments = read_model_args(config.model, config.model_args)

    def build_model() -> nn.Module:
        size = image_size or config.image_size
        if size is None and is_third_party(config.model):  # our own networks accept images of any size
            size = image_size_of(config.data)
        model = build(config.model, num_classes=num_classes, image_size=size, **arguments)
        # On the meta device there are no weights to fill, and the file may be missing.
        if config.init_from is not None and not next(model.parameters()).is_meta:
            start_from(model, config.init_from)
        return model

    return build_model


@torch.inference_mode()
def hits(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Count correct classifications.

    Args:
        model: Network in eval mode that maps images to logits (batch, num_classes).
        batches: Images (batch, channels, height, width) and labels (batch,), on the network's device.

    Returns:
        (3,) int64 on the CPU: number of images, of those whose first class is right, and of those with the right one
        among the first five.
    """
    num, right = 0, list[Tensor]()  # on the network's device, which works ahead
    for images, labels in batches:
        with refusing_one_value(model, "test on at least two images, or give another `batchnorm`"):
            scores = model(images)
        hit = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
        num += len(labels)
        right.append(torch.stack([hit[:, 0].sum(), hit.sum()]))
    top1, top5 = torch.stack(right).sum(0).tolist() if right else (0, 0)  # waits for the device
    return torch.tensor([num, top1, top5], device="cpu")
