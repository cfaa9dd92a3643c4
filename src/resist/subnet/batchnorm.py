"""BatchNorm policies: the running statistics of the full network.

- `recalibrate`: averaged over the holders, as all float buffers are, and then re-estimated on the full, scaled network.
- `average`: averaged over the holders.
- `batch`: no running statistics, as in the authors' code. Every batch is normalized by its own, at test time too.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from resist.errors import UserError
from resist.subnet.modules import BatchNorm

BATCHNORMS = ("recalibrate", "average", "batch")


def use_batch_statistics(model: nn.Module) -> None:
    """Make every BatchNorm layer use the statistics of the batch.

    Args:
        model: Network to change in place.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def recalibrate(model: nn.Module, batches: Iterable[object] | None, device: torch.device) -> None:
    """Re-estimate all running BatchNorm statistics as the mean over some batches.

    Args:
        model: The full network, changed in place.
        batches: Batches of training images, (batch, channels, height, width), or tuples that begin with one.
        device: Device of the model, to which the images are moved.

    Raises:
        UserError: If there are no batches, or a batch is neither a tensor nor a tuple that begins with one.
    """
    if batches is None:
        raise UserError(
            "batchnorm='recalibrate' estimates statistics on training batches; call full_model(batches), "
            "or give Job batchnorm='average'"
        )
    update_bn(_images(batches), model, device=device)


def _images(batches: Iterable[object]) -> Iterator[Tensor]:
    """Images of each batch; UserError without any, which would erase the statistics."""
    batch = None
    for batch in batches:
        type_name = type(batch).__name__
        images: object = next(iter(cast(Sequence[object], batch)), None) if isinstance(batch, list | tuple) else batch
        if not isinstance(images, Tensor):
            raise UserError(f"full_model got batches of type {type_name}; give tensors, or tuples that begin with one")
        yield images
    if batch is None:
        raise UserError("full_model got no batches (an iterator that is used up?); give some training batches")


def has_running_statistics(model: nn.Module) -> bool:
    """Check for layers with running statistics.

    Args:
        model: Any network.

    Returns:
        True if a layer has them.
    """
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())
