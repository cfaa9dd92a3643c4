"""The processes that benchmarks/elastic.py disturbs: one member of a run by this package, or one replica of torchft.

    python benchmarks/elastic_members.py METHOD SETTINGS        # started by elastic.py; SETTINGS is JSON

Both train the same network on random images in steps of a stated length, and synchronize after the same number of
steps. Each event is a line of JSON on standard output; see `emit`.

Signals are the faults that a process can bring on itself: SIGUSR1 raises an exception wherever the main thread is, and
SIGUSR2 shuts down all TCP connections of the process.
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resist.models import build

CLASSES, SIZE = 10, 8  # images as large as the digits


class InjectedError(Exception):
    """The exception that is a fault."""


def emit(event: str, **values: object) -> None:
    """Write one event: its name, the process, the time of a clock that all processes share, and values."""
    line = json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **values})
    os.write(1, f"{line}\n".encode())  # in one piece, which the lines of other processes do not break up


def raise_injected(*_: object) -> None:
    raise InjectedError("a fault")


def cut_connections(*_: object) -> None:
    """Shut down all TCP connections of this process; ports at which it listens stay."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as connection:
                    if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                        connection.shutdown(socket.SHUT_RDWR)


def peak_mb() -> float:
    """Return the peak of the memory of this process so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def digest(tensors: Iterable[Tensor]) -> str:
    """Return a digest of values."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


def network(settings: dict[str, Any]) -> nn.Module:
    """Return the network that is trained."""
    depths = tuple(settings["depths"])
    return build("preact_small", num_classes=CLASSES, depths=depths, width=settings["width"])


class Steps:
    """Steps of a stated length: a real one on random images, and sleep for what is left of its time.

    Args:
        settings: Those of the benchmark.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._length_s, self._batch = settings["step_s"], settings["batch"]
        self._random = torch.Generator().manual_seed(os.getpid())

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Train on one batch."""
        start = time.monotonic()
        images = torch.randn(self._batch, 3, SIZE, SIZE, generator=self._random)
        labels = torch.randint(CLASSES, (self._batch,), generator=self._random)
        F.cross_entropy(model(images), labels).backward()
        busy_s = time.monotonic() - start
        time.sleep(max(0.0, self._length_s - busy_s))
        emit("step", busy_s=round(busy_s, 4))
        optimizer.step()  # last: torchft synchronizes in it
        optimizer.zero_grad()


def resist_member(settings: dict[str, Any]) -> None:
    """Take part with this package, as examples/7_members_come_and_go.py does."""
    import resist
    from resist.members.generations import connect_members
    from resist.members.membership import Membership
    from resist.members.secret import read_secret
    from resist.members.store_client import SecretStore
    from resist.planning.wire import as_wire
    from resist.sync.local import Unconnected

    def job_over(transport: Any) -> resist.Job:
        return resist.Job(
            lambda: network(settings), resist.resist(most, local_steps=settings["local_steps"], min_depth=0),
            batchnorm="average", example=torch.zeros(2, 3, SIZE, SIZE), elastic=True, replicate=True,
            wire=replace(as_wire(settings["wire"]), fragments=settings["fragments"]), transport=transport,
        )  # fmt: skip

    most, workers = settings["members"], {"workers": lambda generation: len(generation.members)}
    bounds = {"heartbeat_s": settings["bound_s"] / settings["missed"], "missed": settings["missed"]}
    changed = settings["replaces"]  # members, which have a network, take this process in
    job = job_over(Unconnected(most)) if changed else None  # before it joins, for the others would wait for it
    emit("ready", peak_mb=peak_mb())
    store = SecretStore("127.0.0.1", settings["port"], read_secret())
    membership = Membership(store, {}, least=2, most=most, **bounds)
    membership.join(expected=most)
    try:
        _, transport = connect_members(membership, dict, **workers)
        train(settings, membership, transport, job or job_over(transport), changed)
    finally:
        membership.leave()  # what ends by an exception, too


