"""Tasks: what is trained, on what, and how it is measured."""

from collections.abc import Callable

from torch import nn

from resist.config import NetworkConfig
from resist.data import num_classes_of
from resist.tasks.classification import Classification, builder
from resist.tasks.task import Batches, Task

__all__ = ["Batches", "Classification", "Task", "network_builder", "open_task"]


def open_task(config: NetworkConfig, *, download: bool = True, label_smoothing: float = 0.0) -> Task:
    """The task that these options name, its data loaded or at hand. Raises UserError in one line where they are not."""
    return Classification.open(config, download=download, label_smoothing=label_smoothing)


def network_builder(
    config: NetworkConfig, num_classes: int | None = None, image_size: int | None = None
) -> Callable[[], nn.Module]:
    """What builds the full network of these options, without its data. num_classes, image_size: default, those of the
    data set."""
    classes = num_classes_of(config.data, config.data_dir) if num_classes is None else num_classes
    return builder(config, classes, image_size)
