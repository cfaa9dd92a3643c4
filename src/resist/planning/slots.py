"""Slots: in which order the blocks of the next round come into them, so that few need memory of their own."""

from collections.abc import Sequence, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Fill:
    """How one slot gets its next block.

    Attributes:
        slot: The slot.
        source: Slot of the same worker that the block is copied from; None if it arrives in a message.
        apart: True if it has to wait in memory of its own, since the slot is read until all messages are complete.
    """

    slot: int
    source: int | None
    apart: bool


def fill_order(
    before: Sequence[int], after: Sequence[int], here: Set[int], sent: Set[int], *, refill: bool = False
) -> list[Fill]:
    """Order the fills of the slots of one chain in one worker.

    Carried out one after another, each copy reads its source before that is overwritten. Messages are complete later:
    what they read stays until then, and what they bring may be written at once.

    Args:
        before: Block of each slot before.
        after: Block of each slot afterwards; equally many without `refill`.
        here: Blocks that this worker takes from its own slot, if it has one.
        sent: Blocks that messages read from the slots of this worker.
        refill: The slots afterwards are other memory, to be filled in any order.

    Returns:
        A fill for each slot, but for those whose block stays.
    """
    slot_of = {block: slot for slot, block in enumerate(before)}
    sources = {slot: slot_of.get(block) if block in here else None for slot, block in enumerate(after)}
    if refill:
        return [Fill(slot, source, apart=False) for slot, source in sources.items()]
    open_fills = {slot: source for slot, source in sources.items() if source != slot}
    read = {source for source in open_fills.values() if source is not None}
    kept = {slot_of[block] for block in sent}
    order: list[Fill] = []
    while open_fills:
        slot = next((slot for slot in open_fills if slot not in kept and slot not in read), None)
        apart = slot is None  # all that remain are kept, or wait for each other
        if slot is None:
            slot = next((slot for slot, source in open_fills.items() if source is not None), next(iter(open_fills)))
        source = open_fills.pop(slot)
        read.discard(-1 if source is None else source)
        order.append(Fill(slot, source, apart))
    return order
