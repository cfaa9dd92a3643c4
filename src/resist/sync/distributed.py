"""Transport over torch.distributed. A process (a rank) hosts one or more workers.

Long-lived groups: a CPU gloo group for control messages, and for weights either two of gloo, one for collectives and
one for point-to-point messages (so that neither waits for the other), or one of NCCL for both: kernels of two
communicators may each wait for the other on another GPU. Every call that waits for another process fails after
the timeout, with a message that names the process. A process that ends closes its connections, which the others notice
at once; `resist.sync.nccl` does so for NCCL, within seconds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resist.errors import AgreedError, UserError
from resist.sync.agreement import check_agreement
from resist.sync.averaging import is_short, mean_into
from resist.sync.devices import AUTO, GLOO, agree_on_backend, own_device
from resist.sync.groups import Groups
from resist.sync.liveness import Watch
from resist.sync.local import Local
from resist.sync.meeting import environment_number
from resist.sync.pending import PendingMean, PendingMoves, PendingShortMean, sendable
from resist.sync.pending_bytes import PendingBytes
from resist.sync.process_group import DefaultGroup, averaging_gradients
from resist.sync.staging import is_summable, stage
from resist.sync.transport import Handle, Move, Transport, hosted_workers, local_moves, workers_of

# All-reduces that average one tensor at the same time, as many as gloo has threads; and the least bytes of each.
AT_A_TIME, PIECE = 2, 1 << 20


def connect(
    workers: int,
    device: torch.device | str = "cpu",
    timeout_s: float = 600.0,
    *,
    failure: str = "",
    backend: str = AUTO,
) -> Transport:
    """Return the transport that fits how this process was started.

    Under torchrun (RANK and WORLD_SIZE are in the environment), or if torch.distributed is initialized, the workers are
    distributed over its processes. Otherwise this process hosts all of them. Waits for all processes.

    Args:
        workers: S, the number of workers.
        device: The device of the sub-networks. In a group, "cuda" is one of the GPUs for each process of a machine.
        timeout_s: Seconds to wait for other processes, here and in every later call.
        failure: Why this process cannot take part; all processes fail with it when they have met.
        backend: "gloo" or "nccl" for weights. Default: NCCL if each process has a GPU of its own, else gloo.

    Returns:
        The transport: `Distributed`, or `Local` if this process hosts all workers.

    Raises:
        UserError: If the group cannot be formed: the address is in use, or other processes do not come in time.
        AgreedError: If the processes were started for different jobs.
        WorkerLostError: If another process is lost after that.
    """
    alone = not dist.is_initialized() and environment_number("WORLD_SIZE", 1, least=1) == 1
    if failure and (alone or dist.is_initialized()):
        raise UserError(failure)
    if alone:
        return Local(workers)
    if not dist.is_initialized():
        DefaultGroup.join(workers, torch.device(device), timeout_s, failure)
    return Distributed(workers, torch.device(device), timeout_s, backend)


class Distributed:
    """The transport of an initialized torch.distributed, whose processes host the workers.

    Processes host consecutive workers, as evenly as possible. Weights go by NCCL if each process of a machine has a GPU
    of its own, else by gloo, which sends from CPU memory. Creating it waits for all processes.

    Args:
        workers: S, the number of workers.
        device: The device of the tensors.
        timeout_s: Seconds after which a call that waits for another process fails.
        backend: See `connect`.
        watch: Looks at the processes where they may change; see `resist.members.membership`.

    Attributes:
        num_workers: S, the number of workers.
        num_processes: The number of processes.
        rank: The number of this process.
        hosted: The workers of this process, ascending.
        staged: True if bytes are sent from CPU memory, though they are on another device.

    Raises:
        AgreedError: If the processes differ in workers, device or backend, if there are more of them than workers, or
            if `backend` cannot be.
    """

    def __init__(
        self, workers: int, device: torch.device | str = "cpu", timeout_s: float = 600.0, backend: str = AUTO,
        watch: Watch | None = None,
    ) -> None:  # fmt: skip
        self.num_workers, self.num_processes = workers, dist.get_world_size()
        self._hosted_workers = hosted_workers(workers, self.num_processes)
        self._rank_of = {worker: rank for rank, hosted in enumerate(self._hosted_workers) for worker in hosted}
        self._named = partial(_named, self._hosted_workers)
        self._groups = Groups(timeout_s, self._named, watch)
        self.rank, self.hosted = self._groups.rank, self._hosted_workers[self._groups.rank]
        self.begin, self.wait, self.abort = self._groups.begin, self._groups.wait, self._groups.abort
        try:
            device = own_device(torch.device(device))
            chosen = self._agree(device, backend)
            self._groups.open(chosen, device)
        except BaseException:
            self.close()
            raise
        self.staged = chosen == GLOO and device.type != "cpu"  # gloo sends from CPU memory only

    def _agree(self, device: torch.device, backend: str) -> str:
        """The backend for weights, once all processes agree on the job.

        The check comes first, since a process that was started for another job would never join the calls that follow.
        """
        check_agreement(self, {"workers": self.num_workers, "device": device.type, "backend": backend})
        if self.num_processes > self.num_workers:
            raise AgreedError(
                f"{self.num_processes} processes for {self.num_workers} workers; "
                "start at most one process for each worker"
            )
        return agree_on_backend(self, device, backend, self._named)

    def process_of(self, worker: int) -> int:
        """See `Transport.process_of`."""
        return self._rank_of[worker]

    @torch.no_grad()
    def transfer(self, moves: Sequence[Move]) -> Handle:
        """See `Transport.transfer`."""
        arrived: list[Tensor | None] = []
        crossing: list[tuple[int, Move]] = []  # that this process sends or receives; with the tag
        for tag, move in enumerate(moves):
            source, target = self._rank_of[move.source], self._rank_of[move.target]
            # A move within one process never reaches the network: it is done here if the process is this one.
            if source == target:
                arrived += local_moves([move])
                continue
            # Between two processes, the position in the list is the tag by which the two ends find each other.
            arrived.append(move.incoming if target == self.rank else None)
            if self.rank in (source, target):
                crossing.append((tag, move))
        outgoing = [move.outgoing for _, move in crossing if move.outgoing is not None]
        incoming = [move.incoming for _, move in crossing if move.incoming is not None]
        # gloo sends from CPU memory: from a GPU this copies the blocks, and waits for the GPU. On the CPU, and with
        # NCCL, the slot itself is sent, so it must not change before `finish`. It receives there as well.
        sent, received = stage(outgoing, incoming) if self.staged else (outgoing, incoming)
        copies = [(wire, final) for wire, final in zip(received, incoming, strict=True) if wire is not final]
        sending, receiving = iter(sent), iter(received)
        operations: list[dist.P2POp] = []
        for tag, move in crossing:
            source, target = self._rank_of[move.source], self._rank_of[move.target]
            if source == self.rank:
                operations.append(dist.P2POp(dist.isend, sendable(next(sending)), target, self._groups.peers, tag))
            else:
                operations.append(dist.P2POp(dist.irecv, sendable(next(receiving)), source, self._groups.peers, tag))
        # One batch: sends and receives progress together, so no order of the processes can lead to a deadlock. It
        # returns at once; `finish` waits for the processes at the other ends.
        works: Any = self.begin("sending blocks", lambda: dist.batch_isend_irecv(operations)) if operations else []
        return PendingMoves(self, works, arrived, operations, copies)

    @torch.no_grad()
    def mean(self, tensors: Sequence[Tensor], traffic_kind: str, scale: float = 1.0) -> Handle:
        """See `Transport.mean`."""
        if self.num_processes == 1:
            return Local(self.num_workers).mean(tensors, traffic_kind, scale)
        tensors = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
        first = tensors[0]
        if is_short(first.dtype):
            return PendingShortMean(self, tensors, scale)
        if not first.is_floating_point():  # integers have no mean: those of worker 0
            wire, group = self._wire(first), self._groups.collective
            work = self.begin("averaging", lambda: dist.broadcast(wire, 0, group=group, async_op=True))
            return PendingMean(self, [work], [wire], wire, tensors)
        # 1. Within the process: the first hosted worker's tensor becomes the mean of the hosted ones, without memory
        #    for a copy. The others keep theirs until `finish`.
        mean_into(first, tensors[1:])
        # 2. The sum over processes divided by their number is the mean over workers only if all processes host equally
        #    many. Otherwise each process weighs its mean by len(hosted) / S.
        if any(len(hosted) != len(self.hosted) for hosted in self._hosted_workers):
            first.mul_(len(self.hosted) * self.num_processes / self.num_workers)
        # 3. Between processes: all-reduces in the background; gloo is faster with two at a time. `finish` waits for all
        #    processes, divides, and copies the mean to the other hosted workers.
        wire, group = self._wire(first), self._groups.collective
        pieces = wire.chunk(max(1, min(AT_A_TIME, wire.nbytes // PIECE))) if wire.device.type == "cpu" else (wire,)
        works = self.begin("averaging", lambda: [dist.all_reduce(p, group=group, async_op=True) for p in pieces])
        return PendingMean(self, works, pieces, wire, tensors, self.num_processes, scale)

    def _wire(self, tensor: Tensor) -> Tensor:
        """The tensor that the backend changes: a copy on the host where it cannot use this one."""
        return tensor.to("cpu", copy=True) if self.staged and not is_summable(tensor) else tensor

    @property
    def hosted_workers(self) -> Sequence[Sequence[int]]:
        """The workers of each process."""
        return self._hosted_workers

    def scatter(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """See `Transport.scatter`."""
        return PendingBytes(self, sent, sizes, gather=False)

    def gather(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """See `Transport.gather`."""
        return PendingBytes(self, sent, sizes, gather=True)

    def exchange_bytes(self, received: Sequence[Tensor], sent: Sequence[Tensor]) -> Any:
        """Send `sent[p]` to each process p and receive `received[p]` from it, in the background."""
        received[self.rank].copy_(sent[self.rank])
        operations: list[dist.P2POp] = []
        for distance in range(1, self.num_processes):
            to, source = (self.rank + distance) % self.num_processes, (self.rank - distance) % self.num_processes
            # Each pair of processes exchanges in the same order, so that no tag is needed.
            if sent[to].numel():
                operations.append(dist.P2POp(dist.isend, sent[to], to, self._groups.collective, 0))
            if received[source].numel():
                operations.append(dist.P2POp(dist.irecv, received[source], source, self._groups.collective, 0))
        return dist.batch_isend_irecv(operations) if operations else []

    def average_gradients(self, model: nn.Module, count: Callable[[int], None]) -> nn.Module:
        """See `Transport.average_gradients`."""
        if self.num_processes != self.num_workers:
            raise AgreedError(
                f"ddp runs one worker in each process, and there are {self.num_processes} processes for "
                f"{self.num_workers} workers; start {self.num_workers}"
            )
        if others := [p.device.type for p in model.parameters() if not is_summable(p)]:
            raise AgreedError(
                f"ddp averages gradients on the CPU and on GPUs of CUDA, not on {others[0]}; give another device or "
                "strategy, or one process"
            )
        groups = self._groups
        return groups.limited(
            "connecting", lambda: averaging_gradients(model, groups.collective, count, groups.begin_gradients)
        )

    def all_gather_text(self, text: str) -> list[str]:
        """See `Transport.all_gather_text`."""
        return self._groups.gather_text(text)

    def close(self) -> None:
        """See `Transport.close`.

        Destroys the groups of this transport. The default group stays if the caller made it, or as long as another
        transport uses it.
        """
        self._groups.close()


def _named(hosted: Sequence[Sequence[int]], ranks: Sequence[int]) -> str:
    return ", ".join(f"process {rank} ({workers_of(rank, hosted)})" for rank in ranks)
