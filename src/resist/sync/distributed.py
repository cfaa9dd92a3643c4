"""The transport over torch.distributed, and the only place that uses it. A process (a rank) hosts one or more workers.

Four long-lived groups: one for the collective on the shared part, one for point-to-point messages (so that neither
queues behind the other), one of gloo on the host for words, one for what goes on beside training. Every call here that
waits for another process gives up after the timeout and says so; a process that ends closes its connections, which its
peers notice at once.
"""

import os
import re
import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from resist.errors import AgreedError, UserError, WorkerLostError
from resist.sync.agreement import check_agreement
from resist.sync.averaging import mean_into
from resist.sync.liveness import WAITS, WORKS, Liveness
from resist.sync.local import Local
from resist.sync.rendezvous import agree_on_attempt
from resist.sync.transport import PACKET_BYTES, Handle, Move, Transport, hosted_workers, local_moves, workers_of


def connect(workers: int, device: torch.device | str = "cpu", timeout_s: float = 600.0) -> Transport:
    """The transport that fits how this process was started.

    Under torchrun (RANK and WORLD_SIZE in the environment) or with torch.distributed already initialized, the workers
    are shared out over its processes; else this process hosts all of them. Raises UserError when the group cannot be
    formed (an address in use, peers that do not come within `timeout_s` seconds).
    """
    device = torch.device(device)
    ours = not dist.is_initialized()
    if ours:
        if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
            return Local(workers)
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        try:
            timeout = timedelta(seconds=timeout_s)
            store, rank, size = next(iter(rendezvous("env://", timeout=timeout)))
            attempt = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
                agree_on_attempt(store, rank, size, timeout_s), store
            )
            dist.init_process_group("gloo", store=attempt, rank=rank, world_size=size, timeout=timeout)
        except (RuntimeError, ValueError, TimeoutError) as error:  # torch derives its own from RuntimeError
            reason = str(error).splitlines()[0]
            raise UserError(
                f"no process group at {where}: {reason}; check that the port is free on the first host and that all "
                f"{os.environ['WORLD_SIZE']} processes were started"
            ) from error
    try:
        return Distributed(workers, device, timeout_s)
    except BaseException:
        if ours:  # a group that nobody leaves has threads at the end of the process, which C++ then aborts
            dist.destroy_process_group()
        raise


def loopback_store(listener: socket.socket) -> object:
    """Serve a store at `listener`, for processes of this machine, as long as the returned object is kept."""
    port = listener.getsockname()[1]
    options = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
    return dist.TCPStore("127.0.0.1", port, **options)  # pyright: ignore[reportPrivateImportUsage]


