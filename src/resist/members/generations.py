"""Generations: from one transport to the next in the same process, when the members of a run change."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from resist.errors import NotAMemberError, WorkerLostError
from resist.members.membership import Membership
from resist.planning.generations import Generation
from resist.sync.devices import AUTO
from resist.sync.distributed import Distributed
from resist.sync.local import Local
from resist.sync.process_group import DefaultGroup
from resist.sync.transport import Transport

ATTEMPTS = 3  # generations of the same members that cannot connect


def connect_members(
    membership: Membership,
    facts: Callable[[], Mapping[str, Any]],
    workers: Callable[[Generation], int],
    device: torch.device | str = "cpu",
    timeout_s: float = 600.0,
    backend: str = AUTO,
) -> tuple[Generation, Transport]:
    """Connect the members of the generation, and where one of them is lost meanwhile, those of a later one.

    Waits for all of them. Close the transport of an earlier generation before.

    Args:
        membership: This process among the members; it has joined.
        facts: What the others have to know of this process, where they agree on a later generation.
        workers: S, the number of workers of a generation.
        device: The device of the sub-networks.
        timeout_s: Seconds after which a call that waits for another process fails.
        backend: See `resist.sync.distributed.connect`.

    Returns:
        The generation that is connected, and its transport.

    Raises:
        NotAMemberError: This process cannot go on with the others, too few are left, or they cannot connect.
        AgreedError: The processes differ in workers, device or backend.
    """
    generation, failed = membership.generation, 0
    assert generation is not None, "it has joined"
    while True:
        try:
            membership.meet()
            return generation, _connect(membership, generation, workers(generation), device, timeout_s, backend)
        except NotAMemberError:
            raise
        except WorkerLostError as error:
            before, generation = generation, membership.regroup(facts())
            failed = failed + 1 if generation.members == before.members else 0
            if failed == ATTEMPTS:
                membership.leave()
                raise NotAMemberError(
                    f"the members {membership.watch.named(generation.members)} reach the store, but cannot connect to "
                    f"each other ({error}); check the network between them"
                ) from error


def regroup(
    membership: Membership,
    transport: Transport,
    facts: Mapping[str, Any],
    workers: Callable[[Generation], int],
    device: torch.device | str = "cpu",
    timeout_s: float = 600.0,
    backend: str = AUTO,
) -> tuple[Generation, Transport]:
    """Agree on the next generation and connect its members. Every member has to call it.

    Args:
        membership: This process among the members.
        transport: That of the generation that ends. It is closed in any case, with all that is under way.
        facts: What the others have to know of this process, such as its round; see `Membership.regroup`.
        workers: See `connect_members`, as for the other arguments.
        device: See there.
        timeout_s: See there.
        backend: See there.

    Returns:
        The next generation, with the facts of all members, and its transport.

    Raises:
        NotAMemberError: This process cannot go on with the others, too few are left, or they cannot connect.
        AgreedError: The processes differ in workers, device or backend.
    """
    try:
        membership.regroup(facts)  # before it is closed: another member may still be in its last call
    finally:
        if isinstance(transport, Distributed):
            transport.abort("the members have changed")
        transport.close()
    return connect_members(membership, lambda: facts, workers, device, timeout_s, backend)


def _connect(
    membership: Membership, generation: Generation, workers: int, device: torch.device | str, timeout_s: float,
    backend: str,
) -> Transport:  # fmt: skip
    size = len(generation.members)
    if size == 1:
        return Local(workers)
    name = f"generation/{generation.number}/groups"
    store = dist.PrefixStore(name, membership.store)  # pyright: ignore[reportPrivateImportUsage]
    rank = generation.members.index(membership.number)
    DefaultGroup.found(store, rank, size, min(timeout_s, membership.watch.bound_s))
    return Distributed(workers, torch.device(device), timeout_s, backend, membership.watch)
