"""Meeting point: the address and the store at which the processes of a job find each other.

torchrun, or the user, gives each process its number and the address in environment variables. Nothing here waits longer
than it was given: torch's client of a store has no limit where something else has taken the port and does not answer,
or where the network drops its packets, so that such calls run in a thread that is left behind.
"""

import contextlib
import ipaddress
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from resist.errors import UserError, first_line

T = TypeVar("T")
# What torch logs of its connections, such as that an address has no name.
NOTES = re.compile(rb"\[[IWE]\d+ .*\] \[c10d\] ")
POLL_S = 0.2  # seconds between two attempts to connect
FOREIGN_S = 30.0  # seconds after which an address is given up that is not of the machine that serves the store


@dataclass(frozen=True)
class Place:
    """The number of this process and the address of the store.

    Attributes:
        rank: The number of this process.
        size: The number of processes.
        host: Name or address of the machine that serves the store.
        port: Its port.
        served: True if torchrun or a launcher serves the store; otherwise process 0 does.
    """

    rank: int
    size: int
    host: str
    port: int
    served: bool

    @classmethod
    def from_environment(cls) -> "Place":
        """Read the variables that torchrun sets.

        Raises:
            UserError: If one is missing, is not a number, or is out of its bounds.
        """
        host = os.environ.get("MASTER_ADDR", "").strip()
        missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing or not host:
            raise UserError(
                f"{', '.join(missing or ['MASTER_ADDR'])} not set in the environment, where a job of several processes "
                "needs RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; set it, or start the job with torchrun"
            )
        size = environment_number("WORLD_SIZE", least=1)
        rank = environment_number("RANK", most=size - 1, why="WORLD_SIZE - 1")
        port = environment_number("MASTER_PORT", least=1, most=65535)
        return cls(rank, size, host, port, os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True")

    @property
    def address(self) -> str:
        """Host and port, as they are written."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def environment_number(
    name: str, default: int | None = None, *, least: int = 0, most: int | None = None, why: str = ""
) -> int:
    """Return an environment variable that is a whole number.

    Args:
        name: Its name.
        default: The value where it is not set, or empty.
        least: The least value that is valid.
        most: The largest value that is valid.
        why: What `most` is, for the message.

    Raises:
        UserError: It is not a number, or not within the bounds.
    """
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    number = int(text) if text.isdecimal() and len(text) < 10 else -1
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"{least} to {most}{f', {why}' if why else ''}"
        raise UserError(f"{name}={text} in the environment; give a whole number, {bounds}")
    return number


def within(seconds: float, action: Callable[[], T], slices: int = 1) -> T:
    """Run an action that may never return.

    Args:
        seconds: Seconds to wait for it. After that its thread is left behind.
        action: Function to call.
        slices: Parts in which these seconds are waited. A pause of this process, or of its machine, uses up one of
            them at most.

    Returns:
        The result of `action`.

    Raises:
        TimeoutError: It has not returned in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:  # raised below, in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for _ in range(slices):
        if thread.is_alive():
            thread.join(max(0.0, seconds / slices))
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return results[0]


@contextlib.contextmanager
def captured_stderr() -> Generator[Callable[[], None]]:
    """Hold back what torch and gloo print on stderr while they connect: pages, where an error has one line.

    Yields:
        A function to call at a success: what was printed is then passed on.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, contextlib.ExitStack() as stack:
        passed: list[bool] = []
        try:
            before = os.dup(2)
        except OSError:  # there is no stderr
            yield lambda: None
            return
        stack.callback(os.close, before)
        os.dup2(held.fileno(), 2)
        try:
            yield lambda: passed.append(True)
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            if passed:
                held.seek(0)
                os.write(2, b"".join(line for line in held if not NOTES.match(line)))


def open_store(place: Place, timeout_s: float) -> Any:
    """Serve the store in process 0, and connect to it in the others. Waits for its server.

    Args:
        place: Number of this process, and the address.
        timeout_s: Seconds to wait.

    Returns:
        A store of torch.distributed.

    Raises:
        UserError: Nothing answers at the address in time, or something else has taken it.
    """
    end = time.monotonic() + timeout_s
    if place.rank == 0 and not place.served:
        return _serve_store(place, timeout_s)
    _await_listener(place, end, timeout_s)
    left = max(1.0, end - time.monotonic())
    try:
        return within(left, lambda: _client(place, left))
    except (RuntimeError, ValueError, TimeoutError) as error:  # errors of torch are RuntimeErrors
        raise UserError(
            f"process {place.rank}: what listens at {place.address} is no rendezvous of torch.distributed (no valid "
            f"answer within {timeout_s:.0f} s); another program has the port: give another MASTER_PORT, the same in "
            "all processes"
        ) from error


def _serve_store(place: Place, timeout_s: float) -> Any:
    """The store, served by this process, which reaches it at the address that the others use, too."""
    # An address that is not of this machine may lead here nevertheless, as that of a service of Kubernetes does.
    own = any(_is_local(address) for address in _resolve(place))
    seconds = timeout_s if own else min(timeout_s, FOREIGN_S)
    listener = _listen_at(place)
    try:
        return within(seconds, lambda: _client(place, seconds, is_master=True, listener=listener))
    except (RuntimeError, ValueError, TimeoutError) as error:
        if "EADDRINUSE" in str(error) or own:
            what = f"cannot listen at port {place.port}: it is in use"
            remedy = "give another MASTER_PORT, the same in all processes"
        else:
            what = f"MASTER_ADDR={place.host} does not lead to this machine ({socket.gethostname()})"
            remedy = "give the address of the machine that has RANK=0, the same in all processes"
        raise UserError(f"process 0, which serves the rendezvous: {what}; {remedy}") from error


def _listen_at(place: Place) -> socket.socket | None:
    """Listen at the address of the store and at no other one of this machine; None where it is not clear which that is.

    A name may lead the other machines to another address than this one: to its loopback interface here, as in the
    /etc/hosts of Debian, or to one of several. Then torch listens at every interface.
    """
    local = [address for address in _resolve(place) if _is_local(address)]
    here = [address[4][0] for address in local]
    loopback = all(ipaddress.ip_address(host.partition("%")[0]).is_loopback for host in here)
    if place.host in ("localhost", *here):
        local = [address for address in local if address[4][0] == place.host] or local
    elif len(local) != 1 or loopback:
        return None
    for family, _, _, _, where in local:
        with contextlib.suppress(OSError):  # in use: perhaps by this process, which torch knows
            return socket.create_server(where[:2], family=family, backlog=socket.SOMAXCONN)
    return None


def _client(place: Place, timeout_s: float, *, is_master: bool = False, listener: socket.socket | None = None) -> Any:
    options: dict[str, Any] = {"is_master": is_master, "wait_for_workers": False, "multi_tenant": is_master}
    if listener is not None:
        options["master_listen_fd"] = listener.detach()
    # torch tries again, and so takes up to twice as long. A thread that returns while the process ends would abort it.
    first, later = timedelta(seconds=timeout_s / 2), timedelta(seconds=timeout_s)
    store = dist.TCPStore(place.host, place.port, place.size, timeout=first, **options)  # pyright: ignore[reportPrivateImportUsage]
    store.set_timeout(later)
    return store


def _await_listener(place: Place, end: float, timeout_s: float) -> None:
    """Wait until something listens at the address: process 0 may start later than this one."""
    why = ""
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((place.host, place.port), timeout=left).close()
            return
        except OSError as error:  # also of a name that is not known, or not yet
            why = "no answer" if isinstance(error, TimeoutError) else error.strerror or first_line(error)
        time.sleep(min(POLL_S, max(0.0, end - time.monotonic())))
    raise UserError(
        f"process {place.rank}: nothing listens at {place.address} after {timeout_s:.0f} s ({why}); check that process "
        "0 was started, that MASTER_ADDR and MASTER_PORT are the same in all processes, and that no firewall is between"
    )


def _resolve(place: Place) -> list[Any]:
    try:
        return socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except OSError:
        return []


def _is_local(address: Any) -> bool:
    """Return True for an address of this machine: only such a one can be bound."""
    family, kind, protocol, _, where = address
    with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
        probe.bind((where[0], 0, *where[2:]))
        return True
    return False


def can_listen(interface: str) -> bool:
    """Return True for an interface with an address, at which gloo can listen."""
    try:
        dist.ProcessGroupGloo.create_device(interface=interface)  # pyright: ignore[reportUnknownMemberType]
    except (RuntimeError, ValueError):
        return False
    return True


def transport_failure() -> str:
    """Return why gloo cannot use the transport that GLOO_DEVICE_TRANSPORT names, or ""."""
    try:
        dist.ProcessGroupGloo.create_device(hostname="localhost")  # pyright: ignore[reportUnknownMemberType]
    except (RuntimeError, ValueError) as error:
        return first_line(error)
    return ""


def has_nccl() -> bool:
    """Return True if torch was built with NCCL."""
    return dist.is_nccl_available()
