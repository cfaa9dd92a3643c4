"""BatchNorm policies: the running statistics of the full network.

- `recalibrate`: averaged over the holders, as all float buffers are, and then re-estimated on the full, scaled network.
- `average`: averaged over the holders.
- `batch`: no running statistics, as in the authors' code. Every batch is normalized by its own, at test time too.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from resist.blocks.modules import NORMS, BatchNorm, Norm, buffers_of
from resist.errors import UserError

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


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[object] | None, device: torch.device) -> None:
    """Re-estimate the running statistics of BatchNorm and InstanceNorm layers as the mean over some batches.

    Layers in eval mode are left alone: the user froze them. Buffers of other modules (codebooks, counters), which a
    forward pass may change, are as before.

    Args:
        model: The full network, changed in place. Its modules are in the modes in which it is trained, or all in eval
            mode.
        batches: Training batches: images, (batch, channels, height, width), or dictionaries of keyword arguments of the
            network; or tuples that begin with one of these.
        device: Device of the model, to which tensors are moved.

    Raises:
        UserError: If there are no batches, or a batch is none of these.
    """
    if batches is None:
        raise UserError(
            "batchnorm='recalibrate' estimates statistics on training batches; call full_model(batches), "
            "or give Job batchnorm='average'"
        )
    was_training = model.training
    if not was_training:
        model.train()
    layers = _estimated(model)
    own = {id(layer) for layer in layers}
    kept = [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in buffers_of(module).items()
        if buffer is not None and id(module) not in own
    ]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
    try:
        for number, inputs in enumerate(_inputs(batches), start=1):
            for layer in layers:
                layer.momentum = 1 / number  # the mean over the batches so far
            if isinstance(inputs, Tensor):
                model(inputs.to(device))
            else:
                _check_names(model, inputs)
                model(
                    **{key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
                )
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, key, buffer, value in kept:
            buffers_of(module)[key] = buffer.copy_(value)
        if not was_training:
            model.eval()


def _inputs(batches: Iterable[object]) -> Iterator[Tensor | Mapping[str, object]]:
    """Inputs of the network in each batch; UserError without any, which would erase the statistics."""
    batch = None
    for batch in batches:
        type_name = type(batch).__name__
        first: object = next(iter(cast(Sequence[object], batch)), None) if isinstance(batch, list | tuple) else batch
        if not isinstance(first, Tensor | Mapping):
            raise UserError(
                f"full_model got batches of type {type_name}; give tensors, dictionaries of the network's arguments, "
                "or tuples that begin with one"
            )
        yield cast(Tensor | Mapping[str, object], first)
    if batch is None:
        raise UserError("full_model got no batches (an iterator that is used up?); give some training batches")


def _check_names(model: nn.Module, inputs: Mapping[str, object]) -> None:
    """Raise UserError unless a network takes these keyword arguments."""
    try:
        inspect.signature(model.forward).bind(**inputs)
    except TypeError as error:
        raise UserError(
            f"full_model got batches with {', '.join(map(str, inputs)) or 'nothing'}, and the network's forward: "
            f"{error}; give dictionaries of its arguments, or tensors"
        ) from error


def has_running_statistics(model: nn.Module) -> bool:
    """Check for layers whose running statistics `recalibrate` estimates.

    Args:
        model: A network in the modes in which it is trained, or in eval mode as a whole.

    Returns:
        True if a layer has them, and is not frozen.
    """
    return bool(_estimated(model))


def _estimated(model: nn.Module) -> list[Norm]:
    """Norms with running statistics. In a network in training, those in eval mode are frozen, and left out."""
    norms = [module for module in model.modules() if isinstance(module, NORMS) and module.running_mean is not None]
    return [norm for norm in norms if norm.training or not model.training]
