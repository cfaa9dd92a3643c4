"""How the processes of a job find one another at a store that may still hold what an earlier attempt left there.

torchrun keeps one store over all restarts, and gloo would connect to the addresses of processes that are dead. So
process 0 draws a name for this attempt, and everything of this attempt is stored under it. What is read of the store
before both sides know each other may be old: hence an answer to the name, and an answer to the answer.
"""

import json
import time
import uuid
from typing import Any

NAME = "resist/attempt"
LOOK_S = 0.05


def agree_on_attempt(store: Any, rank: int, size: int, timeout_s: float) -> str:
    """The name of this attempt, the same in all `size` processes. Waits for all of them.

    store: one of torch.distributed, shared by all. Raises TimeoutError, saying who did not come, after `timeout_s`.
    """
    own, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    if rank == 0:
        store.set(NAME, own)
        missing = set(range(1, size))
        while missing := {other for other in missing if not store.check([f"{own}/{other}"])}:
            if time.monotonic() > end:
                raise TimeoutError(f"no sign of process {', '.join(map(str, sorted(missing)))} within {timeout_s:g} s")
            time.sleep(LOOK_S)
        store.set(f"{own}/all", json.dumps([store.get(f"{own}/{other}").decode() for other in range(1, size)]))
        return own
    while time.monotonic() < end:
        if store.check([NAME]):
            name = store.get(NAME).decode()
            store.set(f"{name}/{rank}", own)
            if store.check([f"{name}/all"]) and own in json.loads(store.get(f"{name}/all")):
                return name
        time.sleep(LOOK_S)
    raise TimeoutError(f"process 0 has not seen all {size} processes within {timeout_s:g} s")
