"""Cost of a test of the full network, by one process or by all, and the choice between the two.

A test assembles the network, estimates BatchNorm statistics, and classifies the test images. If all processes take
part, each needs memory for the network and the bytes to get it, and does its share of the batches. Where processes
share the cores of a machine, as many of them compute at once as the cores allow.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from resist.blocks.chain import Chain
from resist.cost.footprint import LiveBytes
from resist.report.units import amount
from resist.subnet.network import Subnet


@dataclass(frozen=True, kw_only=True)
class Process:
    """What a process has for tests.

    Attributes:
        place: The machine and the device, as in "host1 cpu".
        at_once: Processes that can compute at once in that place: its cores divided by the threads of a process.
        free_bytes: Free memory of that place.
        fetch_bytes: Bytes of the full network that the process gets from others.
        link_bytes_s: Measured bytes per second from other processes; None: they share a machine.
    """

    place: str
    at_once: int
    free_bytes: int
    fetch_bytes: int
    link_bytes_s: float | None = None

    @property
    def fetch_s(self) -> float:
        """Seconds to get the full network."""
        return 0.0 if self.link_bytes_s is None else self.fetch_bytes / self.link_bytes_s


@dataclass(frozen=True)
class Choice:
    """Who tests the full network.

    Attributes:
        everywhere: All processes take part; otherwise only the first one.
        reason: The reason, for the records of the run.
        seconds: Predicted seconds of a test.
    """

    everywhere: bool
    reason: str
    seconds: float


def choose_testers(processes: Sequence[Process], *, busy_s: float, memory_bytes: int, wanted: str = "auto") -> Choice:
    """Choose who tests the full network.

    Args:
        processes: All processes, the first one first.
        busy_s: Seconds of a test by the first process, once it has the network, while all others compute too.
        memory_bytes: Memory that a process needs for a test.
        wanted: "all", "one", or "auto" for all where memory suffices and it takes less time.
    """
    sharing = Counter(process.place for process in processes)
    in_place = {place: min(number, _at_once(processes, place)) for place, number in sharing.items()}
    at_once, first = sum(in_place.values()), processes[0].place
    alone_s = busy_s * in_place[first] / sharing[first]  # it has a core, or the device, for itself
    one = Choice(False, "", alone_s + processes[0].fetch_s)
    together_s = alone_s / at_once + max(process.fetch_s for process in processes)
    if len(processes) == 1:
        return Choice(False, "there is one process", one.seconds)
    if wanted != "auto":
        return Choice(wanted == "all", f"evaluation={wanted}", together_s if wanted == "all" else one.seconds)
    for number, process in enumerate(processes):
        if (needed := sharing[process.place] * memory_bytes) > process.free_bytes:
            reason = f"{process.place} has {amount(process.free_bytes)} free, the network in its processes would need "
            return Choice(False, f"process {number}: {reason}{amount(needed)}", one.seconds)
    if at_once < 2:
        return Choice(False, "the processes share one device, or too few cores", one.seconds)
    if together_s >= one.seconds:
        slowest = max(process.fetch_s for process in processes)
        return Choice(False, f"getting the network takes {slowest:.1f} s over the slowest link", one.seconds)
    return Choice(True, f"{at_once} processes compute at once", together_s)


def _at_once(processes: Sequence[Process], place: str) -> int:
    return max(1, min(process.at_once for process in processes if process.place == place))


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass without gradients.

    Attributes:
        flops: FLOPs per image.
        peak_bytes: The most that exists at one time, without the weights.
    """

    flops: float
    peak_bytes: int


@torch.no_grad()
def forward_pass(
    template: nn.Module, chains: Sequence[Chain], blocks: Sequence[int], batch_size: int, image_shape: Sequence[int]
) -> ForwardPass | None:
    """Measure a forward pass on the meta device.

    Args:
        template: The full network, on any device.
        chains: Its chains.
        blocks: Number of blocks of each chain in the network to measure.
        batch_size: Images in a batch.
        image_shape: (channels, height, width).

    Returns:
        The measurement; None for a network that does not take a tensor of images there.
    """
    live = LiveBytes()
    try:
        model = Subnet(template, chains, blocks, device="meta").model.eval()
        images = torch.empty(batch_size, *image_shape, dtype=next(model.parameters()).dtype, device="meta")
        with FlopCounterMode(display=False) as counter, live:
            live.watch(images)
            model(images)
    except Exception:  # any: the network expects other inputs, or reads numbers, which there are none of
        return None
    return ForwardPass(counter.get_total_flops() / batch_size, live.peak)


def num_tests(run_s: float, test_s: float, most: int, share: float = 0.1) -> int:
    """Return how many tests cost less than a share of a run, at least one.

    Args:
        run_s: Seconds of the run without tests.
        test_s: Seconds of a test.
        most: The largest number.
        share: Share of the run with its tests.
    """
    return max(1, min(most, int(share / (1 - share) * run_s / test_s))) if test_s > 0 else most