def train(settings: dict[str, Any], membership: Any, transport: Any, job: Any, changed: bool) -> None:
    """Train with members that come and go, until the benchmark ends."""
    from resist import WorkerLostError
    from resist.members.generations import regroup

    workers = {"workers": lambda generation: len(generation.members)}
    optimizer = torch.optim.SGD(job.model.parameters(), lr=0.01, momentum=0.9)
    job.attach(optimizer)
    steps, stop, new = Steps(settings), Path(settings["stop"]), True
    while True:
        decided = ""
        try:
            if changed:
                found, changed = job.regroup(transport), False
                emit("regroup", round=found.round, step=found.step, workers=found.workers, repeated=found.repeated,
                     lost=len(found.lost), joined=len(found.joined), recovered=len(found.recovered),
                     **standing(membership, job))  # fmt: skip
            if new:
                emit("member", generation=membership.generation.number)
                new = False
            steps.step(job.model, optimizer)
            if job.step(optimizer):
                emit("round", round=job.round, step=job.step_index, workers=job.strategy.workers, peak_mb=peak_mb(),
                     traffic=job.transport.take()["wire_bytes"], **standing(membership, job))  # fmt: skip
                seen = "stop" if stop.exists() else "regroup" if membership.newcomers() else ""
                decided = job.transport.all_gather_text(seen)[0]
                changed = decided == "regroup"
        except WorkerLostError as error:
            emit("lost", reason=str(error)[:200])
            changed = True
        if decided == "stop":
            break
        if changed:
            _, transport = regroup(membership, transport, {}, **workers)
    full = job.full_model()
    if full is not None:
        emit("whole", **examined(full, settings))
    job.transport.all_gather_text("done")
    membership.end("the benchmark ends")
    job.close()


def standing(membership: Any, job: Any) -> dict[str, Any]:
    """Where a member stands, and the digest of what all members must have in common there."""
    (worker,) = job.workers
    return {"worker": worker.index, "generation": membership.generation.number,
            "members": membership.generation.members, "digest": digest(shared(worker))}  # fmt: skip


def shared(worker: Any) -> list[Tensor]:
    """What all workers agree on between two rounds: the weights that are in no chain; of fragments, their means."""
    from resist.subnet.layout import Place

    agreed, layouts = worker.agreed, worker.subnet.layouts
    return [
        layout.view(Place(None, 0, piece), agreed[dtype])
        for dtype, layout in layouts.items()
        for piece in layout.part(None).pieces
    ]


def examined(full: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """Compare a full network with a new one: the same tensors, all finite."""
    values, expected = full.state_dict(), network(settings).state_dict()
    alike = {name: tuple(value.shape) for name, value in values.items()} == {
        name: tuple(value.shape) for name, value in expected.items()
    }
    finite = all(bool(value.isfinite().all()) for value in values.values())
    moved = [name for name, value in values.items() if name.endswith("weight") and not value.equal(expected[name])]
    weights = [name for name in values if name.endswith("weight")]
    with torch.inference_mode():
        answers = bool(full(torch.randn(2, 3, SIZE, SIZE)).isfinite().all())
    return {"complete": alike, "finite": finite and answers, "trained": len(moved) == len(weights)}


def torchft_member(settings: dict[str, Any]) -> None:
    """Train with LocalSGD of torchft."""
    import torch.distributed as dist
    from torchft.local_sgd import LocalSGD
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    torch.manual_seed(0)
    model, since = network(settings), 0  # steps that are in the weights and in no mean yet
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def load(state: dict[str, Any]) -> None:
        nonlocal since
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        since = 0  # this process's own steps are overwritten
        emit("healed")

    emit("ready", peak_mb=peak_mb())
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=settings["bound_s"])), min_replica_size=2, load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        use_async_quorum=False, timeout=timedelta(seconds=30), replica_id=f"member_{os.getpid()}", rank=0,
        world_size=1, store_addr="localhost", store_port=store.port, lighthouse_addr=settings["lighthouse"],
        hostname="localhost",
    )  # fmt: skip
    steps, stop, new = Steps(settings), Path(settings["stop"]), True

    def synchronized(before: int) -> None:
        nonlocal since, new
        if manager.current_step() == before:
            emit("failed", round=before, reason=str(manager.errored())[:200])
            return
        emit("round", round=manager.current_step(), images=since * settings["batch"], generation=manager._quorum_id,
             worker=manager.participating_rank(), workers=manager.num_participants(), peak_mb=peak_mb(),
             digest=digest(model.parameters()))  # fmt: skip
        since = 0
        if new:
            emit("member", generation=manager._quorum_id)
            new = False

    with LocalSGD(manager, model, optimizer, sync_every=settings["local_steps"]) as local_sgd:
        local_sgd.sync()  # at once, so that a process that comes does not train what is then overwritten
        synchronized(-1)
        while not (stop.exists() and manager.current_step() >= int(stop.read_text())):
            for left in range(settings["local_steps"], 0, -1):
                since += 1
                before = manager.current_step() if left == 1 else 0
                steps.step(model, optimizer)
            synchronized(before)
    emit("whole", **examined(model, settings))
    manager.shutdown(wait=False)


def main() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, raise_injected)
    signal.signal(signal.SIGUSR2, cut_connections)
    settings = json.loads(sys.argv[2])
    {"resist": resist_member, "torchft": torchft_member}[sys.argv[1]](settings)


if __name__ == "__main__":
    main()
