"""Payloads: the values that workers exchange at a synchronization, each laid out as the weights are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resist.planning.strategy import Strategy
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS
from resist.sync.worker import StateTypes, Worker


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
