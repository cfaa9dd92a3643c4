"""Shared mean: the mean over all workers of what all of them hold."""

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from resist.sync.payload import Payload
from resist.sync.transport import Handle, Transport
from resist.sync.worker import Worker


class SharedMean:
    """The mean of one payload over all workers, in progress: one collective.

    Frozen weights and buffers that nobody has changed are left out. What remains is usually one range of the flat
    tensor, which is averaged in place. Several ranges are copied together and back.

    Args:
        transport: Connects the workers.
        payload: The payload.
        workers: The hosted workers by number. They agree on `Subnet.changing`.
        dropped: Workers that are left out of the mean.
        blocks: Average everything, because all workers hold all blocks, and not only the shared part.

    Raises:
        WorkerLostError: If another process is lost; also by `finish`.
    """

    @torch.no_grad()
    def __init__(
        self, transport: Transport, payload: Payload, workers: Mapping[int, Worker], dropped: Set[int], *, blocks: bool
    ) -> None:
        self._parts: list[list[Tensor]] = []
        for worker, flat in payload.flats.items():
            subnet = workers[worker].subnet
            ranges = subnet.layouts[payload.dtype].ranges(subnet.changing, blocks=blocks)
            self._parts.append([flat[start:end] for start, end in ranges])
            for part in self._parts[-1] if worker in dropped else ():
                part.zero_()
        # Dropped workers contribute zeros to a sum that is divided by the number of all workers.
        scale = transport.num_workers / (transport.num_workers - len(dropped))
        self._tensors = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in self._parts if parts]
        self._handle: Handle | None = None
        if self._tensors:
            self._handle = transport.mean(self._tensors, payload.traffic_kind("shared"), scale)

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all hosted workers have the mean."""
        if self._handle is None:
            return
        self._handle.finish()
        for tensor, parts in zip(self._tensors, self._parts, strict=True):
            if len(parts) > 1:
                for part, mean in zip(parts, torch.split(tensor, [part.numel() for part in parts]), strict=True):
                    part.copy_(mean)
