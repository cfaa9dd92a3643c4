"""Preflight: validate networks of other libraries on two images before training."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from resist.blocks.chain import Chain
from resist.blocks.modules import BatchNorm, fork_rng
from resist.checking.validate import choose_checked
from resist.data import image_size_of, num_classes_of
from resist.models.third_party import check_logits, is_third_party
from resist.runs.config import NetworkConfig, TrainConfig
from resist.subnet.batchnorm import refusing_one_value
from resist.subnet.seeded import build_seeded
from resist.tasks import image_shape, network_builder


def example_of(config: NetworkConfig) -> Tensor | bool:
    """Return two images for `resist.job.Job(example=...)`.

    Args:
        config: Options of network and data.

    Returns:
        The images; False for networks of this package. Their chains are found without one, as tests show, and the check
        would delay every start: by 1.3 s of processor time for preact_small, by several for the deeper ones.
    """
    if not is_third_party(config.model) or config.task != "classification":
        return False
    size = config.image_size or image_size_of(config.data)
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0), device="cpu")


def try_network(config: NetworkConfig, num_classes: int | None = None) -> Sequence[Chain] | None:
    """Validate a third-party network as `Job` does; skip other networks.

    Args:
        config: Options of network and data.
        num_classes: Number of classes; default: that of the data set.

    Returns:
        Its chains; None for other networks.

    Raises:
        UserError: The network does not accept the data set's images, does not return logits, or breaks a law of
            `resist.checking.validate`.
    """
    model, images = _tried(config, num_classes)
    return None if model is None else choose_checked(model.train(), config.chain, images)


def try_logits(config: NetworkConfig) -> None:
    """Check that a third-party network returns logits; skip other networks.

    `Job` does the rest.

    Args:
        config: Options of network and data.

    Raises:
        UserError: It does not.
    """
    _tried(config, None)


def check_parts(config: TrainConfig) -> list[str]:
    """Check that the network's norms can train on the parts of a batch, where these are single images.

    Args:
        config: The options.

    Returns:
        Lines for the user.

    Raises:
        UserError: A BatchNorm layer gets a single pixel of a single image.
    """
    o = config.optimization
    if o.batch_size != o.grad_accum_steps or config.network.task == "detection":  # whose feature maps are large
        return []
    model = build_seeded(network_builder(replace(config.network, init_from=None)), 0).train()
    sizes = f"`batch_size={o.batch_size}`" + (f" in {o.grad_accum_steps} parts" if o.batch_size > 1 else "")
    with torch.no_grad(), fork_rng(), refusing_one_value(model, f"{sizes}: give parts of at least two images"):
        model(torch.rand(1, *image_shape(config.network), device="cpu"))
    if any(isinstance(module, BatchNorm) for module in model.modules()):
        return [f"note: {sizes}: BatchNorm normalizes each image by its own statistics"]
    return []


def _tried(config: NetworkConfig, num_classes: int | None) -> tuple[nn.Module | None, Tensor | bool]:
    """A third-party network that maps the example to logits, and the example."""
    images = example_of(config)
    if isinstance(images, bool):
        return None, images
    classes = num_classes_of(config.data, config.data_dir) if num_classes is None else num_classes
    model = build_seeded(network_builder(config, classes), 0)
    check_logits(model, config.model, images.shape[-1], classes)
    return model, images
