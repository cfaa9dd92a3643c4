"""Traffic accounts: bytes by traffic kind and by pair of workers, counted where they are passed to the transport.

Bytes are booked as if every worker had a machine of its own, so they do not depend on the number of processes;
`wire_bytes` are those that leave a process. Every process knows the whole schedule, so every process keeps the accounts
of all of them, and no message is needed to add them up.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from resist.planning.schedule import allreduce_bytes
from resist.sync.averaging import is_short
from resist.sync.transport import PACKET_BYTES, Handle, Move, Transport


class CountingTransport:
    """A transport that counts the traffic of another transport.

    The traffic kinds are "shared", the shared part of the weights (all weights, if every worker holds every block, as
    in local SGD); "blocks", blocks to average and to hand over; "state", payloads other than the weights, of both
    parts; "replica", replicas of blocks; "evaluate", to assemble the full network; "gradients", those that ddp
    averages; "control", texts.

    Args:
        transport: The transport that carries tensors and texts.

    Attributes:
        bytes: Bytes by traffic kind, since the last `take`.
        messages: Messages and collectives by traffic kind.
        wire_bytes: Bytes by traffic kind that left a process.
        pairs: Bytes by (source, target) of the moves between workers, without "evaluate".
        wait_s: Seconds that this process waited, by traffic kind. A batch of moves counts as the kind of its first
            move: blocks and their state as "blocks".
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

    def follow(self, other: "CountingTransport", former: Mapping[int, int]) -> None:
        """Add the accounts of the transport before this one.

        Args:
            other: The other transport.
            former: Worker of this transport -> its number there. Pairs with others are left out.
        """
        self.bytes += other.bytes
        self.messages += other.messages
        self.wire_bytes += other.wire_bytes
        for kind, seconds in other.wait_s.items():
            self.wait_s[kind] += seconds
        now = {old: new for new, old in former.items()}
        self.pairs += Counter({(now[s], now[t]): n for (s, t), n in other.pairs.items() if s in now and t in now})

    def take(self) -> dict[str, object]:
        """Return the accounts since the last call, and begin new ones.

        Returns:
            The attributes of this class by name, as values for JSON.
        """
        taken: dict[str, object] = {
            "bytes": dict(self.bytes),
            "messages": dict(self.messages),
            "wire_bytes": dict(self.wire_bytes),
            "pairs": [[source, target, n] for (source, target), n in sorted(self.pairs.items())],
            "wait_s": {name: round(seconds, 6) for name, seconds in self.wait_s.items()},
        }
        self._clear()
        return taken

    def process_of(self, worker: int) -> int:
        """See `Transport.process_of`."""
        return self._transport.process_of(worker)

    def transfer(self, moves: Sequence[Move]) -> Handle:
        """See `Transport.transfer`."""
        for move in moves:
            self.bytes[move.traffic_kind] += move.num_bytes
            self.messages[move.traffic_kind] += 1
            if move.traffic_kind != "evaluate":
                self.pairs[move.source, move.target] += move.num_bytes
            if self.process_of(move.source) != self.process_of(move.target):
                self.wire_bytes[move.traffic_kind] += move.num_bytes
        return self._timed(moves[0].traffic_kind if moves else "blocks", lambda: self._transport.transfer(moves))

    def mean(self, tensors: Sequence[Tensor], traffic_kind: str, scale: float = 1.0) -> Handle:
        """See `Transport.mean`."""
        num_bytes = tensors[0].numel() * tensors[0].element_size()
        self.bytes[traffic_kind] += self.num_workers * allreduce_bytes(num_bytes, self.num_workers)
        self.messages[traffic_kind] += 1
        self.wire_bytes[traffic_kind] += self.num_processes * allreduce_bytes(num_bytes, self.num_processes)
        if is_short(tensors[0].dtype) and 1 < self.num_processes < self.num_workers:
            # The first half goes in float32, where a process sends the sum of its workers.
            more = 4 * tensors[0].numel() - num_bytes
            self.wire_bytes[traffic_kind] += (self.num_processes - 1) * more
        return self._timed(traffic_kind, lambda: self._transport.mean(tensors, traffic_kind, scale))

    def scatter(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """See `Transport.scatter`."""
        processes = [self.process_of(worker) for worker in range(self.num_workers)]
        self.bytes[traffic_kind] += (self.num_workers - 1) * sum(sizes)
        self.messages[traffic_kind] += 1
        apart = [sum(process != home for process in processes) for home in processes]  # workers elsewhere, of each
        self.wire_bytes[traffic_kind] += sum(size * others for size, others in zip(sizes, apart, strict=True))
        return self._timed(traffic_kind, lambda: self._transport.scatter(sent, sizes, traffic_kind))

    def gather(self, sent: Sequence[Tensor], sizes: Sequence[int], traffic_kind: str) -> Handle:
        """See `Transport.gather`."""
        self.bytes[traffic_kind] += (self.num_workers - 1) * sum(sizes)
        self.messages[traffic_kind] += 1
        self.wire_bytes[traffic_kind] += (self.num_processes - 1) * sum(sizes)
        return self._timed(traffic_kind, lambda: self._transport.gather(sent, sizes, traffic_kind))

    def average_gradients(self, model: nn.Module, count: Callable[[int], None] = lambda num_bytes: None) -> nn.Module:
        """See `Transport.average_gradients`.

        Gradients are booked as ring all-reduces. The few buffers that ddp sends are not booked.
        """

        def book(num_bytes: int) -> None:
            count(num_bytes)
            self.bytes["gradients"] += self.num_workers * allreduce_bytes(num_bytes, self.num_workers)
            self.wire_bytes["gradients"] += self.num_processes * allreduce_bytes(num_bytes, self.num_processes)
            self.messages["gradients"] += 1

        return self._transport.average_gradients(model, book)

    def all_gather_text(self, text: str) -> list[str]:
        """See `Transport.all_gather_text`.

        Texts are booked as an all-gather between processes, not between workers. Each process sends a packet of fixed
        size, and then its text, padded to the longest, if one does not fit.
        """
        if self.num_processes == 1:
            return [text]
        start = time.perf_counter()
        texts = self._transport.all_gather_text(text)
        self.wait_s["control"] += time.perf_counter() - start
        longest = max(len(gathered.encode("utf-8", "surrogateescape")) for gathered in texts)
        sent = PACKET_BYTES + (longest if longest > PACKET_BYTES - 8 else 0)
        num_bytes = self.num_processes * (self.num_processes - 1) * sent
        self.bytes["control"] += num_bytes
        self.messages["control"] += 1
        self.wire_bytes["control"] += num_bytes
        return texts

    def close(self) -> None:
        """See `Transport.close`."""
        self._transport.close()

    def _timed(self, traffic_kind: str, begin: Callable[[], Handle]) -> Handle:
        start = time.perf_counter()
        handle = begin()
        self.wait_s[traffic_kind] += time.perf_counter() - start
        return _Timed(self, traffic_kind, handle)


class _Timed:
    def __init__(self, counting: CountingTransport, traffic_kind: str, handle: Handle) -> None:
        self._counting, self._traffic_kind, self._handle = counting, traffic_kind, handle

    def finish(self) -> list[Tensor | None]:
        start = time.perf_counter()
        received = self._handle.finish()
        self._counting.wait_s[self._traffic_kind] += time.perf_counter() - start
        return received
