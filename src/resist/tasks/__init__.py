"""Tasks: what is trained, on what, and how it is measured."""

from collections.abc import Callable

from torch import nn

from resist.data import DATASETS, image_size_of, num_classes_of
from resist.data.voc import CLASSES, VOC
from resist.errors import UserError
from resist.models.third_party import is_foreign
from resist.runs.config import NetworkConfig
from resist.tasks import classification
from resist.tasks.classification import Classification
from resist.tasks.task import Batches, Task

__all__ = ["Batches", "Classification", "Task", "image_shape", "network_builder", "open_task"]


def open_task(config: NetworkConfig, *, download: bool = True, label_smoothing: float = 0.0) -> Task:
    """The task that these options name, its data loaded or at hand. Raises UserError in one line where they are not."""
    check(config)
    if config.task == "detection":
        if label_smoothing:
            raise UserError("--label-smoothing says nothing to --task detection; leave it out")
        from resist.tasks.detection import Detection  # with torchvision's detector, slow to import

        return Detection.open(config, download=download)
    return Classification.open(config, download=download, label_smoothing=label_smoothing)


def network_builder(
    config: NetworkConfig, num_classes: int | None = None, image_size: int | None = None
) -> Callable[[], nn.Module]:
    """What builds the full network of these options, without its data. num_classes, image_size: default, those of the
    data set."""
    check(config)
    if config.task == "detection":
        from resist.tasks import detection

        return detection.builder(config, len(CLASSES) if num_classes is None else num_classes)
    if num_classes is None:
        num_classes = num_classes_of(config.data, config.data_dir)
    return classification.builder(config, num_classes, image_size)


def image_shape(config: NetworkConfig) -> tuple[int, int, int]:
    """(channels, height, width) of an image, for detection of the photograph that is most common."""
    if config.task == "detection":
        from resist.tasks import detection

        return detection.common_shape(config)
    size = image_size_of(config.data) if config.image_size is None else config.image_size
    return (3, size, size)


def check(config: NetworkConfig) -> None:
    """Raise UserError for a task and a data set, or a task and an option, that do not go together."""
    if config.task == "detection" and config.data not in VOC:
        known = "has no boxes" if config.data in DATASETS else "is not known"
        raise UserError(f"--task detection: --data {config.data} {known}; choose one of {', '.join(VOC)}")
    if config.task == "detection" and is_foreign(config.model):
        raise UserError(
            f"--task detection takes a pre-activation ResNet of ours as its backbone, not --model {config.model}; give "
            "preact_resnet50_imagenet, say"
        )
    if config.task != "detection" and config.data in VOC:
        raise UserError(f"--data {config.data} has boxes around objects; it needs --task detection")
    if config.pretrained is not None and config.backbone is not None:
        raise UserError("--pretrained and --backbone both say what to begin with; give one of the two")
    idle = {"--splits": bool(config.splits), "--backbone": config.backbone is not None}
    for flag, given in ({"--final-norm": config.final_norm} if config.task == "detection" else idle).items():
        if given:
            raise UserError(f"{flag} says nothing to --task {config.task}; leave it out")
