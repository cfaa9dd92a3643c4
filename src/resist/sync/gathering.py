"""Gathering of tensors: what each process has computed of a test that all of them share."""

import json
from collections.abc import Callable

import torch
from torch import Tensor

from resist.errors import AgreedError, UserError
from resist.sync.transport import Move, Transport


class TogetherIn:
    """The processes of a job, as `resist.subnet.statistics.Processes`.

    Args:
        transport: Connects them.
        device: The device of this process, whose memory messages are sent from.

    Attributes:
        index: Number of this process.
        count: Number of processes.
    """

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self._transport, self._device = transport, device
        self.index, self.count = transport.process_of(transport.hosted[0]), transport.num_processes

    @property
    def first_workers(self) -> list[int]:
        """The first worker of each process."""
        process_of = self._transport.process_of
        return [w for w in range(self._transport.num_workers) if w == 0 or process_of(w) != process_of(w - 1)]

    def gather(self, action: Callable[[], Tensor]) -> list[Tensor]:
        """Return what an action makes in each process.

        Waits for all processes, and all fail if one does, so that none goes on to wait for it.

        Args:
            action: Makes the tensor of this process. Dtype and number of dimensions are the same in all processes.

        Returns:
            The tensor of each process, in the order of the processes.

        Raises:
            AgreedError: In every process, if the action has raised UserError in one of them.
            WorkerLostError: If another process is lost.
        """
        own, failure = torch.empty(0, device="cpu"), ""
        try:
            own = action().to(self._device).contiguous()
        except UserError as error:
            failure = str(error)
        texts = self._transport.all_gather_text(json.dumps({"shape": own.shape, "failure": failure}))
        processes = [json.loads(text) for text in texts]
        for process in processes:
            if process["failure"]:
                raise AgreedError(process["failure"])
        tensors = [own if p == self.index else own.new_empty(a["shape"]) for p, a in enumerate(processes)]
        moves: list[Move] = []
        for source, worker in enumerate(self.first_workers):
            for target, other in enumerate(self.first_workers):
                if source != target and tensors[source].nbytes:
                    outgoing = own if source == self.index else None
                    incoming = tensors[source] if target == self.index else None
                    moves.append(Move("evaluate", worker, other, tensors[source].nbytes, outgoing, incoming))
        self._transport.transfer(moves).finish()
        return tensors
