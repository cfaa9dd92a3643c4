"""Preflight: validate networks of other libraries on two images before training."""

import torch

from resist.data import image_size_of, num_classes_of
from resist.models.third_party import check_logits, is_third_party
from resist.runs.config import NetworkConfig
from resist.subnet.chains import choose_chains
from resist.subnet.seeded import build_seeded
from resist.subnet.validate import check_network
from resist.tasks import network_builder


def try_network(config: NetworkConfig, num_classes: int | None = None) -> None:
    """Validate a third-party network on two images; skip other networks.

    Args:
        config: Options of network and data.
        num_classes: Number of classes; default: that of the data set.

    Raises:
        UserError: The network does not accept the data set's images, does not return logits, or breaks a law of
            `resist.subnet.validate`.
    """
    if not is_third_party(config.model) or config.task != "classification":
        return
    size = config.image_size or image_size_of(config.data)
    classes = num_classes_of(config.data, config.data_dir) if num_classes is None else num_classes
    model = build_seeded(network_builder(config, classes), 0)
    check_logits(model, config.model, size, classes)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    check_network(model, choose_chains(model, config.chain), lambda network: network(images))
