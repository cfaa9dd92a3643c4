"""The device of a process, and a clock that waits for it."""

import os
import time
from dataclasses import dataclass

import torch

from resist.errors import UserError


def pick_device(name: str) -> torch.device:
    """Choose the device of this process; each process of a machine takes its own GPU.

    Args:
        name: "cpu", "cuda", or "auto": cuda where there is a GPU.

    Raises:
        UserError: For another name, and for "cuda" where there is no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"`device={name!r}` is not one of auto, cpu, cuda")
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("`device=cuda`: torch finds no CUDA device on this machine; give `device=cpu`")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@dataclass
class Clock:
    """Seconds between calls of `lap`, after the device has finished its work.

    Attributes:
        device: The device to wait for.
        last: Time of the last call, in seconds of `time.perf_counter`.
    """

    device: torch.device
    last: float = 0.0

    def lap(self) -> float:
        """Return the seconds since the last call. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # kernels run asynchronously
        now = time.perf_counter()
        passed, self.last = now - self.last, now
        return passed
