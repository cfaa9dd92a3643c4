"""Assembly: bring all blocks to one worker of some processes, to form the complete network."""

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from resist.planning.plan import Key, RoundPlan
from resist.subnet.network import Subnet
from resist.sync.packing import entry_of, pack, unpack
from resist.sync.transport import Move, Transport


def assemble(
    transport: Transport, subnets: Mapping[int, Subnet], *, plan: RoundPlan, on: Sequence[int]
) -> Subnet | None:
    """Assemble the complete network, between two rounds.

    Every process has to call it.

    Args:
        transport: Connects the workers.
        subnets: Worker -> sub-network, for the hosted workers.
        plan: The present plan.
        on: The workers whose processes assemble it, at most one of each process. They need memory for the complete
            network.

    Returns:
        The complete network, or None if other processes host `on`.

    Raises:
        WorkerLostError: If another process is lost.
    """
    for subnet in subnets.values():
        subnet.take_back()
    own = next((worker for worker in on if worker in subnets), None)
    full = None if own is None else _empty_full(subnets[own])
    moves: list[Move] = []
    template = next(iter(subnets.values()))
    for target in on:
        into = full if target == own else None
        for chain, block in plan.keys:
            source = _source(transport, plan, (chain, block), target)
            for dtype, layout in template.layouts.items():
                incoming = None if into is None else into.slot(chain, block, into.flats[dtype])
                outgoing: Tensor | None = None
                if source in subnets:
                    slot = plan.slot(chain, block, worker=source)
                    outgoing = subnets[source].slot(chain, slot, subnets[source].flats[dtype])
                num_bytes = layout.blocks[chain].numel * dtype.itemsize
                if source != target and num_bytes:
                    moves.append(Move("evaluate", source, target, num_bytes, outgoing, incoming))
                elif incoming is not None and outgoing is not None:
                    incoming.copy_(outgoing)
    transport.transfer(moves).finish()
    for target in on if template.has_loose else ():
        sources = {key: _source(transport, plan, key, target) for key in plan.keys}
        _assemble_loose(transport, subnets, full if target == own else None, plan, sources, target)
    return full


def fetched_bytes(transport: Transport, subnet: Subnet, plan: RoundPlan, target: int) -> int:
    """Return the bytes that a worker gets from other processes to form the complete network.

    Args:
        transport: Connects the workers.
        subnet: The sub-network of any worker.
        plan: The present plan.
        target: The worker.
    """
    of_block = [
        sum(layout.blocks[chain].numel * dtype.itemsize for dtype, layout in subnet.layouts.items())
        for chain in range(len(subnet.chains))
    ]
    sources = {key: transport.process_of(_source(transport, plan, key, target)) for key in plan.keys}
    home = transport.process_of(target)
    return sum(of_block[chain] for (chain, _), source in sources.items() if source != home)


def _source(transport: Transport, plan: RoundPlan, key: Key, on: int) -> int:
    """The worker that sends a block; the same in all processes.

    `on` itself, else a holder in the same process, else the holders in turn, which spreads the load.
    """
    holders = plan.holders(*key)
    near = [worker for worker in holders if transport.process_of(worker) == transport.process_of(on)]
    return on if on in holders else (near or holders)[key[1] % len(near or holders)]


def _empty_full(subnet: Subnet) -> Subnet:
    """A network of all blocks, with the shared part of `subnet`.

    Its blocks have no values yet.
    """
    full = Subnet(
        subnet.model,
        subnet.chains,
        [chain.num_blocks for chain in subnet.chains],
        device=subnet.device,
        channels_last=subnet.channels_last,
        template_capacities=subnet.capacities,
        like=subnet,
    )
    full.hold([range(chain.num_blocks) for chain in subnet.chains])
    with torch.no_grad():
        for dtype, flat in full.flats.items():
            full.slot(None, 0, flat).copy_(subnet.slot(None, 0, subnet.flats[dtype]))
    return full


def _assemble_loose(
    transport: Transport,
    subnets: Mapping[int, Subnet],
    full: Subnet | None,
    plan: RoundPlan,
    sources: Mapping[Key, int],
    on: int,
) -> None:
    """Bring the loose buffers of all blocks to `full`.

    Waits for all processes: only they know the sizes.

    Nothing is sent for a block whose loose buffers are those of the first block of its chain that `on` holds.
    """
    packed: dict[Key, Tensor] = {}
    for (chain, block), source in sources.items():
        if source in subnets:
            part = chain, plan.slot(chain, block, worker=source)
            packed[chain, block] = pack(subnets[source].loose().get(part, {}), subnets[source].device)
    first: dict[int, Tensor] = {}
    if full is not None:
        own = subnets[on].loose()
        first = {chain: pack(own.get((chain, 0), {}), full.device) for chain in range(len(plan.plans))}
    values = {
        "sizes": [[*key, len(value), entry_of(value).content] for key, value in packed.items()],
        "first": {chain: entry_of(value).content for chain, value in first.items()},
    }
    texts = [json.loads(text) for text in transport.all_gather_text(json.dumps(values))]
    known = {int(chain): digest for text in texts for chain, digest in text["first"].items()}
    moves: list[Move] = []
    keys: list[Key] = []
    sizes = {(chain, block): (size, digest) for text in texts for chain, block, size, digest in text["sizes"]}
    for (chain, block), source in sources.items():
        size, digest = sizes[chain, block]
        if transport.process_of(source) == transport.process_of(on) or digest == known[chain]:
            continue
        outgoing = packed[chain, block].to(subnets[source].device) if source in subnets else None
        incoming = None if full is None else torch.empty(size, dtype=torch.uint8, device=full.device)
        moves.append(Move("evaluate", source, on, size, outgoing, incoming))
        keys.append((chain, block))
    arrived = transport.transfer(moves).finish()
    if full is None:
        return
    received = {key: tensor for key, tensor in zip(keys, arrived, strict=True) if tensor is not None}
    full.put_loose(None, 0, subnets[on].loose().get((None, 0), {}))
    for chain, block in sources:
        value = received.get((chain, block), packed.get((chain, block), first[chain]))
        full.put_loose(chain, block, unpack(value, full.device))
