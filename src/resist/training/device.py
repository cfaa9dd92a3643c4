"""The device of a process, how it computes, and a clock that waits for it."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resist.errors import UserError, first_line
from resist.runs.bounds import check_device


def on_gpu(name: str) -> bool:
    """Return True for a device of `pick_device` that is a GPU; "cuda" also where there is none."""
    return name == "cuda" or (name == "auto" and torch.cuda.is_available())


def pick_device(name: str) -> torch.device:
    """Choose the device of this process; each process of a machine takes its own GPU.

    Args:
        name: "cpu", "cuda", or "auto": cuda where there is a GPU.

    Raises:
        UserError: For another name, and for "cuda" where there is no GPU.
    """
    check_device(name)
    if not on_gpu(name):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "" if visible is None else f" with CUDA_VISIBLE_DEVICES={visible!r}"
        raise UserError(f"`device=cuda`: torch finds no CUDA device on this machine{why}; give `device=cpu`")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def take_device(name: str, *, fixed_shapes: bool = False, deterministic: bool = False) -> torch.device:
    """Choose the device of this process as `pick_device` does, and make it the current one.

    What torch starts in this process then uses no other GPU: the thread that pins memory, for example, would open a
    context on the first one.

    Args:
        name: As in `pick_device`.
        fixed_shapes: Batches have few different shapes, so that cuDNN may time its algorithms for each.
        deterministic: Use deterministic algorithms only; cuDNN then does not choose by time.

    Raises:
        UserError: As `pick_device`, and for a GPU that cannot be used.
    """
    device = pick_device(name)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it begins
        torch.use_deterministic_algorithms(True)
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False  # everything is written before it is read
    if device.type == "cuda":
        try:
            torch.cuda.set_device(device)
        except RuntimeError as error:
            raise UserError(
                f"`device={name}`: {device} cannot be used: {first_line(error)}; choose another by "
                "CUDA_VISIBLE_DEVICES, or give `device=cpu`"
            ) from error
        torch.backends.cudnn.benchmark = fixed_shapes and not deterministic
    return device


@contextlib.contextmanager
def naming_nondeterminism() -> Iterator[None]:
    """Raise UserError where torch refuses an operation that has no deterministic algorithm."""
    try:
        yield
    except RuntimeError as error:
        if not torch.are_deterministic_algorithms_enabled() or "deterministic" not in str(error):
            raise
        reason = first_line(error).partition(", but you set")[0]
        raise UserError(f"`deterministic=true`: {reason}; remove it, or change the network") from error


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Make a context in which networks compute in the precision of a run.

    Args:
        device: Device of the network.
        precision: "fp32" or "bf16", see `resist.runs.config.MachineConfig`.
    """
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


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
