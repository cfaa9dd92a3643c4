"""The mean of the shared part over all workers: of all weights where every worker holds every block."""

from collections.abc import Mapping, Sequence, Set

import torch
from torch import Tensor

from resist.planning.wire import FP32
from resist.sync.averaging import WEIGHTS
from resist.sync.codecs import CODECS
from resist.sync.compressed_mean import CompressedMean, Feedback
from resist.sync.payload import Payload
from resist.sync.round_end import RoundEnd
from resist.sync.streaming import FragmentMean
from resist.sync.transport import Handle, Transport
from resist.sync.worker import Worker

Ranges = Sequence[tuple[int, int]]


class SharedMean:
    """The mean of one payload over all workers, in progress.

    Frozen weights and buffers that nobody has changed are left out. What remains is one collective; with a wire format
    that compresses what trains, the rest has one of its own. In a round with fragments, what trains of the weights has
    one for each fragment that was not averaged before.

    Args:
        transport: Connects the workers.
        payload: The payload.
        workers: The hosted workers by number. They agree on `Subnet.changing`.
        end: The end of the round.
        dropped: Workers that are left out of the mean.

    Raises:
        WorkerLostError: If another process is lost; also by `advance` and `finish`.
    """

    @torch.no_grad()
    def __init__(
        self, transport: Transport, payload: Payload, workers: Mapping[int, Worker], end: RoundEnd, dropped: Set[int]
    ) -> None:
        weights = payload.name == WEIGHTS
        streamed = end.streamed if weights and payload.dtype == torch.float32 else None
        compressed = payload.shared_format != FP32 and streamed is None
        apart = compressed or streamed is not None
        plain, encoded = _Joined(), _Joined()
        for worker, flat in payload.flats.items():
            subnet = workers[worker].subnet
            layout = subnet.layouts[payload.dtype]
            plain.add(worker, flat, layout.ranges(subnet.changing, blocks=end.held_by_all, trained=not apart))
            encoded.add(worker, flat, layout.ranges(blocks=end.held_by_all) if compressed else ())
            if worker in dropped and worker in plain.tensors:
                plain.tensors[worker].zero_()
        self._joined = [joined for joined in (plain, encoded) if joined.tensors]
        self._plain: Handle | None = None
        self._encoded: CompressedMean | None = None
        kind = payload.traffic_kind("shared")
        if plain.tensors:
            # Dropped workers contribute zeros to a sum that is divided by the number of all workers.
            scale = transport.num_workers / (transport.num_workers - len(dropped))
            self._plain = transport.mean(list(plain.tensors.values()), kind, scale)
        if encoded.tensors:
            device = next(iter(encoded.tensors.values())).device
            name = f"shared {payload.name}"
            self._encoded = CompressedMean(
                transport,
                CODECS[payload.shared_format],
                encoded.tensors,
                kind,
                dropped=dropped,
                draws=lambda who: end.draws(device, name, str(payload.dtype), who),
                feedback={worker: _feedback(workers[worker]) for worker in encoded.tensors} if weights else None,
            )
        self._fragments = [
            FragmentMean(transport, list(workers.values()), number, end, dropped=dropped)
            for number in range(len(next(iter(workers.values())).fragments) if streamed is not None else 0)
            if number not in (streamed or ())
        ]

    def advance(self) -> None:
        """Begin the second half of a compressed mean. Waits for all processes, if it is one."""
        if self._encoded is not None:
            self._encoded.advance()
        for fragment in self._fragments:
            fragment.advance()

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until all hosted workers have the mean."""
        if self._plain is not None:
            self._plain.finish()
        if self._encoded is not None:
            self._encoded.finish()
        for fragment in self._fragments:
            fragment.finish()
        for joined in self._joined:
            joined.put_back()


class _Joined:
    """Ranges of flat tensors, one tensor for each worker: a view of a single range, or a copy of several."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self._parts: dict[int, list[Tensor]] = {}

    def add(self, worker: int, flat: Tensor, ranges: Ranges) -> None:
        parts = self._parts[worker] = [flat[start:end] for start, end in ranges]
        if parts:
            self.tensors[worker] = parts[0] if len(parts) == 1 else torch.cat(parts)

    def put_back(self) -> None:
        """Copy the numbers of several ranges back into them."""
        for worker, tensor in self.tensors.items():
            parts = self._parts[worker]
            for part, mean in zip(parts, torch.split(tensor, [part.numel() for part in parts]), strict=True):
                if len(parts) > 1:
                    part.copy_(mean)


def _feedback(worker: Worker) -> Feedback:
    (everything,) = worker.fragments  # `Worker.begin_round` makes it where changes are sent
    return everything.feedback
