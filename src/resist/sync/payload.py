"""Payloads: the values that workers exchange, each laid out as the weights, and their bytes on the wire."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resist.planning.wire import FP32, Wire, part_bytes
from resist.subnet.pieces import Layout
from resist.sync.averaging import AVERAGE, VELOCITY, WEIGHTS
from resist.sync.codecs import CODECS, RandomBits
from resist.sync.optimizer_state import StateTypes
from resist.sync.round_end import RoundEnd
from resist.sync.state_formats import format_of, kind_of
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
        shared_format: Wire format of what trains in the shared part; see `resist.planning.wire`.
        block_format: The same of blocks.
        arriving: (worker, chain number, slot) -> tensor that receives the next block of the slot.
        resized: Worker -> flat tensor of the next plan, where its capacities change.
    """

    name: str
    dtype: torch.dtype
    flats: dict[int, Tensor]
    moves: bool
    average_shared: bool
    average_blocks: bool = True
    shared_format: str = FP32
    block_format: str = FP32
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

    def block_bytes(self, block: Layout) -> int:
        """Return the bytes of a block on the wire."""
        return part_bytes(self.block_format, block.numel, block.num_trained, self.itemsize)

    @torch.no_grad()
    def encode(self, values: Tensor, block: Layout, draws: torch.Generator) -> Tensor:
        """Encode the values of a block: those that train in the wire format, the others as they are.

        Args:
            values: (block.numel,) float32.
            block: Layout of the block.
            draws: Draws of stochastic rounding.

        Returns:
            (block_bytes(block),) uint8.
        """
        codec, (start, end) = CODECS[self.block_format], block.trained
        encoded = torch.empty(self.block_bytes(block), dtype=torch.uint8, device=values.device)
        size = codec.num_bytes(end - start)
        codec.encode(values[start:end], RandomBits(end - start, values.device, draws), into=encoded[:size])
        encoded[size:].copy_(torch.cat([values[:start], values[end:]]).view(torch.uint8))
        return encoded

    @torch.no_grad()
    def decode(self, encoded: Tensor, block: Layout, *, into: Tensor | None = None) -> Tensor:
        """Decode the values of a block.

        Args:
            encoded: (block_bytes(block),) uint8, from `encode`.
            block: Layout of the block.
            into: (block.numel,) to write to. Default: a new tensor.
        """
        codec, (start, end) = CODECS[self.block_format], block.trained
        if into is None:
            into = torch.empty(block.numel, dtype=torch.float32, device=encoded.device)
        size = codec.num_bytes(end - start)
        codec.decode(encoded[:size], end - start, into=into[start:end])
        first = size + start * into.element_size()
        into[:start].view(torch.uint8).copy_(encoded[size:first])
        into[end:].view(torch.uint8).copy_(encoded[first:])
        return into


def collect_payloads(workers: Sequence[Worker], end: RoundEnd, states: Mapping[str, StateTypes]) -> list[Payload]:
    """List the payloads of the exchange at the end of a round.

    Args:
        workers: The hosted workers.
        end: The end of the round. The strategy's `optimizer_state` decides what happens to the states.
        states: Names of the states that any worker has, each with its dtype for each dtype of weights. A worker without
            one of them gets zeros, in memory for one more copy of its weights.

    Returns:
        Weights, optimizer states, averages of the weights, and outer momentum, in this order; each with one payload for
        each dtype of the weights.
    """
    wire, policy, outer = end.wire, end.strategy.optimizer_state, end.strategy.outer
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
    for d in dtypes if outer else ():
        # All holders of a block have the same velocity already, so it only moves; and so have all workers that of the
        # shared part, but for those that join.
        flats = {worker.index: worker.state[VELOCITY][d] for worker in workers}
        payloads.append(Payload(VELOCITY, d, flats, moves=True, average_shared=end.regroups, average_blocks=False))
    for payload in payloads:
        if next(iter(payload.flats.values())).dtype == torch.float32:  # others are not encoded
            payload.shared_format, payload.block_format = _formats(payload.name, workers[0], wire, states)
    return payloads


def _formats(name: str, worker: Worker, wire: Wire, states: Collection[str]) -> tuple[str, str]:
    """The formats of a payload: of its shared part and of its blocks."""
    if name in (WEIGHTS, VELOCITY):  # the shared part of the latter is not sent
        return wire.shared, wire.blocks
    if name == AVERAGE:
        return wire.average, wire.average
    format = format_of(kind_of(name, map(type, worker.optimizers), states), wire.state)
    return format, format
