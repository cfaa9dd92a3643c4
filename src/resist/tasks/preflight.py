"""Networks of other libraries are tried on two images before anything is trained."""

import torch

from resist.data import image_size_of, num_classes_of
from resist.models.third_party import check_logits, is_foreign
from resist.runs.config import NetworkConfig
from resist.subnet.chains import choose_chains
from resist.subnet.seeded import build_seeded
from resist.subnet.validate import check_network
from resist.tasks import network_builder


def try_network(config: NetworkConfig, num_classes: int | None = None) -> None:
    """Raise UserError where the network of these options does not take the data set's images, gives no logits, or
    breaks a law of `resist.subnet.validate`. Ours are not tried: the tests do that."""
    if not is_foreign(config.model) or config.task != "classification":
        return
    size = config.image_size or image_size_of(config.data)
    classes = num_classes_of(config.data, config.data_dir) if num_classes is None else num_classes
    model = build_seeded(network_builder(config, classes), 0)
    check_logits(model, config.model, size, classes)
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    check_network(model, choose_chains(model, config.chain), lambda network: network(images))
