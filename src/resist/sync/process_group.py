"""The default process group of torch.distributed, where this package makes it, and the store for it."""

import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous  # pyright: ignore[reportUnknownVariableType]

from resist.errors import UserError, first_line
from resist.sync.rendezvous import agree_on_attempt


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
    def join(cls, timeout_s: float) -> None:
        """Make the default group of all processes of torchrun.

        Waits for all of them.

        Args:
            timeout_s: Seconds to wait for them, and for every later answer.

        Raises:
            UserError: If the group cannot be formed.
        """
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            timeout = timedelta(seconds=timeout_s)
            store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
            attempt = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
                agree_on_attempt(store, rank, size, timeout_s), store
            )
            dist.init_process_group("gloo", store=attempt, rank=rank, world_size=size, timeout=timeout)
        except (RuntimeError, ValueError, TimeoutError) as error:  # errors of torch are RuntimeErrors
            raise UserError(
                f"no process group at {where}: {first_line(error)}; check that the port is free on the first machine "
                f"and that all {os.environ['WORLD_SIZE']} processes were started"
            ) from error
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


def loopback_store(listener: socket.socket) -> object:
    """Serve a store for the processes of this machine.

    Args:
        listener: Listening socket of the loopback address; the store takes it over.

    Returns:
        The store, which serves as long as this object exists.
    """
    port = listener.getsockname()[1]
    options: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
    return dist.TCPStore("127.0.0.1", port, **options)  # pyright: ignore[reportPrivateImportUsage]
