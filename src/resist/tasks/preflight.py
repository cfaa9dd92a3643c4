"""Preflight: validate networks of other libraries on two images before training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from resist.blocks.chain import Chain
from resist.checking.validate import choose_checked
from resist.data import image_size_of, num_classes_of
from resist.models.third_party import check_logits, is_third_party
from resist.runs.config import NetworkConfig
from resist.subnet.seeded import build_seeded
from resist.tasks import network_builder


def example_of(config: NetworkConfig) -> Tensor | bool:
    """Return two images for `resist.job.Job(example=...)`.

    Args:
        config: Options of network and data.

    Returns:
        The images; False for networks of this package, which its tests check.
    """
    if not is_third_party(config.model) or config.task != "classification":
        return False
    size = config.image_size or image_size_of(config.data)
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def try_network(config: NetworkConfig, num_classes: int | None = None) -> Sequence[Chain] | None:
    """Validate a third-party network on two images; skip other networks.

    Args:
        config: Options of network and data.
        num_classes: Number of classes; default: that of the data set.

    Returns:
        Its chains; None for other networks.

    Raises:
        UserError: The network does not accept the data set's images, does not return logits, or breaks a law of
            `resist.checking.validate`.
    """
    images = example_of(config)
    if isinstance(images, bool):
        return None
    classes = num_classes_of(config.data, config.data_dir) if num_classes is None else num_classes
    model = build_seeded(network_builder(config, classes), 0)
    check_logits(model, config.model, images.shape[-1], classes)
    return choose_checked(model.train(), config.chain, images)


def try_logits(config: NetworkConfig, num_classes: int | None = None) -> None:
    """Check that a third-party network maps two images to logits, where `Job` does the rest; skip other networks.

    Args:
        config: Options of network and data.
        num_classes: Number of classes; default: that of the data set.

    Raises:
        UserError: It does not.
    """
    images = example_of(config)
    if not isinstance(images, bool):
        classes = num_classes_of(config.data, config.data_dir) if num_classes is None else num_classes
        check_logits(build_seeded(network_builder(config, classes), 0), config.model, images.shape[-1], classes)
