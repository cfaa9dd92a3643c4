"""The device of a process, and a clock that waits for it."""

import os
import time
from dataclasses import dataclass

import torch

from resist.errors import UserError


def pick_device(name: str) -> torch.device:
    """The device of this process: on a machine with several GPUs each local process takes its own."""
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device on this machine; give --device cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@dataclass
class Clock:
    """Seconds between calls of `lap`."""

    device: torch.device
    last: float = 0.0

    def lap(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the device works behind the program's back
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed
