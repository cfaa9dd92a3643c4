"""Measurement of the links between processes: latency and rate pair by pair, and the rates while all send.

One pair measures at a time, in an order that all processes know: each waits for its next turn in the receipt of a
message. Messages go through the transport, as those of a synchronization do: from the memory of the device, by NCCL
where it is used.

The first process of a pair leads. It announces each message by a number: its bytes, negative where the second process
is to send them. The time of a message of one byte, taken in the same way, is subtracted from those of large ones. Then
all send at the same time: to the next process, as in a ring all-reduce, and to all others, as in a compressed mean.
"""

import json
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import combinations, permutations

import torch
from torch import Tensor

from resist.cost.links import Measured
from resist.sync.transport import Move, Transport

ROUND_TRIPS = 20  # at most
MESSAGE_S = 0.3  # seconds that a message grows to, at most
ALL_S = 1.0  # the same of those that all send
FIRST_BYTES, MOST_BYTES = 1 << 16, 1 << 26
REPEATS = 3  # of messages of the least and of the largest size, and of those that all send
PING, DONE = 0, 1 << 40  # numbers that announce no message
PATTERN_BYTES = 1 << 20


def measure_links(transport: Transport, device: torch.device, seconds: float) -> Measured:
    """Measure the links between all processes. All of them have to call it, and wait for each other.

    Args:
        transport: Connects the processes, each of which hosts one worker.
        device: The device of the messages.
        seconds: Seconds that it should take at most; fewer for few processes. Very slow links need more.

    Returns:
        What was measured, the same in all processes.

    Raises:
        WorkerLostError: If another process is lost.
    """
    probe = _Probe(transport, device)
    backend = "gloo" if device.type == "cpu" or getattr(transport, "staged", False) else "nccl"
    pairs = list(combinations(range(transport.num_workers), 2))
    share_s = 0.8 * seconds / len(pairs)
    latency_ms: dict[tuple[int, int], float] = {}
    gbit_s: dict[tuple[int, int], float] = {}
    for first, second in pairs:
        if second == first + 1 and first > 0:  # the first pair of this leader: that of the one before is done
            probe.pass_on(first - 1, first)
        if probe.own == first:
            trip_s, out_s, in_s = probe.lead(second, share_s)
            latency_ms[first, second] = 1e3 * trip_s / 2
            gbit_s[first, second], gbit_s[second, first] = _gbit_s(1, out_s), _gbit_s(1, in_s)
        elif probe.own == second:
            probe.follow(first)
    about = {
        "host": socket.gethostname(),
        "latency": [[*pair, value] for pair, value in latency_ms.items()],
        "rate": [[*pair, value] for pair, value in gbit_s.items()],
    }
    everyone = [json.loads(text) for text in transport.all_gather_text(json.dumps(about))]
    rates = {(a, b): rate for one in everyone for a, b, rate in one["rate"]}
    slowest, most_s = min(rates.values()), min(ALL_S, 0.05 * seconds)
    processes = range(transport.num_workers)
    ring = [(process, (process + 1) % len(processes)) for process in processes]
    return Measured(
        backend=backend,
        device=device.type,
        hosts=tuple(one["host"] for one in everyone),
        gbit_s=rates,
        latency_ms={(a, b): latency for one in everyone for a, b, latency in one["latency"]},
        ring_gbit_s=probe.together_gbit_s(ring, slowest, most_s),
        to_all_gbit_s=probe.together_gbit_s(list(permutations(processes, 2)), slowest, most_s),
    )


def _gbit_s(num_bytes: int, seconds: float) -> float:
    return num_bytes * 8 / 1e9 / seconds


