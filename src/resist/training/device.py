"""The device of a process, and a clock that waits for it."""

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from resist.errors import UserError
from resist.runs.bounds import check_device


def pick_device(name: str) -> torch.device:
    """Choose the device of this process; each process of a machine takes its own GPU.

    Args:
        name: "cpu", "cuda", or "auto": cuda where there is a GPU.

    Raises:
        UserError: For another name, and for "cuda" where there is no GPU.
    """
    check_device(name)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
        raise UserError(f"`device=cuda`: torch finds no CUDA device on this machine{why}; give `device=cpu`")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device: of the GPU, or of the machine for the CPU.

    Memory that torch has reserved on a GPU and does not use counts as free. On the CPU the limit of a container counts
    too. Where a system does not say, it is as much as a number can be.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = [sys.maxsize]
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        free.append(max(0, int((group / "memory.max").read_text()) - used))
    return min(free)


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
