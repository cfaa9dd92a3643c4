"""Network interfaces: the one that gloo and NCCL listen at, and who can reach it."""

import contextlib
import os
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import resist
from resist.errors import AgreedError, first_line
from resist.sync.meeting import can_listen, transport_failure
from resist.sync.nccl import handling_failure

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
TRANSPORT, TLS = "GLOO_DEVICE_TRANSPORT", "TCP_TLS"
# Captured on a link between two hosts: torch 2.11.0 reads key and certificates, and sends as without them; docs/LOG.md.
READABLE = "torch 2.11.0 does not encrypt with it, and torch 2.14.1 does not have it"
SHOWN = 12  # names in a message
REMEDY = "the interface that all machines share, or unset it"


def introduction(device: torch.device, failure: str) -> dict[str, Any]:
    """Collect what other processes have to know of this one before they connect.

    Args:
        device: The device of its workers.
        failure: Why it cannot take part, or "".

    Returns:
        JSON data: name and identity of the machine, versions, why it cannot take part, and why machines other than its
        own cannot reach it ("" where they may).
    """
    return {
        "hostname": socket.gethostname(),
        "host": [machine_id(), _inode("/proc/self/ns/net")],
        "versions": [f"resist {resist.__version__}", f"torch {torch.__version__}"],
        "failure": failure or interface_failure(device),
        "unreachable": _loopback_only(),
    }


def judge(introductions: Sequence[Mapping[str, Any]], named: Callable[[Sequence[int]], str]) -> str:
    """Find out why these processes cannot form a job.

    Args:
        introductions: The introductions of all processes, by number.
        named: Names processes by their numbers.

    Returns:
        The first reason, or "".
    """
    first = introductions[0]
    for rank, one in enumerate(introductions):
        if one.get("versions") != first["versions"]:
            here, there = ", ".join(one.get("versions", ["another version"])), ", ".join(first["versions"])
            return f"{named([rank])} runs {here}, {named([0])} {there}; install the same on all machines"
        if one["size"] != first["size"]:
            return (
                f"{named([rank])} was started with WORLD_SIZE={one['size']}, {named([0])} with "
                f"WORLD_SIZE={first['size']}; give all of them the same"
            )
    failures = {one["failure"] for one in introductions}
    if len(failures) == 1 and "" not in failures:  # the same everywhere: it is nobody's in particular
        return failures.pop()
    several = any(one["host"] != first["host"] for one in introductions)
    for rank, one in enumerate(introductions):
        if one["failure"]:
            return f"{one['failure']} ({named([rank])} on {one['hostname']})"
        if several and one["unreachable"]:
            return (
                f"{named([rank])} on {one['hostname']} would listen at its loopback interface, which other machines "
                f"cannot reach: {one['unreachable']}"
            )
    return ""


def interface_failure(device: torch.device) -> str:
    """Return why the variables of gloo and NCCL are of no use on this machine, or ""."""
    transport = os.environ.get(TRANSPORT, "")
    if transport == TLS:
        return f"{TRANSPORT}={TLS}: {READABLE}; unset it, and use a tunnel such as WireGuard"
    if transport and (why := transport_failure()):
        return f"{TRANSPORT}={transport}: gloo cannot use it here ({why}); unset it"
    value = os.environ.get(GLOO, "")
    # As torch reads it: several names for several connections, and nothing of one character.
    for name in value.split(",") if len(value) > 1 else ():
        if not can_listen(name):
            form = " (gloo takes whole names, without the ^ and = of NCCL)" * (name[:1] in ("^", "="))
            return f"{GLOO}={value}: no interface {name} with an address here{form}; {_choice(GLOO)}"
    value = os.environ.get(NCCL, "")
    if device.type == "cuda" and value and not matching(value, _names()):
        return f"{NCCL}={value}: no such interface here; {_choice(NCCL)}"
    return handling_failure() if device.type == "cuda" else ""


def matching(value: str, names: Sequence[str]) -> list[str]:
    """Return the interfaces that NCCL may use.

    Args:
        value: The value of NCCL_SOCKET_IFNAME: beginnings of names; after "=" whole names; after "^" those to
            leave out.
        names: The names of all interfaces.
    """
    without = value.startswith("^")
    exact = value.lstrip("^").startswith("=")
    given = [part.partition(":")[0] for part in value.lstrip("^=").split(",")]
    return [n for n in names if any(n == g if exact else n.startswith(g) for g in given) != without]


def unconnected(
    error: Exception, introductions: Sequence[Mapping[str, Any]], named: Callable[[Sequence[int]], str], where: str
) -> AgreedError:
    """Describe why processes that have met cannot connect.

    Args:
        error: What gloo raised.
        introductions: The introductions of all processes, by number.
        named: Names processes by their numbers.
        where: The address at which they have met.
    """
    machines: dict[str, list[int]] = {}
    for rank, one in enumerate(introductions):
        machines.setdefault(str(one["hostname"]), []).append(rank)
    value = os.environ.get(GLOO)
    chosen = f"{GLOO}={value}" if value else f"{GLOO} is not set"
    placed = "; ".join(f"{named(ranks)} on {machine}" for machine, ranks in list(machines.items())[:SHOWN])
    return AgreedError(
        f"the processes have met at {where}, but cannot connect to each other ({reason(error)}): {placed}. {chosen}; "
        f"{_choice(GLOO)}, and open its ports between the machines"
    )


def reason(error: Exception) -> str:
    """Return the message of gloo or NCCL without source position and advice."""
    text = str(error)
    _, marker, last = text.partition("Last error:")  # NCCL says the cause there, after a general first line
    if marker and last.strip():
        return last.strip().splitlines()[0].rstrip(".")
    line = first_line(error).rpartition("] ")[2] if "/gloo/" in first_line(error) else first_line(error)
    return line.partition(" This is typically")[0].rstrip(".")


def is_of_network(error: Exception) -> bool:
    """Return True for an error of gloo or NCCL.

    Args:
        error: What torch raised.
    """
    return "/gloo/" in first_line(error) or type(error).__name__ in ("DistBackendError", "DistNetworkError")


def machine_id() -> str:
    """Return what tells this machine from others, whatever they are called."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return platform.node()


def _choice(variable: str) -> str:
    usable = [name for name in _names() if can_listen(name)]
    more = f" and {len(usable) - SHOWN} more" if len(usable) > SHOWN else ""
    return f"there are {', '.join(usable[:SHOWN])}{more}; set {variable} to {REMEDY}"


def _names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _loopback_only() -> str:
    """Why gloo would listen at the loopback interface, or ""."""
    value, name = os.environ.get(GLOO, ""), socket.gethostname()
    if len(value) > 1:
        loopback = [one for one in value.split(",") if one == "lo" or one.startswith("lo0")]
        return f"{GLOO}={value}; {_choice(GLOO)}" if loopback else ""
    try:
        found = {str(address[4][0]) for address in socket.getaddrinfo(name, None)}
    except OSError:
        found = set[str]()
    if any(not address.startswith("127.") and address != "::1" for address in found):
        return ""
    return f"its name {name} leads to {', '.join(sorted(found)) or 'no address'}; {_choice(GLOO)}"


def _inode(path: str) -> int:
    try:
        return os.stat(path).st_ino
    except OSError:
        return 0
