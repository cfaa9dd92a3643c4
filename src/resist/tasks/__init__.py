"""Tasks: what is trained, on what, and how it is measured."""

from collections.abc import Callable

from torch import nn

from resist.config import NetworkConfig
from resist.data import DATASETS, image_size_of, num_classes_of
from resist.data.voc import CLASSES, VOC
from resist.errors import UserError
from resist.tasks import classification, detection
from resist.tasks.classification import Classification
from resist.tasks.detection import Detection
from resist.tasks.task import Batches, Task

__all__ = ["Batches", "Classification", "Detection", "Task", "image_shape", "network_builder", "open_task"]


def open_task(config: NetworkConfig, *, download: bool = True) -> Task:
    """The task that these options name, its data loaded or at hand. Raises UserError in one line where they are not."""
    check(config)
    if config.task != "detection" and config.image_size is not None:
        raise UserError("--image-size says nothing to --task classification; leave it out")
    return (Detection if config.task == "detection" else Classification).open(config, download=download)


def network_builder(config: NetworkConfig, num_classes: int | None = None) -> Callable[[], nn.Module]:
    """What builds the full network of these options, without its data. num_classes: default, those of the data set."""
    check(config)
    if config.task == "detection":
        return detection.builder(config, len(CLASSES) if num_classes is None else num_classes)
    return classification.builder(config, num_classes_of(config.data) if num_classes is None else num_classes)


def image_shape(config: NetworkConfig) -> tuple[int, int, int]:
    """(channels, height, width) of an image, for detection of the photograph that is most common."""
    if config.task == "detection":
        return detection.common_shape(config)
    size = image_size_of(config.data) if config.image_size is None else config.image_size
    return (3, size, size)


def check(config: NetworkConfig) -> None:
    """Raise UserError for a task and a data set, or a task and an option, that do not go together."""
    if config.task == "detection" and config.data not in VOC:
        known = "has no boxes" if config.data in DATASETS else "is not known"
        raise UserError(f"--task detection: --data {config.data} {known}; choose one of {', '.join(VOC)}")
    if config.task != "detection" and config.data in VOC:
        raise UserError(f"--data {config.data} has boxes around objects; it needs --task detection")
    idle = {"--final-norm": config.final_norm} if config.task == "detection" else {
        "--splits": bool(config.splits), "--backbone": config.backbone is not None,
        "--skip-bad-files": config.skip_bad_files,
    }  # fmt: skip
    for flag, given in idle.items():
        if given:
            raise UserError(f"{flag} says nothing to --task {config.task}; leave it out")
