"""Tasks: data, network, loss and metric of a training run."""

from collections.abc import Callable

from torch import nn

from resist.data import image_size_of, num_classes_of
from resist.data.annotation import CLASSES
from resist.errors import UserError
from resist.models import read_model_args
from resist.models.third_party import is_third_party
from resist.runs.config import NetworkConfig, OptimizationConfig
from resist.runs.recipe import STREAMED
from resist.tasks import classification
from resist.tasks.classification import Classification
from resist.tasks.task import Batches, Task

__all__ = ["Batches", "Classification", "Task", "image_shape", "largest_test_batch", "network_builder", "open_task"]


def open_task(config: NetworkConfig, optimization: OptimizationConfig | None = None, *, download: bool = True) -> Task:
    """Open the task of a configuration, with its data.

    Args:
        config: Options of network and data.
        optimization: Options of training: label smoothing, mixed and augmented images. Default: none of them.
        download: Download missing files; otherwise they are an error.

    Raises:
        UserError: Options contradict each other, or files are missing or damaged.
    """
    check(config)
    optimization = optimization or OptimizationConfig()
    if config.task == "detection":
        if optimization.label_smoothing:
            raise UserError(f"`label_smoothing` has no effect with `data={config.data}`; remove it")
        from resist.tasks.detection import Detection  # with torchvision's detector, slow to import

        return Detection.open(config, download=download)
    return Classification.open(config, optimization, download=download)


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


def largest_test_batch(config: NetworkConfig) -> int:
    """Return the images in the largest batch of a test, statistics included; see `Task.test_images`."""
    if config.task == "detection":
        from resist.tasks import detection

        return max(detection.CALIBRATION_BATCH, detection.TEST_BATCH)
    streamed = config.data in STREAMED
    size = classification.CALIBRATION_PHOTOGRAPHS if streamed else classification.CALIBRATION_BATCH
    return max(size, classification.TEST_BATCH)


def check(config: NetworkConfig) -> None:
    """Raise UserError for options that the task does not support."""
    if config.task == "detection" and is_third_party(config.model):
        raise UserError(
            f"`data={config.data}` needs a pre-activation ResNet as the detector's backbone, not "
            f"`model={config.model}`; give for example `model=preact_resnet50_imagenet`"
        )
    if config.task != "detection" and config.splits:
        raise UserError(f"`splits` has no effect with `data={config.data}`; remove it")
    if config.task == "detection" and "final_norm" in read_model_args(config.model, config.model_args):
        raise UserError(f"`model_args=final_norm` has no effect with `data={config.data}`; remove it")
    if config.init_from is not None and read_model_args(config.model, config.model_args).get("zero_init"):
        raise UserError("`model_args=zero_init` has no effect with `init_from`, whose weights are used; remove it")
