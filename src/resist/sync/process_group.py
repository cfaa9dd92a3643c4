"""The default process group of torch.distributed, where this package makes it, and the store for it."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

from resist.errors import UserError, WorkerLostError
from resist.sync.interfaces import introduction, judge, reason, unconnected
from resist.sync.meeting import Place, captured_stderr, open_store, within
from resist.sync.rendezvous import LINGER_S, Arrival, agree_on_attempt
from resist.sync.transport import hosted_workers, workers_of

NOBODY = 1 << 24  # a tag that no message has


class DefaultGroup:
    """The default group that `join` made, with its users counted.

    The last transport that uses it destroys it.

    Attributes:
        users: Transports that use it.
    """

    made: "DefaultGroup | None" = None

    def __init__(self) -> None:
        self._group, self.users = dist.group.WORLD, 0

    @classmethod
    def join(cls, workers: int, device: torch.device, timeout_s: float, failure: str = "") -> None:
        """Make the default group of all processes of torchrun.

        Waits for all of them.

        Args:
            workers: S, the number of workers, for messages.
            device: The device of the workers of this process.
            timeout_s: Seconds to wait for the others, and for every later answer.
            failure: Why this process cannot take part, or "".

        Raises:
            AgreedError: In all processes: one of them does not come in time, or cannot take part or connect.
            UserError: In this one: the environment is invalid, or process 0 cannot be reached in time.
        """
        place, end = Place.from_environment(), time.monotonic() + timeout_s
        hosted = hosted_workers(workers, place.size)

        def named(ranks: Sequence[int]) -> str:
            who = (f" ({workers_of(rank, hosted)})" if hosted[rank] else "" for rank in ranks)
            return ", ".join(f"process {rank}{workers}" for rank, workers in zip(ranks, who, strict=True))

        about = introduction(device, failure)
        with captured_stderr() as done:
            store = open_store(place, timeout_s)
            left = max(1.0, end - time.monotonic())
            arrival = Arrival(place.rank, place.size, about, lambda all_: judge(all_, named), named)
            try:
                name, everyone = within(left + 2 * LINGER_S, lambda: agree_on_attempt(store, arrival, left))
            except (RuntimeError, TimeoutError) as error:  # errors of torch are RuntimeErrors
                raise UserError(
                    f"{named([place.rank])}: the rendezvous at {place.address} has ended or cannot be reached any more "
                    f"({reason(error)}); see what process 0 or torchrun reports"
                ) from error
            attempt = dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]
            try:
                within(timeout_s, lambda: _initialize(attempt, place.rank, place.size, timeout_s))
            except (RuntimeError, ValueError, TimeoutError) as error:
                raise unconnected(error, everyone, named, place.address) from error
            done()
        cls.made = cls()

    @classmethod
    def found(cls, store: Any, rank: int, size: int, timeout_s: float) -> None:
        """Make the default group of a generation. Waits for all of its members.

        Args:
            store: A store of torch.distributed that no other generation uses.
            rank: The number of this process in the generation.
            size: The number of its members.
            timeout_s: Seconds to wait for the others.

        Raises:
            WorkerLostError: Another one does not come, or cannot be reached.
            UserError: There is a default group already, which the caller has made.
        """
        if dist.is_initialized():
            raise UserError(
                "torch.distributed is initialized already; leave that to the job where its members may change, or "
                "call destroy_process_group() first"
            )
        hook = sys.excepthook
        with captured_stderr() as done:
            try:
                within(2 * timeout_s, lambda: _initialize(store, rank, size, timeout_s))
            except (RuntimeError, ValueError, TimeoutError) as error:
                _count_groups_from_0()
                raise WorkerLostError(f"the members have met, but cannot connect: {reason(error)}") from error
            finally:
                sys.excepthook = hook  # torch's would add the rank in each former generation to every line
            done()
        cls.made = cls()

    @classmethod
    def present(cls) -> "DefaultGroup | None":
        """Return the default group; None if the caller made it."""
        return cls.made if cls.made is not None and cls.made._group is dist.group.WORLD else None

    def leave(self) -> None:
        """Count one user less, and destroy the group after the last one."""
        self.users -= 1
        if self.users == 0 and self._group is dist.group.WORLD:
            dist.destroy_process_group()


def _initialize(store: Any, rank: int, size: int, timeout_s: float) -> None:
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)


def _count_groups_from_0() -> None:
    """Make torch count its groups from 0, as in a new process: their entries in the store are under these numbers.

    torch has counted the group that could not be made. It begins from 0 when a default group is destroyed.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    dist.destroy_process_group()


def loopback_store(listener: socket.socket) -> object:
    """Serve a store for the processes of this machine.

    Args:
        listener: Listening socket of the loopback address; the store takes it over.

    Returns:
        The store, which serves as long as this object exists.
    """
    host, port = listener.getsockname()[:2]
    options: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
    with captured_stderr() as done:  # torch notes where DNS does not answer
        store = dist.TCPStore(host, port, **options)  # pyright: ignore[reportPrivateImportUsage]
        done()
    return store


def abort_group(group: dist.ProcessGroup) -> None:
    """Abort a group, and forget it: destroying it, or all groups, would wait for what it has under way.

    Args:
        group: A group of NCCL.
    """
    abort = getattr(distributed_c10d, "_abort_process_group", None)
    (abort or dist.ProcessGroup.abort)(group)


def close_connections(group: dist.ProcessGroup) -> None:
    """Close the connections of a group of gloo: whatever waits in it fails at once, in all of its processes.

    gloo has no other call for this. But when a message does not come in time, it closes all connections of the group.
    So this waits for messages that nobody sends.

    Args:
        group: A group of gloo; of another backend nothing is closed.
    """
    nothing, limit = torch.empty(1), timedelta(milliseconds=1)
    contexts = len(os.environ.get("GLOO_SOCKET_IFNAME", "").split(","))  # gloo has connections for each interface
    for peer in range(group.size()):
        for context in range(contexts) if peer != group.rank() else ():
            with contextlib.suppress(RuntimeError):
                group.recv([nothing], peer, NOBODY + context).wait(limit)


def averaging_gradients(
    model: nn.Module,
    group: dist.ProcessGroup,
    count: Callable[[int], None],
    begin: Callable[[Callable[[], Any]], Any],
) -> nn.Module:
    """Wrap a model so that its gradients are averaged in every backward pass.

    Args:
        model: The model.
        group: The group of all processes.
        count: Called with the bytes of each bucket of gradients.
        begin: Begins an operation and returns it; nobody waits for it on the host.
    """
    wrapped = DistributedDataParallel(model, process_group=group)

    # torch checks the annotations of a hook.
    def average(
        _state: object,
        bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
    ) -> torch.futures.Future[Tensor]:
        gradients = bucket.buffer()
        count(gradients.nbytes)
        gradients.div_(group.size())
        work = begin(lambda: dist.all_reduce(gradients, group=group, async_op=True))
        return work.get_future().then(_first_value)

    wrapped.register_comm_hook(None, average)  # pyright: ignore[reportUnknownMemberType]
    return wrapped


def _first_value(done: Any) -> Tensor:
    return done.value()[0]
