"""Seconds, from bytes, a link and the speed of a device. Assumptions are in `ASSUMPTIONS`, in words, for the reader."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from resist.cost.footprint import BuildOptimizer, Loss, count_flops, mean_square, sgd
from resist.cost.traffic import RoundTraffic
from resist.errors import UserError
from resist.subnet.chains import choose_chains
from resist.subnet.network import Subnet, tensors_of
from resist.subnet.seeded import build_seeded

# Of a full-sized Ethernet frame with its preamble and gap (1538 bytes), what TCP over IPv4 with timestamps carries.
PAYLOAD = 1448 / 1538

ASSUMPTIONS = (
    "Every worker has a link of its own, as fast in as out, and the network between them is no bottleneck; "
    f"{PAYLOAD:.1%} of the line rate is payload. Adding and copying what arrives takes no time.",
    "A step of a sub-network takes a fixed share of the full network's step (0 unless calibrated), the rest in "
    "proportion to training FLOPs; the slowest worker decides.",
    "The all-reduces run beside the two phases of blocks and share the links with them: exchange = (all-reduces + "
    "busiest link of each phase) / rate + latency x the larger of 2 (S - 1) for each all-reduce and 1 for each phase.",
    "DDP: step = buffers + forward + max(backward, all-reduce of the gradients), as if the first bucket were ready "
    "when backward begins and none were left when it ends: the best that overlap can do.",
    "Speed is images seen; what an image teaches under a strategy is not predicted.",
)


@dataclass(frozen=True)
class Link:
    """A worker's connection: line rate in Gbit/s each way, and the one-way latency in ms."""

    gbit_s: float
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gbit_s) and self.gbit_s > 0):
            raise UserError(f"link_gbit_s={self.gbit_s:g} is not a rate; give more than 0 Gbit/s")
        if not (math.isfinite(self.latency_ms) and self.latency_ms >= 0):
            raise UserError(f"latency_ms={self.latency_ms:g} is not a latency; give 0 ms or more")

    @property
    def bytes_s(self) -> float:
        return self.gbit_s * 1e9 / 8 * PAYLOAD

    @property
    def latency_s(self) -> float:
        return self.latency_ms / 1e3


@dataclass(frozen=True)
class Speed:
    """How fast a device trains.

    images_s: images per second through training steps of the full network.
    fixed:    the share of such a step that a network without FLOPs would still take. A shallow network is dearer than
              its FLOPs say, since early layers move more bytes for each; `calibrate` measures by how much.
    """

    images_s: float
    fixed: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.images_s) and self.images_s > 0):
            raise UserError(f"images_s={self.images_s:g} is not a speed; give more than 0 images per second")
        if not 0 <= self.fixed < 1:
            raise UserError(f"fixed={self.fixed:g} is not a share of a step; give 0 to below 1")

    def step_s(self, batch_size: int, flops_ratio: float) -> float:
        """A step of a network with `flops_ratio` times the training FLOPs of the full one."""
        return batch_size / self.images_s * (self.fixed + (1 - self.fixed) * flops_ratio)


@dataclass(frozen=True)
class Seconds:
    """A mean round: compute, and the exchange that nothing hides; `hidden`: exchange beneath backward (DDP only).

    images_s: images per second of all workers together.
    """

    compute: float
    exchange: float
    hidden: float
    images_s: float

    @property
    def round(self) -> float:
        return self.compute + self.exchange


def exchange_s(traffic: RoundTraffic, link: Link, workers: int) -> float:
    """The synchronization between two rounds."""
    phases = [max(phase.values()) for phase in (traffic.average, traffic.hand_over) if phase]
    hops = max(2 * (workers - 1) * traffic.allreduces, len(phases))
    return (traffic.ring_bytes + sum(phases)) / link.bytes_s + hops * link.latency_s


def ddp_step_s(
    traffic: RoundTraffic, link: Link, workers: int, local_steps: int, step_s: float, forward_share: float
) -> tuple[float, float]:
    """(exposed, hidden) seconds of exchange in each step of DistributedDataParallel, which computes for `step_s`."""
    hops = traffic.allreduces * 2 * (workers - 1)
    gradients = (traffic.ring_bytes / link.bytes_s + hops * link.latency_s) / local_steps
    buffers = max(traffic.hand_over.values(), default=0) / local_steps / link.bytes_s
    if buffers:
        buffers += math.ceil(math.log2(workers)) * link.latency_s
    hidden = min(gradients, step_s * (1 - forward_share))
    return buffers + gradients - hidden, hidden


def calibrate(
    build_model: Callable[[], nn.Module],
    *,
    batch_size: int,
    image_shape: Sequence[int],
    chains: Sequence[str] = (),
    device: torch.device | str = "cpu",
    steps: int = 5,
    build_optimizer: BuildOptimizer = sgd,
    loss: Loss = mean_square,
) -> Speed:
    """Measure this device: the median of `steps` training steps of the full network on random images, after one to warm
    up, and as many of the network with a single block in each chain, which shows what a step takes beside FLOPs."""
    if steps < 1:
        raise UserError(f"steps={steps} is not a number of steps to time; give at least 1")
    full = build_seeded(build_model, 0)
    chosen = choose_chains(full, tuple(chains))
    measured: list[tuple[float, int]] = []
    for blocks in ([chain.num_blocks for chain in chosen], [1] * len(chosen)):
        subnet = Subnet(full, chosen, blocks, device=device)
        subnet.load(tensors_of(full), [range(held) for held in blocks])
        images = torch.randn(batch_size, *image_shape, dtype=subnet.dtype, device=device)
        model = subnet.model.train()
        optimizer = build_optimizer(model.parameters())
        flops = count_flops(model, optimizer, images, loss)[1]
        measured.append((_median_step_s(model, optimizer, images, loss, steps), flops))
    (full_s, full_flops), (shallow_s, shallow_flops) = measured
    saved = 1 - shallow_flops / full_flops
    fixed = 1 - (1 - shallow_s / full_s) / saved if saved else 0.0  # a model may be shallow already
    return Speed(batch_size / full_s, min(max(fixed, 0.0), 0.99))


def _median_step_s(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, loss: Loss, steps: int
) -> float:
    seconds: list[float] = []
    for _ in range(steps):
        start = time.perf_counter()
        loss(model, images).backward()
        optimizer.step()
        optimizer.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)  # waits for the device: the step is over
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
