"""`resist rendezvous`: a store for hosts that are started by hand, behind a secret."""

import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from resist.errors import UserError

POLL_S = 0.5


@dataclass(frozen=True)
class RendezvousConfig:
    """Serve the store at which processes on several machines meet and agree. It has to outlive all of them."""

    bind: str
    """Name or address of this machine to listen at, such as that of a private network. No other one is listened at."""
    port: int = 29400
    """Port to listen at. 0: one that is free."""
    secret_file: Path | None = None
    """File with the secret that all processes have, 16 bytes or more. Default: the environment variable
    RESIST_SECRET."""


def run_rendezvous(config: RendezvousConfig, given: frozenset[str]) -> int:
    """Serve until a signal comes. Returns the exit status."""
    from resist.members.secret import read_secret
    from resist.members.store_server import StoreServer

    if not 0 <= config.port <= 65535:
        raise UserError(f"`port={config.port}` must be 0 to 65535")
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        ended.set()

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server = StoreServer(config.bind, config.port, read_secret(config.secret_file))
        print(f"resist: rendezvous at {server.address}; runs end when this process ends", flush=True)
        while not ended.wait(POLL_S):  # without a limit, a signal would not end the wait
            continue
        server.close()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0
