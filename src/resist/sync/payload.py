"""Payloads: the values that workers exchange, each laid out as the weights, and their means over all workers."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resist.planning.strategy import Strategy
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS
from resist.sync.optimizer_state import StateTypes
from resist.sync.transport import Handle, Transport
from resist.sync.worker import Worker


@dataclass
class Payload:
    """One value for each weight of one dtype, of each hosted worker.

    The values are the weights themselves, an average of them, or one optimizer state.

    Attributes:
        name: WEIGHTS, VELOCITY, AVERAGE, or the optimizer's name of the state ("momentum_buffer", "exp_avg").
        dtype: Dtype of the weights, whose layout the flat tensors have. Their own may be another one.
        flats: Worker -> flat tensor, laid out as its sub-network. After an exchange: as that of the next plan.
        moves: True if the values of a block move with it. Otherwise they stay with blocks that stay, and are zero for
            blocks that arrive.
        average_shared: True if the shared part becomes its mean over all workers.
        average_blocks: True if a block becomes its mean over its holders. Otherwise the value of its owner is kept.
        arriving: (worker, chain number, slot) -> tensor that receives the next block of the slot.
        resized: Worker -> flat tensor of the next plan, where its capacities change.
    """

    name: str
    dtype: torch.dtype
    flats: dict[int, Tensor]
    moves: bool
    average_shared: bool
    average_blocks: bool = True
    arriving: dict[tuple[int, int, int], Tensor] = field(default_factory=dict[tuple[int, int, int], Tensor])
    resized: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def traffic_kind(self, part: str) -> str:
        """Return the account on which the transport books a part.

        Args:
            part: "shared" or "blocks".

        Returns:
            `part` for the weights, "state" for other payloads.
        """
        return part if self.name == WEIGHTS else "state"

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return next(iter(self.flats.values())).element_size()


def collect_payloads(workers: Sequence[Worker], strategy: Strategy, states: Mapping[str, StateTypes]) -> list[Payload]:
    """List the payloads of the exchange at the end of a round.

    Args:
        workers: The hosted workers.
        strategy: The strategy of the round; its `optimizer_state` decides what happens to the states.
        states: Names of the states that any worker has, each with its dtype for each dtype of weights. A worker without
            one of them gets zeros, in memory for one more copy of its weights.

    Returns:
        Weights, optimizer states, averages of the weights, and outer momentum, in this order; each with one payload for
        each dtype of the weights.
    """
    policy = strategy.optimizer_state
    moves, average_shared = policy in ("travel", "average"), policy == "average"
    dtypes = tuple(workers[0].subnet.flats)
    payloads = [
        Payload(WEIGHTS, d, {w.index: w.subnet.flats[d] for w in workers}, moves=True, average_shared=True)
        for d in dtypes
    ]
    for name, types in states.items():
        for d, own in types.items():
            flats = {worker.index: worker.state_flat(name, d, own) for worker in workers}
            payloads.append(Payload(name, d, flats, moves=moves, average_shared=average_shared))
    averages = [(worker.index, worker.average) for worker in workers if worker.average]
    for d in dtypes if averages else ():
        flats = {index: average.flats[d] for index, average in averages}
        payloads.append(Payload(AVERAGE, d, flats, moves=True, average_shared=True))
    for d in dtypes if strategy.outer else ():
        # All holders of a block have the same velocity already, so it only moves.
        flats = {worker.index: worker.state[VELOCITY][d] for worker in workers}
        payloads.append(Payload(VELOCITY, d, flats, moves=True, average_shared=False, average_blocks=False))
    return payloads


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
