"""What a network holds and computes in a training step, found on the meta device: shapes without numbers.

A whole step is gone through, so whatever the model and the optimizer do is counted, but no weight exists and nothing is
computed. What kernels allocate for themselves (cuDNN's workspaces, say) is not seen.
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

from resist.cost.traffic import Part, Sizes
from resist.errors import UserError
from resist.subnet.chains import Chain
from resist.subnet.network import Subnet
from resist.subnet.seeded import build_seeded

BuildOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
Loss = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step.

    weights, gradients, optimizer: parameters and float buffers; a gradient and the optimizer's state for each.
    activations: what is alive after the forward pass beyond weights and optimizer: what backward needs, and the batch.
    peak:        the most that is alive at one time. Gradients come as activations go, so it is less than the sum.
    buckets:     the copy of all gradients that DistributedDataParallel sends from; `peak` includes it.
    outer:       what an outer optimizer keeps, the round's first weights and its momentum; `peak` includes it.
    replicas:      replicas: the round's first weights and replicas of blocks; `peak` includes it. While workers
                 synchronize there are two, but then no activations.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    buckets: int = 0
    outer: int = 0
    replicas: int = 0


@dataclass(frozen=True)
class Network:
    """A network that a worker trains.

    blocks:       how many it has in each chain.
    training_flops, forward_flops: per image, of a step and of its forward pass; a multiply-add is two of them.
    num_states:   values that the optimizer keeps for each weight.
    """

    blocks: tuple[int, ...]
    parameters: int
    forward_flops: float
    training_flops: float
    num_states: int
    memory: Memory

    @property
    def forward_macs(self) -> float:
        return self.forward_flops / 2


def sgd(parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The paper's optimizer: SGD with momentum and weight decay."""
    return torch.optim.SGD(parameters, lr=0.03, momentum=0.9, weight_decay=5e-4)


def mean_square(model: nn.Module, images: Tensor) -> Tensor:
    """A scalar that depends on everything that the model returns (a tensor, or tuples, lists and dicts of them)."""
    total = images.new_zeros(())
    for output in _tensors(model(images)):
        if output.is_floating_point():
            total = total + output.square().mean()
    return total


def build_on_meta(build_model: Callable[[], nn.Module]) -> nn.Module:
    """`build_model()` without weights, all on the meta device. A model that reads its own weights while it is built
    cannot be built there, so it is built on the host and emptied."""
    try:
        with torch.device("meta"):
            model = build_seeded(build_model, 0)
    except (RuntimeError, NotImplementedError):
        model = build_seeded(build_model, 0)
    return model.to("meta")


def sizes_of(template: nn.Module, chains: Sequence[Chain]) -> Sizes:
    """The parts of a network (on any device), as its sub-networks lay them out."""
    subnet = Subnet(template, chains, [chain.num_blocks for chain in chains], device="meta")
    count = {number: [0, 0] for number in (None, *range(len(subnet.chains)))}
    for parameter, place in subnet.parameter_places():
        if place.slot == 0:
            count[place.chain][0] += parameter.numel()
            count[place.chain][1] += parameter.numel() * parameter.requires_grad
    return Sizes(
        subnet.dtype.itemsize,
        Part(subnet.shared_layout.numel, *count[None]),
        subnet.chains,
        tuple(Part(layout.numel, *count[number]) for number, layout in enumerate(subnet.block_layouts)),
    )


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
    """The footprint of a sub-network with `blocks` blocks in each chain, training on batches of `batch_size` images of
    `image_shape` (channels, height, width). Raises UserError for a model that cannot be run without weights."""
    subnet = Subnet(template, chains, blocks, device="meta")
    model = subnet.model.train()
    images = torch.empty(batch_size, *image_shape, dtype=subnet.dtype, device="meta")
    optimizer = build_optimizer(model.parameters())
    try:
        forward_flops, training_flops = count_flops(model, optimizer, images, loss)
        memory = _memory(subnet, optimizer, images, loss)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the model does not train on images of shape {tuple(image_shape)} without weights: {reason}; give the "
            "shape that it expects, or the loss that it is trained with"
        ) from error
    kinds = {
        kind
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
    }
    return Network(
        tuple(blocks),
        sum(parameter.numel() for parameter in model.parameters()),
        forward_flops / batch_size,
        training_flops / batch_size,
        len(kinds),
        memory,
    )


def count_flops(model: nn.Module, optimizer: Optimizer, images: Tensor, loss: Loss) -> tuple[int, int]:
    """Do one training step; return the floating-point operations of its forward pass and of all of it (those of
    convolutions, matrix products and attention, a multiply-add as two)."""
    with FlopCounterMode(display=False) as counter:
        value = loss(model, images)
        forward = counter.get_total_flops()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not forward:
        raise UserError("the model has no convolution, matrix product or attention: no FLOPs to compare by")
    return forward, counter.get_total_flops()


def _memory(subnet: Subnet, optimizer: Optimizer, images: Tensor, loss: Loss) -> Memory:
    """The bytes of one step. The optimizer's state has to be there already: it is made in the first step."""
    tracker = LiveBytes()
    for tensor in (*subnet.model.parameters(), *subnet.model.buffers()):
        tracker.watch(tensor)
    weights = tracker.live
    for state in optimizer.state.values():
        for value in _tensors(state):
            tracker.watch(value)
    optimizer_bytes = tracker.live - weights
    tracker.watch(images)
    with tracker:
        value = loss(subnet.model, images)
        after_forward = tracker.live
        value.backward()
        optimizer.step()
        gradients = {p.grad.untyped_storage()._cdata: p.grad for p in subnet.model.parameters() if p.grad is not None}
    return Memory(
        weights,
        sum(gradient.untyped_storage().nbytes() for gradient in gradients.values()),
        optimizer_bytes,
        after_forward - weights - optimizer_bytes,
        tracker.peak,
    )


class LiveBytes(TorchDispatchMode):
    """While it is active, counts the bytes of all storages that operations return and that are still alive.

    live, peak: bytes now, and the most at one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def watch(self, tensor: Tensor) -> None:
        """Count the storage of `tensor`, once, until nobody holds it any more."""
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
        for tensor in _tensors(result):
            self.watch(tensor)
        return result


def _tensors(value: object) -> Iterable[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
