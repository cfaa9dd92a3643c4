"""A part of the GPU benchmark: settings, time, and findings, which are on disk as soon as they are known."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from provenance import provenance
from resist.models import PreActResNet

WORKERS = 4
UNDER_WAY = "gpu-under-way.json"  # the findings of the part that runs, or of one that was cut off


@dataclass(frozen=True)
class Size:
    """Size of what the parts run.

    Attributes:
        depths: Blocks of each section; those of the third after its first form the chain.
        width: Channels of the stem.
        held: Blocks of the chain that each of four workers holds.
        batch_size: Images of a worker's batch.
        steps: Steps that are timed at once.
        repetitions: How often they are timed.
        local_steps: Steps of a round.
        backend: Backend of torch.compile.
    """

    depths: tuple[int, int, int, int]
    width: int
    held: int
    batch_size: int
    steps: int
    repetitions: int
    local_steps: int
    backend: str


FULL = Size((3, 4, 23, 3), 64, 6, batch_size=128, steps=20, repetitions=7, local_steps=50, backend="inductor")
TINY = Size((1, 1, 5, 1), 8, 1, batch_size=4, steps=1, repetitions=2, local_steps=2, backend="eager")


@dataclass(frozen=True)
class Settings:
    """Settings of a part.

    Attributes:
        device: The device, with a number on GPUs.
        out: Folder of the results.
        seconds: Time limit of the part.
        data: Folder with the parts of CIFAR-10.
        train_s: Seconds of training for each method, without compilation and tests.
        lr: Highest learning rate of training.
        tiny: Run everything at a size for a CPU.
        compile: Compile networks that are trained or timed.
        began: When the part began, in seconds of `time.monotonic`.
    """

    device: torch.device
    out: Path
    seconds: float
    data: Path | None = None
    train_s: float = 150.0
    lr: float = 0.05
    tiny: bool = False
    compile: bool = True
    began: float = field(default_factory=time.monotonic)

    @property
    def size(self) -> Size:
        """The size of what the part runs."""
        return TINY if self.tiny else FULL

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def left_s(self) -> float:
        """Return the seconds that are left of the part's time."""
        return self.began + self.seconds - time.monotonic()

    def network(self, blocks: int | None = None) -> nn.Module:
        """Build the network, or one with fewer blocks in its chain.

        Args:
            blocks: Blocks of the chain; default: all.
        """
        first, second, third, last = self.size.depths
        third = third if blocks is None else 1 + blocks
        return PreActResNet((first, second, third, last), 10, width=self.size.width, final_norm=True)

    def compiled(self, model: nn.Module) -> Callable[..., Any]:
        """Return the compiled model, or the model itself where `compile` is off."""
        return torch.compile(model, backend=self.size.backend) if self.compile else model

    def choose_convolutions(self) -> None:
        """Let cuDNN choose the fastest algorithm for each shape: those of training are always the same."""
        torch.backends.cudnn.benchmark = self.on_gpu

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


class Findings:
    """The result line of a part, written to `gpu-under-way.json` whenever something is added.

    Args:
        out: Folder of the results.
        part: Name of the part.

    Attributes:
        values: The line so far.
    """

    def __init__(self, out: Path, part: str) -> None:
        self._file = out / UNDER_WAY
        self.values: dict[str, Any] = {"benchmark": "gpu", "part": part, **provenance()}
        self.add()

    def add(self, **values: object) -> None:
        """Add values, and write all of them to disk."""
        self.values |= values
        partial = self._file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(self.values, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self._file)
