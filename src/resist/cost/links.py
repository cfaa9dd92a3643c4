"""Links of the workers: one for all, or what `resist.cost.probe` has measured of each, and its file."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resist.cost.traffic import Way
from resist.errors import UserError, first_line
from resist.runs.atomic import read_small
from resist.runs.bounds import LARGEST

# Share of payload of TCP over IPv4 with timestamps in a full-sized Ethernet frame with preamble and gap (1538 bytes).
PAYLOAD = 1448 / 1538
# What a file of measured links says of itself.
FORMAT = "resist probe 1"
REMEDY = "give a file that resist probe has written"
# Smallest rate in Gbit/s, one bit per second: with much smaller ones seconds are not finite.
LEAST_GBIT_S = 1e-9


@dataclass(frozen=True)
class Link:
    """Connection of a worker.

    Attributes:
        gbit_s: Line rate in Gbit/s from the worker to the network, at least 1e-9.
        latency_ms: One-way latency in ms, at least 0.
        in_gbit_s: Line rate in the other direction. Default: the same.

    Raises:
        UserError: A value is out of bounds.
    """

    gbit_s: float
    latency_ms: float = 0.0
    in_gbit_s: float | None = None

    def __post_init__(self) -> None:
        for rate in (self.gbit_s, self.gbit_s if self.in_gbit_s is None else self.in_gbit_s):
            if not (math.isfinite(rate) and rate >= LEAST_GBIT_S):
                raise UserError(f"`link_gbit_s={rate:g}`; must be at least {LEAST_GBIT_S:g} Gbit/s and finite")
        if not (math.isfinite(self.latency_ms) and self.latency_ms >= 0):
            raise UserError(f"`latency_ms={self.latency_ms:g}`; must be at least 0 ms and finite")

    def bytes_s(self, way: str = "out") -> float:
        """Return the payload in bytes per second.

        Args:
            way: "out", from the worker to the network, or "in".
        """
        rate = self.in_gbit_s if way == "in" and self.in_gbit_s is not None else self.gbit_s
        return rate * 1e9 / 8 * PAYLOAD


@dataclass(frozen=True)
class Links:
    """Connections of all workers.

    Attributes:
        each: That of each worker, or one for all.
        to_all: Share of the slowest one's rate that remains while every worker sends to every other; above 0, at most
            1.
    """

    each: tuple[Link, ...]
    to_all: float = 1.0

    def seconds(self, phase: Mapping[Way, int]) -> float:
        """Return the seconds until the last link has carried its bytes.

        Args:
            phase: Bytes by direction of a link.
        """
        own = ((self.each[worker % len(self.each)].bytes_s(way), n) for (way, worker), n in phase.items())
        return max((num_bytes / rate for rate, num_bytes in own), default=0.0)

    @property
    def slowest_bytes_s(self) -> float:
        """Payload of the slowest direction of a link, in bytes per second."""
        return min(link.bytes_s(way) for link in self.each for way in ("out", "in"))

    @property
    def latency_s(self) -> float:
        """The longest one-way latency, in seconds."""
        return max(link.latency_ms for link in self.each) / 1e3

    def to_json(self) -> dict[str, Any]:
        """Return the attributes by name."""
        return {"each": [asdict(link) for link in self.each], "to_all": self.to_all}


@dataclass(frozen=True)
class Measured:
    """What was measured between processes; all rates are of payload.

    Attributes:
        backend: How messages went: "gloo" or "nccl".
        device: Kind of the device they came from: "cpu" or "cuda".
        hosts: Name of the machine of each process.
        gbit_s: (source, target) -> rate of one message at a time.
        latency_ms: (first, second), first < second -> one-way latency: half of a round trip.
        ring_gbit_s: Rate of each process while every process sends to the next one.
        to_all_gbit_s: The same while every process sends to every other one.
    """

    backend: str
    device: str
    hosts: tuple[str, ...]
    gbit_s: Mapping[tuple[int, int], float]
    latency_ms: Mapping[tuple[int, int], float]
    ring_gbit_s: tuple[float, ...]
    to_all_gbit_s: tuple[float, ...]

    @property
    def processes(self) -> range:
        """Numbers of the processes."""
        return range(len(self.hosts))

    def best_gbit_s(self, way: str, process: int) -> float:
        """Return the rate of a process's link in one direction: that with the peer with which it is fastest.

        Args:
            way: "out" or "in".
            process: Number of the process.
        """
        end = 0 if way == "out" else 1
        return max(rate for pair, rate in self.gbit_s.items() if pair[end] == process)

    def latency_of(self, process: int) -> float:
        """Return the one-way latency in ms between a process and its farthest peer."""
        return max(latency for pair, latency in self.latency_ms.items() if process in pair)

    def remaining(self, gbit_s: Sequence[float]) -> float:
        """Return the share of the slowest link's rate that remains while all send, at most 1.

        Args:
            gbit_s: The rate of each process meanwhile.
        """
        slowest = min(self.best_gbit_s(way, process) for way in ("out", "in") for process in self.processes)
        return min(1.0, min(gbit_s) / slowest)

    def links(self) -> list[Link]:
        """Return the link of each process: its rate with its fastest peer, times what remains in a ring."""
        share = self.remaining(self.ring_gbit_s)
        return [
            Link(
                self.best_gbit_s("out", process) * share / PAYLOAD,
                self.latency_of(process),
                self.best_gbit_s("in", process) * share / PAYLOAD,
            )
            for process in self.processes
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the content of a file for `read_links`; rates are of payload."""
        return {
            "format": FORMAT,
            "backend": self.backend,
            "device": self.device,
            "links": [
                {
                    "host": host,
                    "out_gbit_s": link.bytes_s("out") * 8 / 1e9,
                    "in_gbit_s": link.bytes_s("in") * 8 / 1e9,
                    "latency_ms": link.latency_ms,
                }
                for host, link in zip(self.hosts, self.links(), strict=True)
            ],
            "to_all_share": min(1.0, self.remaining(self.to_all_gbit_s) / self.remaining(self.ring_gbit_s)),
            "ring_gbit_s": list(self.ring_gbit_s),
            "to_all_gbit_s": list(self.to_all_gbit_s),
            "pairs_gbit_s": [[*pair, rate] for pair, rate in sorted(self.gbit_s.items())],
            "pairs_latency_ms": [[*pair, latency] for pair, latency in sorted(self.latency_ms.items())],
        }


