"""Rendezvous: agree on a name for this attempt, at a store that may hold entries of earlier attempts.

torchrun keeps one store over all restarts, and gloo would connect to the addresses of processes that have ended. So
process 0 draws a name, and every entry of this attempt is stored under it. An entry that a process reads may be left
over from an earlier attempt, hence a three-way handshake on the store: process 0 writes the name, the others write
tokens under this name, and process 0 writes the list of the tokens. A process that finds its token in this list knows
that the name is of this attempt.

With its token each process introduces itself. So before any connection is made, all know who has come, and all end with
the same line where one cannot take part or does not come.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from resist.errors import AgreedError, UserError

NAME = "resist/attempt"
POLL_S = 0.05
# Seconds that process 0, which may serve the store, stays for the others to read why the attempt failed.
LINGER_S = 5.0

Introductions = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Arrival:
    """One process at the store.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
        about: The introduction of this process, as JSON data.
        judge: Returns from all introductions why the attempt fails, or "".
        named: Names processes by their numbers.
    """

    rank: int
    size: int
    about: Mapping[str, Any]
    judge: Callable[[Introductions], str]
    named: Callable[[Sequence[int]], str]


def agree_on_attempt(store: Any, arrival: Arrival, timeout_s: float) -> tuple[str, Introductions]:
    """Agree on the name of this attempt. Waits for all processes.

    Args:
        store: A store of torch.distributed that all processes share.
        arrival: This process.
        timeout_s: Seconds to wait.

    Returns:
        The name and the introductions of all processes, the same in all of them.

    Raises:
        AgreedError: In all processes: one of them cannot take part, or has not come to process 0 in time.
        UserError: In this process: process 0 has not come in time, or another process has the same number.
    """
    token, end, extra, taken = uuid.uuid4().hex, time.monotonic() + timeout_s, 0.0, False
    entry = json.dumps({"token": token, "size": arrival.size, **arrival.about})
    if arrival.rank == 0:
        return _host(store, arrival, token, json.loads(entry), end, timeout_s)
    while time.monotonic() < end + extra:
        if store.check([NAME]):
            extra = LINGER_S  # process 0 may have begun to wait later than this process, and has the last word
            # This may be the name of an earlier attempt. Then the token is not confirmed, and the name is read again
            # until process 0 has written the new one.
            name = store.get(NAME).decode()
            key = f"{name}/{arrival.rank}"
            taken = store.compare_set(key, "", entry).decode() != entry
            if not taken and store.check([f"{name}/all"]):
                verdict = parsed(store.get(f"{name}/all").decode())
                if token in verdict.get("tokens", ()):
                    store.set(f"{key}/seen", "")
                    return _concluded(name, verdict)
        time.sleep(POLL_S)
    raise UserError(_same_number(arrival.rank) if taken else _late(store, arrival, timeout_s))


def _host(
    store: Any, arrival: Arrival, token: str, entry: Mapping[str, Any], end: float, timeout_s: float
) -> tuple[str, Introductions]:
    """Do the part of process 0: collect the introductions and write the verdict."""
    name = token
    store.set(NAME, name)
    came: dict[int, dict[str, Any]] = {0: dict(entry)}
    while len(came) < arrival.size and time.monotonic() <= end:
        for peer in range(1, arrival.size):
            if peer not in came and store.check([f"{name}/{peer}"]):
                came[peer] = parsed(store.get(f"{name}/{peer}").decode())
        if store.get(NAME).decode() != name:
            raise UserError(_same_number(0))
        time.sleep(POLL_S)
    introductions = [came[rank] for rank in sorted(came)]
    if len(came) < arrival.size:
        missing = [rank for rank in range(arrival.size) if rank not in came]
        failure = (
            f"{arrival.named(missing)} {'has' if len(missing) == 1 else 'have'} not come within {timeout_s:.0f} s; "
            f"{_hosts(came)}check that all {arrival.size} processes (WORLD_SIZE) were started, with the same "
            "MASTER_ADDR and MASTER_PORT"
        )
    else:
        failure = arrival.judge(introductions)
    tokens = [one.get("token") for one in introductions]
    verdict = {"tokens": tokens, "introductions": introductions, "failure": failure}
    store.set(f"{name}/all", json.dumps(verdict))
    if failure:
        _linger(store, [f"{name}/{rank}/seen" for rank in came if rank > 0])
    return _concluded(name, verdict)


def _concluded(name: str, verdict: Mapping[str, Any]) -> tuple[str, Introductions]:
    if verdict["failure"]:
        raise AgreedError(verdict["failure"])
    return name, verdict["introductions"]


def _linger(store: Any, keys: Sequence[str]) -> None:
    """Wait until all have read the verdict."""
    end = time.monotonic() + LINGER_S
    while time.monotonic() < end and not all(store.check([key]) for key in keys):
        time.sleep(POLL_S)


def _late(store: Any, arrival: Arrival, timeout_s: float) -> str:
    """Why this process was not taken in: process 0 has not come, or counts other processes."""
    here, within = arrival.named([arrival.rank]), f"within {timeout_s:.0f} s"
    if not store.check([NAME]):
        return f"{here}: {arrival.named([0])} has not come {within}; check that it was started with RANK=0"
    name = store.get(NAME).decode()
    if store.check([f"{name}/all"]):
        size = parsed(store.get(f"{name}/all").decode()).get("introductions", [{}])[0].get("size")
        if size != arrival.size:
            return (
                f"{here}: started with WORLD_SIZE={arrival.size}, {arrival.named([0])} with WORLD_SIZE={size}; "
                "give all of them the same"
            )
    missing = [rank for rank in range(1, arrival.size) if not store.check([f"{name}/{rank}"])]
    who = arrival.named(missing or [0])
    return f"{here}: {who} not there {within}; check that all {arrival.size} processes (WORLD_SIZE) were started"


def _hosts(came: Mapping[int, Mapping[str, Any]]) -> str:
    """The processes that have come, by machine."""
    by_host: dict[str, list[int]] = {}
    for rank, about in sorted(came.items()):
        by_host.setdefault(str(about.get("hostname", "")), []).append(rank)
    hosts = [f"{', '.join(map(str, ranks))} on {host}" for host, ranks in by_host.items() if host]
    return f"there are {'; '.join(hosts)}; " if hosts else ""


def _same_number(rank: int) -> str:
    return f"two processes were started with RANK={rank}; give each process a number of its own, from 0"


def parsed(text: str) -> dict[str, Any]:
    """Return the JSON object in an entry; {} for what another version has written."""
    with contextlib.suppress(ValueError):
        content = json.loads(text)
        if isinstance(content, dict):
            return cast(dict[str, Any], content)
    return {}