class _Probe:
    """Messages between this process and others, and their times.

    Attributes:
        own: The number of this process.
    """

    def __init__(self, transport: Transport, device: torch.device) -> None:
        self._transport, self._device = transport, device
        (self.own,) = transport.hosted
        pattern = torch.randint(256, (PATTERN_BYTES,), dtype=torch.uint8, device=device)  # nothing to compress
        # Many processes have less time for each message, and may share the memory of a machine.
        self._bytes = pattern.repeat(max(1, MOST_BYTES // PATTERN_BYTES * 8 // max(8, transport.num_workers)))

    def _send(self, peer: int, tensor: Tensor) -> None:
        self._transport.transfer([Move("evaluate", self.own, peer, tensor.nbytes, outgoing=tensor)]).finish()

    def _receive(self, peer: int, tensor: Tensor) -> None:
        self._transport.transfer([Move("evaluate", peer, self.own, tensor.nbytes, incoming=tensor)]).finish()

    def _announce(self, peer: int, number: int) -> None:
        self._send(peer, torch.tensor([number], device=self._device))

    def _listen(self, peer: int) -> int:
        number = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._receive(peer, number)
        return int(number.item())

    def pass_on(self, source: int, target: int) -> None:
        """Send a number from one process to another, which waits for it; nothing to do in others."""
        if self.own == source:
            self._announce(target, DONE)
        elif self.own == target:
            self._listen(source)

    def lead(self, peer: int, seconds: float) -> tuple[float, float, float]:
        """Measure the link with a peer, which follows.

        Args:
            peer: The other process.
            seconds: Seconds that it should take at most.

        Returns:
            Seconds of a round trip, of a byte to the peer, and of a byte from it.
        """
        self._timed(lambda: self._ping(peer))  # opens the connection
        trips = self._repeated(lambda: self._ping(peer), ROUND_TRIPS, 0.2 * seconds)
        most_s = min(MESSAGE_S, 0.1 * seconds)
        out_s, in_s = (self._byte_s(peer, sign, most_s) for sign in (1, -1))
        self._announce(peer, DONE)
        return statistics.median(trips), out_s, in_s

    def follow(self, peer: int) -> None:
        """Answer a peer that leads, until it is done."""
        while (number := self._listen(peer)) != DONE:
            if number < 0:
                self._send(peer, self._bytes[:-number])
                continue
            if number != PING:
                self._receive(peer, self._bytes[:number])
            self._announce(peer, PING)

    def _ping(self, peer: int) -> None:
        self._announce(peer, PING)
        self._listen(peer)

    def _message(self, peer: int, number: int) -> None:
        """Send bytes and wait for the answer, or let the peer send them, where the number is negative."""
        self._announce(peer, number)
        if number < 0:
            self._receive(peer, self._bytes[:-number])
        else:
            self._send(peer, self._bytes[:number])
            self._listen(peer)

    def _byte_s(self, peer: int, sign: int, most_s: float) -> float:
        """Seconds of a byte, from messages that grow until one takes `most_s` or has all bytes."""
        start_s = statistics.median(self._repeated(lambda: self._message(peer, sign), REPEATS, most_s))
        size, most, times = FIRST_BYTES, len(self._bytes), list[float]()
        while True:
            seconds = self._timed(lambda size=size: self._message(peer, sign * size))
            times.append(max(seconds - start_s, seconds / 10) / size)
            if seconds >= 0.8 * most_s:
                return times[-1]
            if size == most:
                rest = self._repeated(lambda: self._message(peer, sign * most), REPEATS - 1, most_s)
                return statistics.median([times[-1], *(max(t - start_s, t / 10) / most for t in rest)])
            size = min(most, int(size * min(8.0, max(2.0, 1.1 * most_s / seconds))))

    def together_gbit_s(
        self, pairs: Sequence[tuple[int, int]], slowest_gbit_s: float, most_s: float
    ) -> tuple[float, ...]:
        """Let all processes send at the same time, several times.

        Args:
            pairs: Source and target of each message. Every process sends, and receives, equally many.
            slowest_gbit_s: The slowest rate of a pair.
            most_s: Seconds that it should take if the links share nothing.

        Returns:
            The rate of each process: of all that it sends, and of all that it receives.
        """
        number = sum(source == self.own for source, _ in pairs)
        size = max(1024, int(min(slowest_gbit_s * 1e9 / 8 * most_s, len(self._bytes)) / number))
        start_s = statistics.median(self._together(pairs, 1) for _ in range(REPEATS))
        own = [self._together(pairs, size) for _ in range(REPEATS)]
        own = [max(seconds - start_s, seconds / 10) for seconds in own]
        repeats = zip(*(json.loads(text) for text in self._transport.all_gather_text(json.dumps(own))), strict=True)
        best = min(repeats, key=max)  # what else a machine does only adds to the time
        return tuple(_gbit_s(number * size, seconds) for seconds in best)

    def _together(self, pairs: Sequence[tuple[int, int]], size: int) -> float:
        """Seconds of one message of each pair, all at the same time."""
        room = iter(
            torch.empty(sum(target == self.own for _, target in pairs), size, dtype=torch.uint8, device=self._device)
        )
        moves = [
            Move(
                "evaluate",
                source,
                target,
                size,
                outgoing=self._bytes[:size] if source == self.own else None,
                incoming=next(room) if target == self.own else None,
            )
            for source, target in pairs
        ]
        self._transport.all_gather_text("")  # all begin at the same time
        return self._timed(lambda: self._transport.transfer(moves).finish())

    def _timed(self, action: Callable[[], object]) -> float:
        start = self._now()
        action()
        return self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _repeated(self, action: Callable[[], object], most: int, seconds: float) -> Sequence[float]:
        """The times of an action, once at least, and again while there is time."""
        times = [self._timed(action)]
        while len(times) < most and sum(times) < seconds:
            times.append(self._timed(action))
        return times