def read_links(file: Path) -> Links:
    """Read the links of all processes from the file of `Measured.to_json`.

    Raises:
        UserError: It cannot be read, is of another kind, or has a value that is no rate or latency.
    """
    try:
        content = json.loads(read_small(file))
    except OSError as error:
        raise UserError(f"`link_file={file}`: {error.strerror}; {REMEDY}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"`link_file={file}` is damaged: {first_line(error)}; {REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"`link_file={file}` is not a file of measured links ({FORMAT}); {REMEDY}")
    entries = content.get("links")
    if not isinstance(entries, list) or not 2 <= len(entries) <= LARGEST["workers"]:
        raise UserError(f"`link_file={file}`: its links are not a list, one for each of 2 or more workers; {REMEDY}")
    each: list[Link] = []
    for number, entry in enumerate(entries):
        out, latency_ms, back = (
            _value(file, entry, name, number) for name in ("out_gbit_s", "latency_ms", "in_gbit_s")
        )
        each.append(Link(out / PAYLOAD, latency_ms, back / PAYLOAD))
    return Links(tuple(each), _value(file, content, "to_all_share", most=1.0))


def _value(file: Path, entry: Any, name: str, worker: int | None = None, most: float = 1e9) -> float:
    value: Any = entry.get(name) if isinstance(entry, dict) else None
    least = 0.0 if name == "latency_ms" else LEAST_GBIT_S
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most:
        return float(value)
    where = name if worker is None else f"{name} of worker {worker}"
    bounds = f"must be from {least:g} to {most:g}"
    raise UserError(f"`link_file={file}`: {where} is {json.dumps(value)[:40]}; {bounds}; {REMEDY}")
