"""What becomes of BatchNorm's running statistics. Policies for the full network:

recalibrate  averaged over holders as all float buffers are, then estimated anew on the full scaled network
average      averaged over holders
batch        there are none, as in the authors' code: each batch's own statistics, at test time too
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from resist.errors import UserError

BATCHNORMS = ("recalibrate", "average", "batch")


def use_batch_statistics(model: nn.Module) -> None:
    """Take the running statistics out of every BatchNorm layer: it then uses the batch's own, at test time too."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None


def recalibrate(model: nn.Module, batches: Iterable[object] | None, device: torch.device) -> None:
    """Estimate all running BatchNorm statistics of `model` anew, as the mean over `batches`."""
    if batches is None:
        raise UserError(
            "batchnorm='recalibrate' estimates statistics on training batches; call full_model(batches), "
            "or give Job batchnorm='average'"
        )
    update_bn(_images(batches), model, device=device)


def _images(batches: Iterable[object]) -> Iterator[Tensor]:
    """What a network takes, of each batch. Raises UserError where there is nothing: the statistics would be lost."""
    batch = None
    for batch in batches:
        images = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(images, Tensor):
            raise UserError(
                f"full_model got batches of type {type(batch).__name__}; give tensors, or tuples that begin with one"
            )
        yield images
    if batch is None:
        raise UserError("full_model got no batches (an iterator that is used up?); give some training batches")


def has_running_statistics(model: nn.Module) -> bool:
    return any(getattr(module, "running_mean", None) is not None for module in model.modules())
