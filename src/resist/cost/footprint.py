"""Memory and FLOPs of a training step, measured on the meta device.

A whole step runs on tensors without data, so that everything that the model and the optimizer do is counted, while no
weight exists and nothing is computed. Memory that kernels allocate internally, such as cuDNN's workspaces, is not
counted.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from resist.blocks.chain import Chain
from resist.blocks.chains import choose_chains
from resist.checking.trace import tensors_in
from resist.checking.validate import choose_checked
from resist.cost.states import BuildOptimizer, StateMeter
from resist.errors import UserError, first_line
from resist.subnet.network import Subnet
from resist.subnet.seeded import build_seeded

Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a training step, in bytes.

    Attributes:
        weights: Parameters and float buffers.
        gradients: Gradients of all parameters.
        optimizer: State of the optimizer.
        average: An average of the weights (EMA).
        buckets: Copy of all gradients from which DistributedDataParallel sends.
        outer: State of an outer optimizer: the round's first weights and its momentum.
        replicas: The round's first weights, and replicas of blocks. While workers synchronize there are two of each,
            but no activations.
        changes: What is sent as a change: its numbers at the round's beginning, the errors of the codes, and copies of
            one fragment.
        activations: Tensors that exist after the forward pass in addition to weights and optimizer: those that backward
            needs, and the batch.
        peak: The most that exists at one time, with all of these. Activations are freed as
            gradients appear, so that it is less than the sum.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int = 0
    buckets: int = 0
    outer: int = 0
    replicas: int = 0
    changes: int = 0
    activations: int
    peak: int

    @property
    def kept(self) -> int:
        """Bytes that exist between two steps."""
        return self.weights + self.optimizer + self.average + self.buckets + self.outer + self.replicas + self.changes


@dataclass(frozen=True)
class Network:
    """Footprint of a network that a worker trains.

    Attributes:
        blocks: Number of blocks in each chain.
        parameters: Number of parameters.
        forward_flops: FLOPs of a forward pass per image; a multiply-add counts as two.
        training_flops: FLOPs of a training step per image.
        memory: Bytes of a training step.
    """

    blocks: tuple[int, ...]
    parameters: int
    forward_flops: float
    training_flops: float
    memory: Memory

    @property
    def forward_macs(self) -> float:
        """Multiply-adds of a forward pass per image."""
        return self.forward_flops / 2


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """Return the paper's optimizer: SGD with momentum and weight decay."""
    return torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=5e-4)


def mean_square(model: nn.Module, images: Tensor) -> Tensor:
    """Compute a scalar from all float tensors that the model returns.

    Args:
        model: The network.
        images: (batch, channels, height, width).
    """
    total = images.new_zeros(())
    for output in tensors_in(model(images)):
        if output.is_floating_point():
            total = total + output.square().mean()
    return total


