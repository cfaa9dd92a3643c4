"""Assembly: bring all blocks to one worker, to form the complete network."""

from collections.abc import Mapping

import torch
from torch import Tensor

from resist.planning.plan import RoundPlan
from resist.subnet.network import Subnet
from resist.sync.transport import Move, Transport


def assemble(transport: Transport, subnets: Mapping[int, Subnet], *, plan: RoundPlan, on: int) -> Subnet | None:
    """Assemble the complete network, between two rounds.

    Every process has to call it.

    Args:
        transport: Connects the workers.
        subnets: Worker -> sub-network, for the hosted workers.
        plan: The present plan.
        on: The worker whose process assembles it. It needs memory for the complete network.

    Returns:
        The complete network, or None if another process hosts `on`.

    Raises:
        WorkerLostError: If another process is lost.
    """
    full = _empty_full(subnets[on]) if on in subnets else None
    moves: list[Move] = []
    template = next(iter(subnets.values()))
    for chain, block in plan.keys:
        # From `on` itself, else from a holder in the same process, else from the holders in turn, which spreads the
        # load. All processes choose the same source.
        holders = plan.holders(chain, block)
        near = [worker for worker in holders if transport.process_of(worker) == transport.process_of(on)]
        source = on if on in holders else (near or holders)[block % len(near or holders)]
        for dtype, layout in template.layouts.items():
            incoming = None if full is None else full.slot(chain, block, full.flats[dtype])
            outgoing: Tensor | None = None
            if source in subnets:
                slot = plan.slot(chain, block, worker=source)
                outgoing = subnets[source].slot(chain, slot, subnets[source].flats[dtype])
            num_bytes = layout.blocks[chain].numel * dtype.itemsize
            if source != on and num_bytes:
                moves.append(Move("evaluate", source, on, num_bytes, outgoing, incoming))
            elif incoming is not None and outgoing is not None:
                incoming.copy_(outgoing)
    transport.transfer(moves).finish()
    return full


def _empty_full(subnet: Subnet) -> Subnet:
    """A network with all blocks in its slots: the shared part of `subnet`, and no values yet in the blocks."""
    full = Subnet(
        subnet.model,
        subnet.chains,
        [chain.num_blocks for chain in subnet.chains],
        device=subnet.device,
        channels_last=subnet.channels_last,
        template_capacities=subnet.capacities,
        template_held=subnet.layout.held,
    )
    full.hold([range(chain.num_blocks) for chain in subnet.chains])
    with torch.no_grad():
        for dtype, flat in full.flats.items():
            full.slot(None, 0, flat).copy_(subnet.slot(None, 0, subnet.flats[dtype]))
    return full
