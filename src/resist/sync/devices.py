"""Backends by devices: NCCL where each process has a GPU of its own, gloo otherwise."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from resist.errors import AgreedError
from resist.sync.interfaces import machine_id
from resist.sync.meeting import environment_number, has_nccl
from resist.sync.transport import Transport

log = logging.getLogger(__name__)

AUTO, GLOO, NCCL = "auto", "gloo", "nccl"
BACKENDS = (AUTO, GLOO, NCCL)


@dataclass(frozen=True)
class Gpu:
    """The GPU of a process.

    Attributes:
        machine: Identity of the machine.
        pci: Its place there, as domain:bus:device. Slices of one card (MIG) have the same; NCCL refuses
            two of them.
        name: How its process calls it, such as cuda:0.
        visible: Number of GPUs that the process sees.
    """

    machine: str
    pci: str
    name: str
    visible: int


def own_device(device: torch.device) -> torch.device:
    """Return the device with its number: of GPUs without one, that of this process among those of its machine.

    Args:
        device: The device that the user gave.
    """
    if device.type != "cuda" or ":" in str(device):
        return device
    if not os.environ.get("LOCAL_RANK"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", environment_number("LOCAL_RANK") % torch.cuda.device_count())


def is_of_device(error: Exception) -> bool:
    """Return True for an error of this process's own device: no other process has to do with it.

    Args:
        error: What torch raised.
    """
    known = isinstance(error, torch.OutOfMemoryError) or type(error).__name__ == "AcceleratorError"
    return known or str(error).startswith("CUDA error")


def gpu_of(device: torch.device) -> Gpu:
    """Describe a GPU.

    Args:
        device: A CUDA device with its number.
    """
    about: Any = cast(Any, torch.cuda).get_device_properties(device)
    pci = f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}"
    return Gpu(machine_id(), pci, str(device), torch.cuda.device_count())


def choose_backend(
    gpus: Sequence[Gpu], backend: str, *, nccl: bool, named: Callable[[Sequence[int]], str]
) -> tuple[str, str]:
    """Choose how weights go between processes: a pure function, the same in all of them.

    Args:
        gpus: The GPU of each process; none if they use the CPU or devices other than those of CUDA.
        backend: auto, or the one that the user wants.
        nccl: Whether all processes have NCCL.
        named: Names processes by their numbers.

    Returns:
        "nccl" or "gloo", and a note for the user where processes share a GPU though others are there; or "".

    Raises:
        AgreedError: NCCL is wanted and cannot be.
    """
    places: dict[tuple[str, str], list[int]] = {}
    for rank, gpu in enumerate(gpus):
        places.setdefault((gpu.machine, gpu.pci), []).append(rank)
    shared = next((ranks for ranks in places.values() if len(ranks) > 1), None)
    if backend == NCCL:
        if not gpus:
            raise AgreedError("`backend=nccl` is for GPUs of CUDA, and the device is none; give `backend=gloo`")
        if not nccl:
            raise AgreedError("`backend=nccl`: torch has no NCCL here; give `backend=gloo`")
        if shared:
            raise AgreedError(
                f"`backend=nccl`: {named(shared)} share one GPU, {gpus[shared[0]].name}, and NCCL needs one for each "
                "process; start fewer processes, give each its own device, or `backend=gloo`"
            )
    chosen = NCCL if gpus and nccl and not shared and backend != GLOO else GLOO
    note = ""
    if shared and gpus[shared[0]].visible > 1:
        note = (
            f"{named(shared)} share one GPU, {gpus[shared[0]].name}, of the {gpus[shared[0]].visible} that they see, "
            "so that weights go through the memory of the host; give `device=cuda`, and each takes its own"
        )
    return chosen, note


def agree_on_backend(
    transport: Transport, device: torch.device, backend: str, named: Callable[[Sequence[int]], str]
) -> str:
    """Choose the backend with all processes, and make the device the current one of this process.

    Args:
        transport: Connects the processes, which agree on the kind of device.
        device: The device of this process, with its number.
        backend: auto, or the one that the user wants.
        named: Names processes by their numbers.

    Returns:
        "nccl" or "gloo".

    Raises:
        AgreedError: There is no such backend, or it cannot be.
    """
    if backend not in BACKENDS:
        raise AgreedError(f"`backend={backend!r}` is not one of {', '.join(BACKENDS)}")
    if device.type != "cuda":
        return choose_backend((), backend, nccl=False, named=named)[0]
    torch.cuda.set_device(device)  # of NCCL, and of what else has no number
    about = [has_nccl(), asdict(gpu_of(device))]
    found = [json.loads(text) for text in transport.all_gather_text(json.dumps(about))]
    gpus, nccl = [Gpu(**gpu) for _, gpu in found], all(nccl for nccl, _ in found)
    chosen, note = choose_backend(gpus, backend, nccl=nccl, named=named)
    if note and 0 in transport.hosted:
        log.info("note: %s", note)
    return chosen