def build_on_meta(build_model: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the meta device, without data in its weights.

    A model whose constructor reads its weights cannot be built there; it is built on the CPU and then moved.
    """
    try:
        model = build_seeded(build_model, 0, "meta")
    except (RuntimeError, NotImplementedError):
        model = build_seeded(build_model, 0)
    return model.to("meta")


def choose(
    build_model: Callable[[], nn.Module], template: nn.Module, chains: str | Sequence[str], example: object
) -> tuple[Chain, ...]:
    """Choose the chains that a `Job` with these arguments partitions.

    Args:
        build_model: Builds the full network, with its weights.
        template: A network that it has built, on any device.
        chains: Names of the chains, as in `Job`.
        example: One batch, as in `Job`. None or False: blocks are tried with guesses, on `template`.

    Raises:
        UserError: There is no such chain, or the network breaks a law of `resist.checking.validate`.
    """
    names = (chains,) if isinstance(chains, str) else tuple(chains)
    if example is None or example is False:
        return choose_chains(template, names)
    return choose_checked(build_seeded(build_model, 0), names, example)


def measure(
    template: nn.Module,
    chains: Sequence[Chain],
    blocks: Sequence[int],
    *,
    batch_size: int,
    image_shape: Sequence[int],
    build_optimizer: BuildOptimizer = sgd,
    loss: Loss = mean_square,
) -> Network:
    """Measure the footprint of a sub-network.

    Args:
        template: The full network, on any device.
        chains: Its chains.
        blocks: Number of blocks that the sub-network has in each chain.
        batch_size: Images in a step.
        image_shape: (channels, height, width).
        build_optimizer: Makes the optimizer from the parameters.
        loss: `loss(model, images)` returns the scalar from which backward starts.

    Raises:
        UserError: The model does not run on the meta device.
    """
    subnet = Subnet(template, chains, blocks, device="meta")
    model = subnet.model.train()
    images = torch.empty(batch_size, *image_shape, dtype=next(subnet.model.parameters()).dtype, device="meta")
    meter = StateMeter(build_optimizer)
    state_bytes = meter.num_bytes(model.parameters())
    # An optimizer that reads numbers, which tensors on the meta device do not have, takes no step here.
    optimizer = None if meter.reads_numbers else build_optimizer(model.parameters())
    try:
        forward_flops, training_flops = count_flops(model, optimizer, images, loss)
        memory = _memory(subnet, optimizer, state_bytes, images, loss)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = first_line(error)
        raise UserError(
            f"the model does not train on images of shape {tuple(image_shape)} on the meta device: {reason}; give "
            "the shape that it expects, or the loss that it is trained with"
        ) from error
    return Network(
        tuple(blocks),
        sum(parameter.numel() for parameter in model.parameters()),
        forward_flops / batch_size,
        training_flops / batch_size,
        memory,
    )


def count_flops(model: nn.Module, optimizer: Optimizer | None, images: Tensor, loss: Loss) -> tuple[int, int]:
    """Run one training step and count its floating-point operations.

    Counted are convolutions, matrix products and attention; a multiply-add counts as two.

    Args:
        model: The network in train mode; the step changes it.
        optimizer: Its optimizer; None: the step is not taken.
        images: (batch, channels, height, width).
        loss: `loss(model, images)` returns the scalar from which backward starts.

    Returns:
        FLOPs of the forward pass, and of the whole step.

    Raises:
        UserError: The model has no such operations.
    """
    with FlopCounterMode(display=False) as counter:
        value = loss(model, images)
        forward = counter.get_total_flops()
        value.backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad()
    if not forward:
        raise UserError("the model has no convolution, matrix product or attention, so that no FLOPs can be compared")
    return forward, counter.get_total_flops()


def _memory(subnet: Subnet, optimizer: Optimizer | None, state_bytes: int, images: Tensor, loss: Loss) -> Memory:
    """Bytes of one step; a first step must have created the optimizer's state."""
    tracker = LiveBytes()
    for tensor in (*subnet.model.parameters(), *subnet.model.buffers()):
        tracker.watch(tensor)
    weights = tracker.live
    in_place_of_state = torch.empty(state_bytes, dtype=torch.uint8, device="meta")
    for value in tensors_in(list(optimizer.state.values())) if optimizer is not None else [in_place_of_state]:
        tracker.watch(value)
    optimizer_bytes = tracker.live - weights
    tracker.watch(images)
    with tracker:
        value = loss(subnet.model, images)
        after_forward = tracker.live
        value.backward()
        if optimizer is not None:
            optimizer.step()
        gradients = {p.grad.untyped_storage()._cdata: p.grad for p in subnet.model.parameters() if p.grad is not None}
    return Memory(
        weights=weights,
        gradients=sum(gradient.untyped_storage().nbytes() for gradient in gradients.values()),
        optimizer=optimizer_bytes,
        activations=after_forward - weights - optimizer_bytes,
        peak=tracker.peak,
    )


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the bytes of live storages.

    Attributes:
        live: Bytes now.
        peak: The most at one time, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self.watch(tensor)
        return result
