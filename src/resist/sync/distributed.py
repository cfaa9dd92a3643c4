"""Transport over torch.distributed. A process (a rank) hosts one or more workers.

Long-lived groups: a CPU gloo group for control messages, and for weights either two of gloo, one for collectives and
one for point-to-point messages (so that neither waits for the other), or one of NCCL for both: kernels of two
communicators may each wait for the other on another GPU. Every call that waits for another process fails after
the timeout, with a message that names the process. A process that ends closes its connections, which the others notice
at once.
"""

import contextlib
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store  # pyright: ignore[reportPrivateUsage]

from resist.errors import AgreedError, UserError, WorkerLostError
from resist.sync.agreement import check_agreement
from resist.sync.averaging import is_short, mean_into
from resist.sync.devices import AUTO, GLOO, NCCL, agree_on_backend, own_device
from resist.sync.interfaces import reason
from resist.sync.liveness import COMPUTING, WAITING, Liveness
from resist.sync.local import Local
from resist.sync.meeting import environment_number
from resist.sync.pending import PendingMean, PendingMoves, PendingShortMean, sendable
from resist.sync.process_group import DefaultGroup, averaging_gradients
from resist.sync.transport import PACKET_BYTES, Handle, Move, Transport, hosted_workers, local_moves, workers_of


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

    Attributes:
        num_workers: S, the number of workers.
        num_processes: The number of processes.
        rank: The number of this process.
        hosted: The workers of this process, ascending.
        staged: True if messages are sent from CPU memory only.

    Raises:
        AgreedError: If the processes differ in workers, device or backend, if there are more of them than workers, or
            if `backend` cannot be.
    """

    def __init__(
        self, workers: int, device: torch.device | str = "cpu", timeout_s: float = 600.0, backend: str = AUTO
    ) -> None:
        self.num_workers, self.num_processes = workers, dist.get_world_size()
        self.rank = dist.get_rank()
        timeout = timedelta(seconds=timeout_s)
        self._hosted_workers = hosted_workers(workers, self.num_processes)
        self.hosted = self._hosted_workers[self.rank]
        self._rank_of = {worker: rank for rank, hosted in enumerate(self._hosted_workers) for worker in hosted}
        self._liveness: Liveness | None = None
        self._groups: list[dist.ProcessGroup] = []
        self._closed = False
        # Threads of a group that was not destroyed abort the process when it ends: so `close`, whatever happens.
        self._default_group = DefaultGroup.present()
        if self._default_group is not None:
            self._default_group.users += 1
        try:
            self._control_group = self._new_group(timeout, "gloo")
            # Each transport has entries of its own in the store, which may serve others before, beside and after it.
            name = f"resist/{self._gather(uuid.uuid4().bytes, 16)[0].hex()}"
            store = dist.PrefixStore(name, _get_default_store())  # pyright: ignore[reportPrivateImportUsage]
            self._liveness = Liveness(store, self.rank, self.num_processes)
            device = own_device(torch.device(device))
            chosen = self._agree(device, backend)
            self._collective = self._new_group(timeout, chosen)
            self._peers = self._collective if chosen == NCCL else self._new_group(timeout, chosen)
            if chosen == NCCL:
                # All open the communicator here: a batch of messages has no part for a process without messages.
                self.run("opening NCCL", lambda: self._open(device))
        except BaseException:
            self.close()
            raise
        self.staged = chosen == GLOO  # gloo sends from CPU memory only

    def _new_group(self, timeout: timedelta, backend: str) -> dist.ProcessGroup:
        """Create a group of all processes. Each process has to call it."""
        group = self.run("connecting", lambda: dist.new_group(timeout=timeout, backend=backend))
        assert isinstance(group, dist.ProcessGroup), "every process is a member"
        self._groups.append(group)
        return group

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

    def _open(self, device: torch.device) -> None:
        """Open the communicator of the group. Waits for all processes."""
        one = torch.ones(1, device=device)
        dist.all_reduce(one, group=self._collective)
        assert one.item() == self.num_processes  # waits for the device

    def process_of(self, worker: int) -> int:
        """See `Transport.process_of`."""
        return self._rank_of[worker]

    @torch.no_grad()
    def transfer(self, moves: Sequence[Move]) -> Handle:
        """See `Transport.transfer`."""
        arrived: list[Tensor | None] = []
        operations: list[dist.P2POp] = []
        copies: list[tuple[Tensor, Tensor]] = []  # (in CPU memory, on the GPU), to copy after arrival
        for tag, move in enumerate(moves):
            source, target = self._rank_of[move.source], self._rank_of[move.target]
            # A move within one process never reaches the network: it is done here if the process is this one.
            if source == target:
                arrived += local_moves([move])
                continue
            # Between two processes, the position in the list is the tag by which the two ends find each other.
            arrived.append(move.incoming if target == self.rank else None)
            if source == self.rank:
                assert move.outgoing is not None
                # gloo sends from CPU memory: from a GPU this copies the block, and waits for the GPU. On the CPU, and
                # with NCCL, the slot itself is sent, so it must not change before `finish`.
                wire = sendable(move.outgoing.cpu() if self.staged else move.outgoing)
                operations.append(dist.P2POp(dist.isend, wire, target, self._peers, tag))
            if target != self.rank:
                continue
            final = move.incoming
            assert final is not None
            # The receiving side of the same: one block in CPU memory for each block to receive.
            wire = torch.empty_like(final, device="cpu") if self.staged and final.is_cuda else final
            if wire is not final:
                copies.append((wire, final))
            operations.append(dist.P2POp(dist.irecv, sendable(wire), source, self._peers, tag))
        # One batch: sends and receives progress together, so no order of the processes can lead to a deadlock. It
        # returns at once; `finish` waits for the processes at the other ends.
        works = self.run("sending blocks", lambda: dist.batch_isend_irecv(operations) if operations else [])
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
            work = self.run("averaging", lambda: dist.broadcast(first, 0, group=self._collective, async_op=True))
            return PendingMean(self, work, tensors)
        # 1. Within the process: the first hosted worker's tensor becomes the mean of the hosted ones, without memory
        #    for a copy. The others keep theirs until `finish`.
        mean_into(first, tensors[1:])
        # 2. The sum over processes divided by their number is the mean over workers only if all processes host equally
        #    many. Otherwise each process weighs its mean by len(hosted) / S.
        if any(len(hosted) != len(self.hosted) for hosted in self._hosted_workers):
            first.mul_(len(self.hosted) * self.num_processes / self.num_workers)
        # 3. Between processes: one all-reduce, in the background. `finish` waits for all processes, divides, and copies
        #    the mean to the other hosted workers.
        work = self.run("averaging", lambda: dist.all_reduce(first, group=self._collective, async_op=True))
        return PendingMean(self, work, tensors, self.num_processes, scale)

    def exchange_pieces(self, received: Tensor, sent: Tensor) -> Any:
        """Send a piece of `sent` to each process, in the background."""
        return dist.all_to_all_single(received, sent, group=self._collective, async_op=True)

    def gather_pieces(self, received: Tensor, sent: Tensor) -> None:
        """Send `sent` to all processes."""
        dist.all_gather(list(received.chunk(self.num_processes)), sent, group=self._collective)

    def average_gradients(self, model: nn.Module, count: Callable[[int], None]) -> nn.Module:
        """See `Transport.average_gradients`."""
        if self.num_processes != self.num_workers:
            raise AgreedError(
                f"ddp runs one worker in each process, and there are {self.num_processes} processes for "
                f"{self.num_workers} workers; start {self.num_workers}"
            )
        return averaging_gradients(model, self._collective, count)

    def all_gather_text(self, text: str) -> list[str]:
        """See `Transport.all_gather_text`.

        One all-gather if all texts fit into a packet, else a second one for the whole texts. A packet is the length of
        the text in 8 bytes, and its beginning.
        """
        encoded = text.encode("utf-8", "surrogateescape")
        packets = self._gather(len(encoded).to_bytes(8, "big") + encoded, PACKET_BYTES)
        sizes = [int.from_bytes(packet[:8], "big") for packet in packets]
        if max(sizes) <= PACKET_BYTES - 8:
            return [
                packet[8 : 8 + size].decode("utf-8", "surrogateescape")
                for packet, size in zip(packets, sizes, strict=True)
            ]
        texts = self._gather(encoded, max(sizes))
        return [padded[:size].decode("utf-8", "surrogateescape") for padded, size in zip(texts, sizes, strict=True)]

    def _gather(self, content: bytes, size: int) -> list[bytes]:
        """The contents of all processes, cut or padded to `size` bytes."""
        packet = torch.frombuffer(bytearray(content.ljust(size, b"\0")[:size]), dtype=torch.uint8)
        packets = [torch.empty_like(packet) for _ in range(self.num_processes)]
        self.run("comparing", lambda: dist.all_gather(packets, packet, group=self._control_group))
        return [gathered.numpy().tobytes() for gathered in packets]

    def close(self) -> None:
        """See `Transport.close`.

        Destroys the groups of this transport. The default group stays if the caller made it, or as long as another
        transport uses it.
        """
        if self._closed:
            return
        self._closed = True
        if self._liveness is not None:
            self._liveness.close()
        for group in reversed(self._groups):
            with contextlib.suppress(ValueError, AssertionError):  # the caller has destroyed all groups
                dist.destroy_process_group(group)
        if self._default_group is not None:
            self._default_group.leave()

    def run(self, doing: str, action: Any) -> Any:
        """Run an action that may wait for other processes.

        Args:
            doing: Description of the action, for the error message.
            action: Function without arguments.

        Returns:
            The result of `action`.

        Raises:
            UserError: If this transport is closed.
            WorkerLostError: If contact with another process is lost, or one does not come in time.
        """
        if self._closed:
            raise UserError("this job is closed, and its connections with it; call job.close() after the last use")
        self._report_state(WAITING)
        try:
            return action()
        except RuntimeError as error:
            raise self._lost(doing, error) from error
        finally:
            self._report_state(COMPUTING)

    def _report_state(self, state: str) -> None:
        if self._liveness is not None:
            self._liveness.report_state(state)

    def _lost(self, doing: str, error: Exception) -> WorkerLostError:
        cause = "not all processes have come" if self._liveness is None else self._liveness.cause(self._named)
        return WorkerLostError(f"{self._named([self.rank])} lost contact while {doing}: {reason(error)}; {cause}")

    def _named(self, ranks: Sequence[int]) -> str:
        return ", ".join(f"process {rank} ({workers_of(rank, self._hosted_workers)})" for rank in ranks)
