"""Shared mean: the mean over all workers of what all of them hold."""

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from resist.sync.payload import Payload
from resist.sync.transport import Transport
from resist.sync.worker import Worker


class SharedMean:
    """The mean of one payload over all workers, in progress: one collective, in place.

    Args:
        transport: Connects the workers.
        payload: The payload.
        workers: The hosted workers by number.
        dropped: Workers that are left out of the mean.
        blocks: Average everything, because all workers hold all blocks, and not only the shared part.

    Raises:
        WorkerLostError: If another process is lost; also by `finish`.
    """

    @torch.no_grad()
    def __init__(
        self, transport: Transport, payload: Payload, workers: Mapping[int, Worker], dropped: Set[int], *, blocks: bool
    ) -> None:
        self._parts: list[Tensor] = []
        self._scale = 1.0
        for worker, flat in payload.flats.items():
            part = flat if blocks else workers[worker].subnet.slot(None, 0, flat, dtype=payload.dtype)
            if worker in dropped:
                part.zero_()
            self._parts.append(part)
        if dropped:
            # Dropped workers contribute zeros to a sum that is divided by the number of all workers.
            self._scale = transport.num_workers / (transport.num_workers - len(dropped))
        self._handle = transport.mean(self._parts, payload.traffic_kind("shared"))

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all hosted workers have the mean."""
        self._handle.finish()
        if self._scale != 1.0:
            for part in self._parts:
                part.mul_(self._scale)
