"""The ledger: what was carried, by kind and by pair of workers, counted where it is handed to the transport.

Bytes are booked as if every worker were a machine of its own, so they do not depend on how many processes host them;
`wire_bytes` are those that really left a process. Both sides of a booking are known everywhere (the schedule is), so
every process keeps the whole ledger and none has to ask another.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from resist.planning.schedule import allreduce_bytes
from resist.sync.transport import PACKET_BYTES, Handle, Move, Transport


class CountingTransport:
    """A transport that books what goes through another.

    bytes, messages: by kind, since the last `take`. The kinds: "shared", the shared part of the weights (all of them
                     where every worker holds every block, as in local SGD); "blocks", folded and handed over; "state",
                     the optimizer's, of both parts; "evaluate", to assemble the full network; "control", texts;
                     "gradients", those that ddp averages.
    pairs:           bytes by (source, target) of point-to-point messages, "evaluate" left out.
    wire_bytes:      bytes by kind that crossed from one process to another.
    wait_s:          seconds that this process waited, by kind; a batch of blocks and their state counts as "blocks".
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.num_workers, self.hosted = transport.num_workers, transport.hosted
        self.num_processes = transport.num_processes
        self._clear()

    def _clear(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()
        self.wire_bytes: Counter[str] = Counter()
        self.pairs: Counter[tuple[int, int]] = Counter()
        self.wait_s: defaultdict[str, float] = defaultdict(float)

    def take(self) -> dict[str, object]:
        """The bookings since the last call, ready for JSON."""
        taken = {
            "bytes": dict(self.bytes),
            "messages": dict(self.messages),
            "wire_bytes": dict(self.wire_bytes),
            "pairs": [[source, target, n] for (source, target), n in sorted(self.pairs.items())],
            "wait_s": {kind: round(seconds, 6) for kind, seconds in self.wait_s.items()},
        }
        self._clear()
        return taken

    def process_of(self, worker: int) -> int:
        return self._transport.process_of(worker)

    def transfer(self, moves: Sequence[Move]) -> Handle:
        for move in moves:
            self.bytes[move.kind] += move.num_bytes
            self.messages[move.kind] += 1
            if move.kind != "evaluate":
                self.pairs[move.source, move.target] += move.num_bytes
            if self.process_of(move.source) != self.process_of(move.target):
                self.wire_bytes[move.kind] += move.num_bytes
        return self._timed(moves[0].kind if moves else "blocks", lambda: self._transport.transfer(moves))

    def mean(self, tensors: Sequence[Tensor], kind: str) -> Handle:
        num_bytes = tensors[0].numel() * tensors[0].element_size()
        self.bytes[kind] += self.num_workers * allreduce_bytes(num_bytes, self.num_workers)
        self.messages[kind] += 1
        self.wire_bytes[kind] += self.num_processes * allreduce_bytes(num_bytes, self.num_processes)
        return self._timed(kind, lambda: self._transport.mean(tensors, kind))

    def average_gradients(self, model: nn.Module, count: Callable[[int], None] = lambda num_bytes: None) -> nn.Module:
        """The gradients' own traffic is booked as ring all-reduces; the few buffers that go along are not."""

        def book(num_bytes: int) -> None:
            count(num_bytes)
            self.bytes["gradients"] += self.num_workers * allreduce_bytes(num_bytes, self.num_workers)
            self.wire_bytes["gradients"] += self.num_processes * allreduce_bytes(num_bytes, self.num_processes)
            self.messages["gradients"] += 1

        return self._transport.average_gradients(model, book)

    def all_gather_text(self, text: str) -> list[str]:
        """Booked as all-gathers between processes (texts are theirs, not the workers'): a packet of fixed size, and the
        longest text where that does not fit."""
        if self.num_processes == 1:
            return [text]
        start = time.perf_counter()
        texts = self._transport.all_gather_text(text)
        self.wait_s["control"] += time.perf_counter() - start
        longest = max(len(one.encode()) for one in texts)
        sent = PACKET_BYTES + (longest if longest > PACKET_BYTES - 8 else 0)
        num_bytes = self.num_processes * (self.num_processes - 1) * sent
        self.bytes["control"] += num_bytes
        self.messages["control"] += 1
        self.wire_bytes["control"] += num_bytes
        return texts

    def close(self) -> None:
        self._transport.close()

    def _timed(self, kind: str, begin: Callable[[], Handle]) -> Handle:
        start = time.perf_counter()
        handle = begin()
        self.wait_s[kind] += time.perf_counter() - start
        return _Timed(self, kind, handle)


class _Timed:
    def __init__(self, ledger: CountingTransport, kind: str, handle: Handle) -> None:
        self._ledger, self._kind, self._handle = ledger, kind, handle

    def finish(self) -> list[Tensor | None]:
        start = time.perf_counter()
        arrived = self._handle.finish()
        self._ledger.wait_s[self._kind] += time.perf_counter() - start
        return arrived
