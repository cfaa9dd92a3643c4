"""BatchNorm policies: the running statistics of the full network.

- `recalibrate`: averaged over the holders, as all float buffers are, and then re-estimated on the full, scaled network.
- `average`: averaged over the holders.
- `batch`: no running statistics, as in the authors' code. Every batch is normalized by its own, at test time too.
"""

import inspect
import re
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from resist.blocks.modules import BatchNorm, buffers_of, children_of, named_modules
from resist.errors import UserError
from resist.planning.plan import keyed_int
from resist.subnet.calibration import Inputs, numbered_inputs
from resist.subnet.randomness import seeded_rng
from resist.subnet.statistics import Estimate, Processes, estimated

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
def recalibrate(
    model: nn.Module,
    batches: Iterable[object] | None,
    device: torch.device,
    *,
    seed: int = 0,
    processes: Processes | None = None,
) -> None:
    """Re-estimate the running statistics of BatchNorm and InstanceNorm layers as the mean over some batches.

    Layers in eval mode are left alone: the user froze them. Buffers of other modules (codebooks, counters), which a
    forward pass may change, are as before. A last batch of one example is part of the batch before it.

    The statistics of each batch are summed in the order of the batches, in double precision. So several processes with
    the same network, each of which takes a share of the batches, get the bits that one process gets.

    Args:
        model: The full network, changed in place. Its modules are in the modes in which it is trained, or all in eval
            mode.
        batches: Training batches: images, (batch, channels, height, width), or dictionaries of keyword arguments of the
            network; or tuples that begin with one of these. Processes that share the work have the same batches.
        device: Device of the model, to which tensors are moved.
        seed: Seed of what the network draws, as dropout does, together with the number of the batch.
        processes: The processes that share the work, all of which call this. Default: this process alone.

    Raises:
        UserError: If there are no batches, a batch is none of these, or a layer gets one value for each channel.
    """
    if batches is None:
        raise UserError(
            "batchnorm='recalibrate' estimates statistics on training batches; call full_model(batches), "
            "or give Job batchnorm='average'"
        )
    was_training = model.training
    if not was_training:
        model.train()
    layers = estimated(model)
    own = {id(layer) for layer in layers}
    kept = [
        (module, key, buffer, buffer.clone())
        for module in model.modules()
        for key, buffer in buffers_of(module).items()
        if buffer is not None and id(module) not in own
    ]
    estimate = Estimate(layers, device)

    def rows() -> Iterator[Tensor]:
        """The statistics of each batch of this process's share."""
        index, count = (processes.index, processes.count) if processes is not None else (0, 1)
        for number, inputs in numbered_inputs(batches, index, count):
            with estimate.batch(), seeded_rng(keyed_int("calibration", seed, number), device):
                _forward(model, inputs, device)
            yield estimate.row(number)

    try:
        if processes is None:
            estimate.fill(rows())
        else:
            shares = processes.gather(lambda: torch.stack([*rows(), estimate.nothing]))
            estimate.fill(sorted((row for share in shares for row in share), key=lambda row: float(row[0])))
    finally:
        for module, key, buffer, value in kept:
            buffers_of(module)[key] = buffer.copy_(value)
        if not was_training:
            model.eval()


def _forward(model: nn.Module, inputs: Inputs, device: torch.device) -> None:
    """Pass a batch through the network; UserError where it does not take it."""
    with refusing_one_value(model, "give batches of at least two examples"):
        if isinstance(inputs, Tensor):
            model(inputs.to(device))
        else:
            _check_names(model, inputs)
            model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()})


@contextmanager
def refusing_one_value(model: nn.Module, remedy: str) -> Generator[None]:
    """Raise UserError where a norm layer cannot compute statistics of one value.

    BatchNorm cannot where a batch of one example reaches it as a single pixel, InstanceNorm at any single pixel.

    Args:
        model: The network whose forward pass runs within this context.
        remedy: The end of the message.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1"):  # value per channel, or spatial element
            raise
        names = {id(module): name for name, module in named_modules(model)}
        layer, trace = "a norm layer", error.__traceback__
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            if isinstance(module, nn.Module) and id(module) in names and not children_of(module):
                layer = f"layer {names[id(module)]} ({type(module).__name__})"
            trace = trace.tb_next
        shape = " x ".join(re.findall(r"\d+", str(error).partition("got input size")[2]))
        raise UserError(
            f"{layer} gets one value for each channel, of which it cannot compute statistics (input {shape}); {remedy}"
        ) from error


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
    return bool(estimated(model))
