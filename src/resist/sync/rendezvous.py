"""Rendezvous: agree on a name for this attempt, at a store that may hold entries of earlier attempts.

torchrun keeps one store over all restarts, and gloo would connect to the addresses of processes that have ended. So
process 0 draws a name, and every entry of this attempt is stored under it. An entry that a process reads may be left
over from an earlier attempt, hence a three-way handshake on the store: process 0 writes the name, the others write
tokens under this name, and process 0 writes the list of the tokens. A process that finds its token in this list knows
that the name is of this attempt.
"""

import json
import time
import uuid
from typing import Any

NAME = "resist/attempt"
POLL_S = 0.05


def agree_on_attempt(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """Agree on the name of this attempt. Waits for all processes.

    Args:
        store: A store of torch.distributed that all processes share.
        rank: The number of this process.
        size: The number of processes.
        timeout_s: Seconds to wait.

    Returns:
        The name, the same in all processes.

    Raises:
        TimeoutError: If not all processes have come after `timeout_s`; names those that are missing.
    """
    token, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank == 0:
        name = token
        store.set(NAME, name)
        # Wait for the token of every other process, then confirm them all.
        missing = set(range(1, size))
        while missing := {peer for peer in missing if not store.check([f"{name}/{peer}"])}:
            if time.monotonic() > end:
                raise TimeoutError(f"no sign of process {', '.join(map(str, sorted(missing)))} within {timeout_s:g} s")
            time.sleep(POLL_S)
        store.set(f"{name}/all", json.dumps([store.get(f"{name}/{peer}").decode() for peer in range(1, size)]))
        return name
    while time.monotonic() < end:
        if store.check([NAME]):
            # This may be the name of an earlier attempt. Then the token is not confirmed, and the name is read again
            # until process 0 has written the new one.
            name = store.get(NAME).decode()
            store.set(f"{name}/{rank}", token)
            if store.check([f"{name}/all"]) and token in json.loads(store.get(f"{name}/all")):
                return name
        time.sleep(POLL_S)
    raise TimeoutError(f"process 0 has not seen all {size} processes within {timeout_s:g} s")