class Distributed:
    def __init__(self, workers: int, device: torch.device | str = "cpu", timeout_s: float = 600.0) -> None:
        self.num_workers, self.num_processes = workers, dist.get_world_size()
        self.rank = dist.get_rank()
        timeout = timedelta(seconds=timeout_s)
        self._hosted_workers = hosted_workers(workers, self.num_processes)
        self.hosted = self._hosted_workers[self.rank]
        self._liveness = Liveness(_get_default_store(), self.rank, self.num_processes)
        self._control_group = _group(timeout, "gloo")
        backend = self._agree(torch.device(device))
        self._rank_of = {worker: rank for rank, hosted in enumerate(self._hosted_workers) for worker in hosted}
        self._collective = _group(timeout, backend)
        self._peers = _group(timeout, backend)
        self.background: dist.ProcessGroup | None = _group(timeout, "gloo")
        self._staged = backend == "gloo"  # gloo sends from host memory only

    def _agree(self, device: torch.device) -> str:
        """The backend for weights, after a look at whether all processes mean the same job.

        NCCL where each process has a GPU to itself. Processes that share one (and the CPU) use gloo. This comes before
        anything that would wait in vain for a process that was started otherwise.
        """
        alone = device.type == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
        mine = {"workers": self.num_workers, "device": device.type, "backend": "nccl" if alone else "gloo"}
        check_agreement(self, mine)
        if self.num_processes > self.num_workers:
            raise AgreedError(
                f"{self.num_processes} processes for {self.num_workers} workers; "
                "start at most one process for each worker"
            )
        if alone:
            torch.cuda.set_device(device)  # NCCL asks for the current device
        return str(mine["backend"])

    def process_of(self, worker: int) -> int:
        return self._rank_of[worker]

    @torch.no_grad()
    def transfer(self, moves: Sequence[Move]) -> Handle:
        arrived: list[Tensor | None] = []
        operations: list[dist.P2POp] = []
        copies: list[tuple[Tensor, Tensor]] = []  # from host memory to the device, after arrival
        for tag, move in enumerate(moves):
            source, target = self._rank_of[move.source], self._rank_of[move.target]
            if source == target:
                arrived += local_moves([move])
                continue
            arrived.append(move.incoming if target == self.rank else None)
            if source == self.rank:
                assert move.outgoing is not None
                wire = move.outgoing.cpu() if self._staged else move.outgoing
                operations.append(dist.P2POp(dist.isend, wire, target, self._peers, tag))
            if target != self.rank:
                continue
            final = move.incoming
            assert final is not None
            wire = torch.empty_like(final, device="cpu") if self._staged and final.is_cuda else final
            if wire is not final:
                copies.append((wire, final))
            operations.append(dist.P2POp(dist.irecv, wire, source, self._peers, tag))
        works = self._run("sending blocks", lambda: dist.batch_isend_irecv(operations) if operations else [])
        return _Pending(self, "exchanging blocks", works, arrived, operations, copies)

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor], kind: str) -> Handle:
        first = tensors[0]
        if self.num_processes == 1:
            return Local(self.num_workers).mean(tensors, kind)
        # Hosted workers are weighed by how many there are: a process's mean counts len(hosted) / S.
        mean_into(first, tensors[1:])
        if any(len(hosted) != len(self.hosted) for hosted in self._hosted_workers):
            first.mul_(len(self.hosted) * self.num_processes / self.num_workers)
        work = self._run("averaging", lambda: dist.all_reduce(first, group=self._collective, async_op=True))
        return _Mean(self, work, tensors, self.num_processes)

    def average_gradients(self, model: nn.Module, count: Callable[[int], None]) -> nn.Module:
        if self.num_processes != self.num_workers:
            raise AgreedError(
                f"ddp runs one worker in each process, and there are {self.num_processes} processes for "
                f"{self.num_workers} workers; start {self.num_workers}"
            )
        replica = DistributedDataParallel(model, process_group=self._collective)

        # torch looks at the annotations of a hook
        def counted(
            _state: object,
            bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
        ) -> torch.futures.Future[Tensor]:
            count(bucket.buffer().numel() * bucket.buffer().element_size())
            return allreduce_hook(self._collective, bucket)

        replica.register_comm_hook(None, counted)
        return replica

    def all_gather_text(self, text: str) -> list[str]:
        """One all-gather for texts that fit into a packet, a second one where some do not."""
        mine = text.encode()
        first = self._gather(len(mine).to_bytes(8, "big") + mine, PACKET_BYTES)
        sizes = [int.from_bytes(packet[:8], "big") for packet in first]
        if max(sizes) <= PACKET_BYTES - 8:
            return [packet[8 : 8 + size].decode() for packet, size in zip(first, sizes, strict=True)]
        whole = self._gather(mine, max(sizes))
        return [packet[:size].decode() for packet, size in zip(whole, sizes, strict=True)]

    def _gather(self, mine: bytes, size: int) -> list[bytes]:
        """What each process passed, padded to `size` bytes."""
        own = torch.frombuffer(bytearray(mine.ljust(size, b"\0")[:size]), dtype=torch.uint8)
        packets = [torch.empty_like(own) for _ in range(self.num_processes)]
        self._run("comparing", lambda: dist.all_gather(packets, own, group=self._control_group))
        return [packet.numpy().tobytes() for packet in packets]

    def close(self) -> None:
        self._liveness.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _run(self, doing: str, action: Any) -> Any:
        self._liveness.is_doing(WAITS)
        try:
            return action()
        except RuntimeError as error:
            raise self.lost(doing, error) from error
        finally:
            self._liveness.is_doing(WORKS)

    def lost(self, doing: str, error: Exception) -> WorkerLostError:
        return WorkerLostError(
            f"{self._named([self.rank])} lost contact while {doing}: {_reason(error)}; {self._cause()}"
        )

    def _cause(self) -> str:
        found = self._liveness.call()
        if found is None:
            return "the process that holds the job together (process 0, or the launcher) does not answer either"
        missing, working = found
        if missing:
            return f"no answer from {self._named(missing)}"
        if working:
            return f"{self._named(working)} did not come in time: it hangs, or needs a longer --timeout-s"
        return "all processes answer and wait: look at the network"

    def _named(self, ranks: Sequence[int]) -> str:
        return ", ".join(f"process {rank} ({workers_of(rank, self._hosted_workers)})" for rank in ranks)


class _Pending:
    """Point-to-point messages under way. Keeps what they read and write alive."""

    def __init__(
        self,
        owner: Distributed,
        doing: str,
        works: Any,
        arrived: list[Tensor | None],
        operations: Any,
        copies: list[tuple[Tensor, Tensor]],
    ) -> None:
        self._owner, self._doing, self._works = owner, doing, works
        self._arrived, self._operations, self._copies = arrived, operations, copies

    @torch.no_grad()
    def finish(self) -> list[Tensor | None]:
        for work in self._works:
            self._owner._run(self._doing, work.wait)
        for wire, final in self._copies:
            final.copy_(wire)
        return self._arrived


class _Mean:
    """A sum under way that becomes a mean for every hosted worker."""

    def __init__(self, owner: Distributed, work: Any, tensors: Sequence[Tensor], processes: int) -> None:
        self._owner, self._work, self._tensors, self._processes = owner, work, tensors, processes

    @torch.no_grad()
    def finish(self) -> list[Tensor | None]:
        self._owner._run("averaging the shared part", self._work.wait)
        first = self._tensors[0].div_(self._processes)
        for tensor in self._tensors[1:]:
            tensor.copy_(first)
        return []


def _reason(error: Exception) -> str:
    """gloo's message without the place in its source and without its advice."""
    return re.sub(r"^\[/\S+\] ", "", str(error).splitlines()[0]).partition(" This is typically")[0].rstrip(".")


def _group(timeout: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    """A group of all processes. Makes one everywhere: each process has to call it."""
    group = dist.new_group(timeout=timeout, backend=backend)
    assert isinstance(group, dist.ProcessGroup), "every process is a member"
    return group
