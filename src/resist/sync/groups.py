"""The process groups of a transport, and the calls that wait in them: each has a limit, and an error that names who."""

import contextlib
import logging
import sys
import threading
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store  # pyright: ignore[reportPrivateUsage]

from resist.errors import AgreedError, UserError, WorkerLostError
from resist.sync.devices import GLOO, NCCL, is_of_device
from resist.sync.interfaces import reason
from resist.sync.liveness import COMPUTING, WAITING, GroupWatch, Liveness, Watch
from resist.sync.nccl import MARGIN_S, NcclGroup, StuckError, errors_left_to_us, handling_note
from resist.sync.process_group import DefaultGroup, abort_group, close_connections
from resist.sync.texts import gather_texts

log = logging.getLogger(__name__)

GRADIENTS = "averaging gradients"


class Groups:
    """The groups of all processes: one of gloo for control messages, and after `open` those for weights.

    Creating it waits for all processes.

    Args:
        timeout_s: Seconds after which a call that waits for another process fails.
        named: Names processes by their numbers.
        watch: Looks at the members of a generation, in place of queries at the store. Default: these are all members.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
        collective: The group for collectives on weights.
        peers: The group for messages between two processes.
    """

    collective: dist.ProcessGroup
    peers: dist.ProcessGroup

    def __init__(self, timeout_s: float, named: Callable[[Sequence[int]], str], watch: Watch | None = None) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._timeout_s, self._named = timeout_s, named
        self._groups: list[dist.ProcessGroup] = []
        self._liveness: Liveness | GroupWatch | None = None
        self._watch, self._aborting = watch, threading.Lock()
        self._nccl: NcclGroup | None = None
        self._closed, self._aborted, self._loss = False, False, ""
        # Threads of a group that was not destroyed abort the process when it ends: so `close`, whatever happens.
        self._default_group = DefaultGroup.present()
        if self._default_group is not None:
            self._default_group.users += 1
        try:
            if watch is not None:
                self._liveness = GroupWatch(watch, self.abort)
            self._control = self._new(GLOO, timeout_s)
            if watch is not None:
                return
            # Each transport has entries of its own in the store, which may serve others before, beside and after it.
            name = f"resist/{self._gather(uuid.uuid4().bytes, 16)[0].hex()}"
            store = dist.PrefixStore(name, _get_default_store())  # pyright: ignore[reportPrivateImportUsage]
            self._liveness = Liveness(store, self.rank, self.size)
        except BaseException:
            self.close()
            raise

    def open(self, backend: str, device: torch.device) -> None:
        """Create the groups for weights. Waits for all processes.

        Args:
            backend: "gloo", which gets two, so that neither waits for the other; or "nccl", which gets one for both.
            device: The device of the weights, with its number.

        Raises:
            AgreedError: In all processes: NCCL cannot connect them.
        """
        if backend == NCCL:
            self.collective = self.peers = self._open_nccl(device)
        else:
            self.collective, self.peers = self._new(GLOO, self._timeout_s), self._new(GLOO, self._timeout_s)

    def _new(self, backend: str, timeout_s: float) -> dist.ProcessGroup:
        # Connecting to a member that is lost cannot be ended otherwise.
        connect_s = timeout_s if self._watch is None else min(timeout_s, self._watch.bound_s)
        limit = timedelta(seconds=connect_s)
        group = self.run("connecting", lambda: dist.new_group(timeout=limit, backend=backend))
        assert isinstance(group, dist.ProcessGroup), "every process is a member"
        if connect_s < timeout_s:
            group.set_timeout(timedelta(seconds=timeout_s))
        self._groups.append(group)
        return group

    def _open_nccl(self, device: torch.device) -> dist.ProcessGroup:
        """Create the group of NCCL and open its communicator.

        All do so here, by a first operation: a batch of messages has no part for a process without messages.
        """
        if self.rank == 0 and (note := handling_note()):
            log.info("note: %s", note)
        assert self._liveness is not None
        self._liveness.beat()
        with errors_left_to_us():
            group = self._new(NCCL, self._timeout_s + MARGIN_S)
        self._groups.remove(group)
        self._nccl = NcclGroup(
            group,
            abort=abort_group,
            destroy=dist.destroy_process_group,
            timeout_s=self._timeout_s,
            has_loss=self._liveness.has_loss,
            device=device,
        )
        failure = ""
        try:
            self._nccl.open(lambda: self._sum_of_ones(device, group))
        except (RuntimeError, TimeoutError) as error:
            failure = reason(error)
        failures = self.gather_text(failure)  # also where only one of them fails
        if any(failures):
            self._nccl.abort()
            # A process that only notices that another one has failed is not the first to name.
            rank = min((rank for rank, text in enumerate(failures) if text), key=lambda r: "remote" in failures[r])
            raise AgreedError(
                f"NCCL cannot connect the GPUs: {failures[rank]} ({self._named([rank])}); NCCL_DEBUG=INFO in the "
                "environment shows more, and `backend=gloo` does without NCCL"
            )
        return group

    def _sum_of_ones(self, device: torch.device, group: dist.ProcessGroup) -> None:
        one = torch.ones(1, device=device)
        dist.all_reduce(one, group=group)
        assert one.item() == self.size  # waits for the device

    def gather_text(self, text: str) -> list[str]:
        """See `Transport.all_gather_text`."""
        return gather_texts(text, self._gather)

    def _gather(self, content: bytes, size: int) -> list[bytes]:
        """The contents of all processes, cut or padded to `size` bytes."""
        packet = torch.frombuffer(bytearray(content.ljust(size, b"\0")[:size]), dtype=torch.uint8)
        packets = [torch.empty_like(packet) for _ in range(self.size)]
        self.run("comparing", lambda: dist.all_gather(packets, packet, group=self._control))
        return [gathered.numpy().tobytes() for gathered in packets]

    def run(self, doing: str, action: Any) -> Any:
        """Run an action that may wait for other processes.

        Args:
            doing: Description of the action, for the error message.
            action: Function without arguments.

        Returns:
            The result of `action`.

        Raises:
            UserError: If the groups are closed.
            WorkerLostError: If contact with another process is lost, or one does not come in time.
            RuntimeError: If the device of this process has failed.
        """
        if self._closed:
            raise UserError("this job is closed, and its connections with it; call job.close() after the last use")
        if self._aborted:
            raise WorkerLostError(self._loss)
        if self._nccl is not None and self._nccl.aborted:
            raise WorkerLostError(self._loss) if self._loss else self._lost(GRADIENTS, StuckError(self._nccl.failure))
        self._report_state(WAITING)
        try:
            return action()
        except RuntimeError as error:
            if is_of_device(error):
                raise
            raise self._lost(doing, error) from error
        finally:
            self._report_state(COMPUTING)

    def begin(self, doing: str, action: Callable[[], Any]) -> Any:
        """Begin an operation on weights, or a list of them; see `run`."""
        nccl = self._nccl
        return self.run(doing, action if nccl is None else lambda: nccl.begin(action))

    def limited(self, doing: str, action: Callable[[], Any]) -> Any:
        """Run an action in which NCCL waits on the host; see `run`."""
        nccl = self._nccl
        return self.run(doing, action if nccl is None else lambda: nccl.limited(action))

    def begin_gradients(self, action: Callable[[], Any]) -> Any:
        """Begin an operation that only a stream waits for; see `run`."""
        work = self.run(GRADIENTS, action)
        if self._nccl is not None:
            self._nccl.watch(work)
        return work

    def wait(self, doing: str, work: Any) -> None:
        """Wait on the host until an operation on weights is complete; see `run`."""
        nccl, limit = self._nccl, timedelta(seconds=self._timeout_s)
        if nccl is not None:
            self.run(doing, lambda: nccl.wait(work))
        elif self._watch is None:
            self.run(doing, work.wait)
        else:  # the limit of a message between two processes is the one with which they were connected
            self.run(doing, lambda: work.wait(limit))

    def abort(self, why: str) -> None:
        """End all that is under way, here and in the other processes, and everything that follows.

        Any thread may call it. The groups still have to be closed.

        Args:
            why: The message of the errors that follow.
        """
        with self._aborting:
            if self._aborted:
                return
            self._aborted, self._loss = True, self._loss or why
        if self._nccl is not None:
            self._nccl.abort()
        for group in list(self._groups):
            close_connections(group)

    def close(self) -> None:
        """Destroy the groups.

        The default group stays if the caller made it, or as long as another transport uses it.
        """
        if self._closed:
            return
        self._closed = True
        if self._liveness is not None and sys.exc_info()[0] is None:
            self._liveness.leave()
        elif self._liveness is not None:  # a process that ends with an error is lost to the others
            self._liveness.close()
        if self._nccl is not None:
            self._nccl.close()
        for group in reversed(self._groups):
            with contextlib.suppress(ValueError, AssertionError):  # the caller has destroyed all groups
                dist.destroy_process_group(group)
        if self._default_group is not None and not (self._nccl and self._nccl.hangs):
            self._default_group.leave()

    def _report_state(self, state: str) -> None:
        if self._liveness is not None:
            self._liveness.report_state(state)

    def _lost(self, doing: str, error: Exception) -> WorkerLostError:
        if self._nccl is not None:
            self._nccl.abort()  # before anything is copied from the GPU, such as replicas
        if self._watch is not None:
            self.abort("")  # so that the others notice, and nothing waits for what is under way
        cause = "not all processes have come" if self._liveness is None else self._liveness.cause(self._named)
        self._loss = f"{self._named([self.rank])} lost contact while {doing}: {reason(error)}; {cause}"
        return WorkerLostError(self._loss)
