"""Time of a round, from bytes, link and device speed.

`ASSUMPTIONS` lists the assumptions as sentences for the user.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from resist.cost.footprint import Loss, choose, count_flops, mean_square, sgd
from resist.cost.links import PAYLOAD, Links
from resist.cost.states import BuildOptimizer
from resist.cost.traffic import RoundTraffic
from resist.errors import UserError
from resist.planning.fragments import Times
from resist.subnet.network import Subnet
from resist.subnet.seeded import build_seeded
from resist.subnet.tensors import tensors_of

ASSUMPTIONS = (
    "Every worker has its own link, equally fast in both directions unless measured, and the network between them is "
    f"no bottleneck; {PAYLOAD:.1%} of a line rate is payload. Adding and copying received tensors takes no time.",
    "A step of a sub-network takes a fixed share of the full network's step (0 unless calibrated) and a part in "
    "proportion to its training FLOPs; the slowest worker determines the time.",
    "The all-reduces overlap with the two phases of blocks and share the links with them: exchange = (all-reduces + "
    "busiest link of each phase) / rate + latency x the larger of 2 (S - 1) for each all-reduce, 2 for each compressed "
    "mean, and 1 for each phase. Of unequal links the slowest decides in all-reduces, and in a phase the one that is "
    "last; where it was measured, the first half of a compressed mean has the rate of all sending to all. Encoding is "
    "not counted.",
    "Fragments: training waits for what the steps between beginning and end do not hide, for each half of a compressed "
    "mean apart; sending does not slow these steps.",
    "DDP: step = buffers + forward + max(backward, all-reduce of the gradients), with perfect overlap: the first "
    "bucket is ready when backward begins, and none is left when it ends.",
    "Speed is images per second; the accuracy that a strategy reaches with as many images is not predicted.",
)
# Smallest speed in images per second: with much smaller ones seconds are not finite.
LEAST_IMAGES_S = 1e-9


@dataclass(frozen=True)
class Speed:
    """Training speed of a device.

    Attributes:
        images_s: Images per second in training steps of the full network, at least 1e-9.
        fixed: Share of such a step that does not depend on FLOPs, from 0 to below 1. A shallow network takes more time
            than its FLOPs suggest, since early layers move more bytes per FLOP; `calibrate` measures this share.

    Raises:
        UserError: A value is out of bounds.
    """

    images_s: float
    fixed: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.images_s) and self.images_s >= LEAST_IMAGES_S):
            least = f"at least {LEAST_IMAGES_S:g} images per second"
            raise UserError(f"`images_s={self.images_s:g}`; must be {least} and finite")
        if not 0 <= self.fixed < 1:
            raise UserError(f"fixed={self.fixed:g}; must be at least 0 and below 1")

    def step_s(self, batch_size: int, flops_ratio: float) -> float:
        """Return a step's seconds for `flops_ratio` times the full network's FLOPs."""
        return batch_size / self.images_s * (self.fixed + (1 - self.fixed) * flops_ratio)


@dataclass(frozen=True)
class Seconds:
    """Time of a mean round, in seconds.

    Attributes:
        compute: Computation.
        exchange: Exchange that does not overlap with computation.
        hidden: Exchange that overlaps with computation: of fragments with steps, under DDP with backward.
        images_s: Images per second of all workers together.
    """

    compute: float
    exchange: float
    hidden: float
    images_s: float

    @property
    def round(self) -> float:
        """Seconds of the whole round."""
        return self.compute + self.exchange

    @property
    def stall(self) -> float:
        """Share of the round in which devices wait for the exchange, 0 to 1."""
        return self.exchange / self.round


def exchange_s(traffic: RoundTraffic, links: Links, workers: int) -> float:
    """Return the seconds of the synchronization at the end of a round, without fragments that were averaged before.

    Args:
        traffic: Messages of the round.
        links: Connections of the workers.
        workers: Number of workers.
    """
    phases = [links.seconds(phase) for phase in (traffic.average, traffic.hand_over) if phase]
    number, num_bytes = len(traffic.fragments), sum(traffic.fragments)
    plain, encoded = (number, 0) if not traffic.compressed else (0, number)
    allreduces, compressed = traffic.allreduces - plain, traffic.compressed - encoded
    scattered = traffic.scattered - (num_bytes // 2 if encoded else 0)
    hops = max(2 * (workers - 1) * allreduces + 2 * compressed, len(phases))
    means = traffic.ring_bytes - num_bytes + scattered * (1 / links.to_all - 1)
    return means / links.slowest_bytes_s + sum(phases) + hops * links.latency_s


def fragments_s(
    traffic: RoundTraffic, links: Links, workers: int, times: Sequence[Times], step_s: float
) -> tuple[float, float]:
    """Return the seconds of the fragments that are averaged while training goes on.

    Args:
        traffic: Messages of the round.
        links: Connections of the workers.
        workers: Number of workers.
        times: When each fragment goes, by its number.
        step_s: Seconds of computation in a step.

    Returns:
        Seconds that training waits for them, and seconds that are hidden by steps.
    """
    waited = hidden = 0.0
    for num_bytes, own in zip(traffic.fragments, times, strict=False):  # small networks have fewer
        whole = num_bytes / links.slowest_bytes_s
        if traffic.compressed:  # each half has steps of its own
            halves = [
                (whole / 2 / links.to_all + links.latency_s, own.advance - own.begin),
                (whole / 2 + links.latency_s, own.finish - own.advance),
            ]
        else:
            halves = [(whole + 2 * (workers - 1) * links.latency_s, own.finish - own.begin)]
        for seconds, steps in halves:
            hidden += min(seconds, steps * step_s)
            waited += max(0.0, seconds - steps * step_s)
    return waited, hidden


def ddp_step_s(
    traffic: RoundTraffic, links: Links, workers: int, local_steps: int, step_s: float, forward_share: float
) -> tuple[float, float]:
    """Return the seconds of exchange in a step of DistributedDataParallel.

    Args:
        traffic: Messages of a round of `local_steps` steps.
        links: Connections of the workers.
        workers: Number of workers.
        local_steps: Steps of the round.
        step_s: Seconds of computation in a step.
        forward_share: Share of the forward pass in a step, 0 to 1.

    Returns:
        Exchange that is exposed, and exchange that is hidden by backward.
    """
    hops = traffic.allreduces * 2 * (workers - 1)
    gradients = (traffic.ring_bytes / links.slowest_bytes_s + hops * links.latency_s) / local_steps
    buffers = links.seconds(traffic.hand_over) / local_steps
    if buffers:
        buffers += math.ceil(math.log2(workers)) * links.latency_s
    hidden = min(gradients, step_s * (1 - forward_share))
    return buffers + gradients - hidden, hidden


def calibrate(
    build_model: Callable[[], nn.Module],
    *,
    batch_size: int,
    image_shape: Sequence[int],
    chains: str | Sequence[str] = (),
    example: object = None,
    device: torch.device | str = "cpu",
    steps: int = 5,
    build_optimizer: BuildOptimizer = sgd,
    loss: Loss = mean_square,
) -> Speed:
    """Measure the speed of a device.

    Times training steps of the full network on random images, and of the network with one block in each chain, from
    which the share of a step that does not depend on FLOPs follows. One step of each warms up the device.

    Args:
        build_model: Builds the full network.
        batch_size: Images in a step.
        image_shape: (channels, height, width) of an image.
        chains: Names of the chains, as in `Job`.
        example: One batch, as in `Job`. Default: blocks are tried with guesses.
        device: The device.
        steps: Number of steps to time, of which the median counts; at least 1.
        build_optimizer: Makes the optimizer from the parameters.
        loss: `loss(model, images)` returns the scalar from which backward starts.

    Raises:
        UserError: `steps` is below 1, or the model has no such chain or no FLOPs.
    """
    if steps < 1:
        raise UserError(f"steps={steps}; must be at least 1")
    full = build_seeded(build_model, 0)
    chosen = choose(build_model, full, chains, example)
    measured: list[tuple[float, int]] = []
    for blocks in ([chain.num_blocks for chain in chosen], [1] * len(chosen)):
        subnet = Subnet(full, chosen, blocks, device=device, channels_last=True)  # as `resist train` has it
        subnet.load(tensors_of(full), [range(held) for held in blocks])
        images = torch.randn(batch_size, *image_shape, dtype=next(subnet.model.parameters()).dtype, device=device)
        images = images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images
        model = subnet.model.train()
        optimizer = build_optimizer(model.parameters())
        flops = count_flops(model, optimizer, images, loss)[1]  # the step that warms up
        measured.append((median_step_s(model, optimizer, images, loss, steps), flops))
    (full_s, full_flops), (shallow_s, shallow_flops) = measured
    saved = 1 - shallow_flops / full_flops
    fixed = 1 - (1 - shallow_s / full_s) / saved if saved else 0.0  # nothing is saved if the model is already shallow
    return Speed(batch_size / full_s, min(max(fixed, 0.0), 0.99))


def median_step_s(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, loss: Loss, steps: int
) -> float:
    """Return the median seconds of some training steps, after the work that the device already has."""
    times = [_now(images.device)]  # after the step that warms up
    for _ in range(steps):
        loss(model, images).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(_now(images.device))
    return statistics.median(end - start for start, end in pairwise(times))


def _now(device: torch.device) -> float:
    """The time in seconds at which the device has finished its work. Waits for it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
