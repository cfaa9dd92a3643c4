"""An emulated network on one Linux machine: network namespaces as hosts, connected by links of limited rate.

    with network(4, rate_bit_s=100_000_000) as hosts:
        subprocess.run(hosts[0].enter + ["hostname"])

    host 0 (198.18.0.1) -- link --+
    host 1 (198.18.0.2) -- link --+-- bridge, in a namespace of its own
    ...

A link carries `rate_bit_s` in each direction (tc tbf at both ends). Its queues are deep enough that no packet is
dropped, unlike those of a real switch, and a late acknowledgement on a busy machine is not taken for a loss: the
counters show payload, headers and acknowledgements, and next to nothing that was sent twice. The addresses are
reserved for benchmarks by RFC 2544, and the namespaces have no connection to other networks.

The names contain the id of the process that made them. Everything is removed when the `with` ends, in every case; the
remains of a killed process are removed by the next one.
"""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PREFIX = "resist-wire-"
INTERFACE = "eth0"
QUEUE_BYTES = 16 << 20
HEADERS = 14 + 20 + 32  # of Ethernet, IP, and TCP with timestamps
KERNEL = {
    "ipv6/conf/default/disable_ipv6": 1,  # its own packets would be counted
    "ipv4/tcp_early_retrans": 0,  # no probes for a loss, which send a segment again
    "ipv4/tcp_recovery": 0,  # no loss is inferred from time,
    "ipv4/tcp_reordering": 1 << 20,  # nor from packets that another processor has passed on first
    "ipv4/tcp_max_reordering": 1 << 20,
}
RETRANSMISSION = "10s"  # without an acknowledgement for so long a segment is sent again; by default 0.2 s


class CannotEmulateError(Exception):
    """This machine or this user cannot have network namespaces. The message is one line with the reason."""


@dataclass(frozen=True)
class Host:
    """A namespace. Put `enter` before a command to run the command inside."""

    namespace: str
    address: str

    @property
    def enter(self) -> list[str]:
        return ["ip", "netns", "exec", self.namespace]


@contextmanager
def network(num_hosts: int, rate_bit_s: float) -> Iterator[list[Host]]:
    """Make `num_hosts` connected hosts. SIGTERM raises SystemExit while they exist.

    Args:
        num_hosts: Number of hosts.
        rate_bit_s: Rate of each link in each direction, bits per second.

    Raises:
        CannotEmulateError: If there is no permission, or a program is missing.
    """
    if os.geteuid() != 0:
        raise CannotEmulateError("network namespaces need root; run it with sudo")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise CannotEmulateError(f"the program {tool} is missing; install iproute2 (apt-get install iproute2)")
    _remove_left_overs()
    run = f"{PREFIX}{os.getpid()}-"
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield _create(run, num_hosts, rate_bit_s)
    finally:
        previous = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
        _remove(run)
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        signal.signal(signal.SIGTERM, before)


def sent_bytes() -> int:
    """Return the bytes that this host's interface has sent, headers included."""
    return _counter("tx_bytes")


def sent_headers() -> int:
    """Return the bytes of `sent_bytes` that were headers, of TCP at least."""
    return HEADERS * _counter("tx_packets")


def _counter(name: str) -> int:
    return int(Path(f"/sys/class/net/{INTERFACE}/statistics/{name}").read_text())


def parse_rate(text: str) -> float:
    """Parse "100mbit" or "1gbit" as bits per second. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(f"rate {text!r} must be like 100mbit or 1gbit, above 0")
    return float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]]


def _create(run: str, num_hosts: int, rate_bit_s: float) -> list[Host]:
    hub = f"{run}hub"
    hosts = [Host(f"{run}{number}", f"198.18.0.{number + 1}") for number in range(num_hosts)]
    for namespace in (hub, *(host.namespace for host in hosts)):
        _ip("netns", "add", namespace)
        for path, value in KERNEL.items():
            setting = f"echo {value} > /proc/sys/net/{path}"
            subprocess.run(["ip", "netns", "exec", namespace, "sh", "-c", setting], capture_output=True)
        _ip("-n", namespace, "link", "set", "lo", "up")
    _ip("-n", hub, "link", "add", "switch", "type", "bridge")
    _ip("-n", hub, "link", "set", "switch", "up")
    for number, host in enumerate(hosts):
        port = f"port{number}"
        _ip("-n", hub, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", host.namespace)
        _ip("-n", hub, "link", "set", port, "master", "switch", "up")
        _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
        _ip("-n", host.namespace, "link", "set", INTERFACE, "up")
        route = ["198.18.0.0/24", "dev", INTERFACE, "src", host.address, "rto_min", RETRANSMISSION]
        _ip("-n", host.namespace, "route", "replace", *route)
        for namespace, device in ((hub, port), (host.namespace, INTERFACE)):
            _limit(namespace, device, rate_bit_s)
    return hosts


def _limit(namespace: str, device: str, rate_bit_s: float) -> None:
    """Limit the rate of a device.

    The bucket holds 2 ms at the rate, and at least two of the largest packets that TCP passes to an interface. With a
    smaller bucket these would be divided, and a header would be counted for every 1,500 bytes.
    """
    burst = max(128 << 10, int(rate_bit_s / 8 * 0.002))
    rate = f"{int(rate_bit_s)}bit"
    command = ["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", rate]
    _call([*command, "burst", str(burst), "limit", str(QUEUE_BYTES)])


def _remove_left_overs() -> None:
    for namespace in _namespaces():
        match = re.match(rf"{PREFIX}(\d+)-", namespace)
        if match and not _is_alive(int(match[1])):
            _remove(match[0])


def _remove(run: str) -> None:
    """Kill the processes in the namespaces of `run`, and delete the namespaces with their links."""
    for namespace in _namespaces():
        if namespace.startswith(run):
            inside = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout
            for pid in map(int, inside.split()):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _namespaces() -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line]


def _is_alive(pid: int) -> bool:
    """Return whether `pid` may own namespaces, and is not a later process with the same id."""
    try:
        return b"python" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _ip(*arguments: str) -> None:
    _call(["ip", *arguments])


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise CannotEmulateError(f"`{' '.join(command)}` failed: {reason[-1] if reason else 'no reason given'}")
