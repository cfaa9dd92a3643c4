"""Tasks: data, network, loss and metric of a training run."""

from collections.abc import Callable

from torch import nn

from resist.data import DATASETS, image_size_of, num_classes_of
from resist.data.voc import CLASSES, VOC
from resist.errors import UserError
from resist.models.third_party import is_third_party
from resist.runs.config import NetworkConfig
from resist.tasks import classification
from resist.tasks.classification import Classification
from resist.tasks.task import Batches, Task

__all__ = ["Batches", "Classification", "Task", "image_shape", "network_builder", "open_task"]


def open_task(config: NetworkConfig, *, download: bool = True, label_smoothing: float = 0.0) -> Task:
    """Open the task of a configuration, with its data.

    Args:
        config: Options of network and data.
        download: Download missing files; otherwise they are an error.
        label_smoothing: Share of each label that is spread over all classes in training, for classification.

    Raises:
        UserError: Options contradict each other, or files are missing or damaged.
    """
    check(config)
    if config.task == "detection":
        if label_smoothing:
            raise UserError("--label-smoothing has no effect with --task detection; remove it")
        from resist.tasks.detection import Detection  # with torchvision's detector, slow to import

        return Detection.open(config, download=download)
    return Classification.open(config, download=download, label_smoothing=label_smoothing)


def network_builder(
    config: NetworkConfig, num_classes: int | None = None, image_size: int | None = None
) -> Callable[[], nn.Module]:
    """Return the function that builds the full network, without loading data.

    Args:
        config: Options of network and data.
        num_classes: Number of classes; default: that of the data set.
        image_size: Height and width of the images in pixels, for networks that are built for one size; default: those
            of the data set.

    Raises:
        UserError: Options contradict each other, or the classes of a folder cannot be listed.
    """
    check(config)
    if config.task == "detection":
        from resist.tasks import detection

        return detection.builder(config, len(CLASSES) if num_classes is None else num_classes)
    if num_classes is None:
        num_classes = num_classes_of(config.data, config.data_dir)
    return classification.builder(config, num_classes, image_size)


def image_shape(config: NetworkConfig) -> tuple[int, int, int]:
    """Return the (channels, height, width) of an image.

    For detection, it is the shape of the most common photograph.
    """
    if config.task == "detection":
        from resist.tasks import detection

        return detection.common_shape(config)
    size = image_size_of(config.data) if config.image_size is None else config.image_size
    return (3, size, size)


def check(config: NetworkConfig) -> None:
    """Raise UserError for options that the task does not support."""
    if config.task == "detection" and config.data not in VOC:
        problem = "has no boxes" if config.data in DATASETS else "is not known"
        raise UserError(f"--task detection: --data {config.data} {problem}; choose one of {', '.join(VOC)}")
    if config.task == "detection" and is_third_party(config.model):
        raise UserError(
            f"--task detection needs a pre-activation ResNet as its backbone, not --model {config.model}; give for "
            "example --model preact_resnet50_imagenet"
        )
    if config.task != "detection" and config.data in VOC:
        raise UserError(f"--data {config.data} has boxes around objects; it needs --task detection")
    if config.pretrained is not None and config.backbone is not None:
        raise UserError("--pretrained and --backbone both set the initial weights; give one of the two")
    # Options that have no effect with the task.
    unused = {"--splits": bool(config.splits), "--backbone": config.backbone is not None}
    if config.task == "detection":
        unused = {"--final-norm": config.final_norm}
    for flag, given in unused.items():
        if given:
            raise UserError(f"{flag} has no effect with --task {config.task}; remove it")
