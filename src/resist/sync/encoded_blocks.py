"""Blocks in a wire format, on their way from worker to worker."""

from collections.abc import Hashable

import torch
from torch import Tensor

from resist.planning.schedule import Message
from resist.subnet.network import Subnet
from resist.sync.payload import Payload
from resist.sync.round_end import RoundEnd


class EncodedBlocks:
    """Bytes of the blocks that hosted workers send in one synchronization.

    Everybody gets the same bytes of a block, also within a process: so all its holders have the same values, and the
    number of processes does not matter.

    Args:
        end: The end of the round.
        subnet: The sub-network of any hosted worker.
    """

    def __init__(self, end: RoundEnd, subnet: Subnet) -> None:
        self._end, self._subnet = end, subnet
        self._encoded: dict[Hashable, Tensor] = {}

    def encode(self, payload: Payload, m: Message, slot: Tensor) -> Tensor:
        """Encode a block for a message; once for all messages of a phase.

        Args:
            payload: The payload, which has a wire format.
            m: The message.
            slot: The values of the block.
        """
        key = m.phase, payload.name, str(payload.dtype), m.chain, m.block, m.source
        if key not in self._encoded:
            draws = self._end.draws(slot.device, *key)
            self._encoded[key] = payload.encode(slot, self._subnet.layouts[payload.dtype].blocks[m.chain], draws)
        return self._encoded[key]

    def round(self, payload: Payload, m: Message, slot: Tensor) -> None:
        """Replace the values of a block by what the receivers of a message get."""
        self.decode(payload, m, self.encode(payload, m, slot), into=slot)

    def decode(self, payload: Payload, m: Message, encoded: Tensor, *, into: Tensor | None = None) -> Tensor:
        """Decode a block that has arrived; see `Payload.decode`."""
        return payload.decode(encoded, self._subnet.layouts[payload.dtype].blocks[m.chain], into=into)

    def room(self, num_bytes: int) -> Tensor:
        """Make room for the bytes of a block that arrives."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._subnet.device)
