"""Door: a listening port of each member, by which the others notice at once that its process has ended.

The store shows only after seconds that a member is silent. But when a process ends, however it ends, the system closes
its ports, and refuses connections to them from then on. So a refusal says that the process has ended, and nothing else
says anything: a stopped process still has its port, and a machine that is cut off does not answer at all.

A refusal counts only from a port that has answered before, with the token of its member. So an address that means
another machine here, or a firewall that refuses, makes no member lost.
"""

import contextlib
import errno
import os
import selectors
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Collection, Mapping
from typing import Any

from resist.members.store_client import innermost

LOOPBACK = "127.0.0.1"
LOOK_S = 0.2  # seconds that a look at other doors may take
INTRODUCTION_S = 1.0  # seconds that one may take to answer
TRIES = 3  # attempts to get an answer
TOKEN_BYTES = 32
REFUSED = (errno.ECONNREFUSED, errno.ECONNRESET)


class Door:
    """The port of this process, and those of the others.

    Args:
        address: An address of this machine that the others can reach.

    Attributes:
        entry: What the others need, as JSON data.
    """

    def __init__(self, address: str = LOOPBACK) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family)
        token = uuid.uuid4().hex
        self.entry = {"address": address, "port": self._listener.getsockname()[1], "token": token}
        self._known: dict[int, tuple[str, int]] = {}  # doors that have answered
        self._tries: dict[int, int] = {}
        self._asking: threading.Thread | None = None
        threading.Thread(target=_answer, args=(self._listener, token), daemon=True).start()
        _doors.add(self)

    def meet(self, entries: Mapping[int, Mapping[str, Any]]) -> None:
        """Get the answers of doors in the background, of which `closed` may later say that they are closed.

        Args:
            entries: The entry of each process.
        """
        new = {n: e for n, e in entries.items() if n not in self._known and self._tries.get(n, 0) < TRIES}
        if new and (self._asking is None or not self._asking.is_alive()):
            self._asking = threading.Thread(target=self._meet, args=(new,), daemon=True)
            self._asking.start()

    def meet_now(self, entries: Mapping[int, Mapping[str, Any]]) -> None:
        """Get the answers of doors that have not answered yet. Takes INTRODUCTION_S seconds for each at most.

        Args:
            entries: The entry of each process.
        """
        self._meet({number: entry for number, entry in entries.items() if number not in self._known})

    def _meet(self, entries: Mapping[int, Mapping[str, Any]]) -> None:
        for number, entry in entries.items():
            self._tries[number] = self._tries.get(number, 0) + 1
            with contextlib.suppress(OSError, KeyError, TypeError, ValueError):  # what another version has written
                place = str(entry["address"]), int(entry["port"])
                with socket.create_connection(place, INTRODUCTION_S) as connection:
                    if connection.recv(TOKEN_BYTES, socket.MSG_WAITALL).decode() == entry["token"]:
                        self._known[number] = place

    def closed(self, numbers: Collection[int]) -> set[int]:
        """Look which processes have ended for certain. Takes LOOK_S seconds at most.

        Args:
            numbers: The processes to look at.
        """
        ended: set[int] = set()
        with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
            for number in numbers:
                if number not in self._known:
                    continue
                family = socket.AF_INET6 if ":" in self._known[number][0] else socket.AF_INET
                connection = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
                connection.setblocking(False)
                if connection.connect_ex(self._known[number]) in REFUSED:  # at once, on this machine
                    ended.add(number)
                else:
                    selector.register(connection, selectors.EVENT_WRITE, number)
            end = time.monotonic() + LOOK_S
            while selector.get_map() and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    assert isinstance(key.fileobj, socket.socket)
                    if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in REFUSED:
                        ended.add(key.data)
                    selector.unregister(key.fileobj)
        return ended

    def close(self) -> None:
        """Close the port of this process."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # closing alone does not end a wait for connections
        self._listener.close()


_doors: weakref.WeakSet[Door] = weakref.WeakSet()


def _close_in_child() -> None:
    """A fork, such as a process that reads data, must not keep the port open: it may outlive this process."""
    for door in list(_doors):
        door._listener.close()  # pyright: ignore[reportPrivateUsage]


os.register_at_fork(after_in_child=_close_in_child)


def _answer(listener: socket.socket, token: str) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            if listener.fileno() < 0 or not _listens(listener):
                return
            time.sleep(LOOK_S)  # no more files, for a moment
            continue
        with contextlib.suppress(OSError), connection:
            connection.setblocking(False)
            connection.send(token.encode())


def _listens(listener: socket.socket) -> bool:
    try:
        return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False


def own_address(store: Any) -> str:
    """Return the address by which this machine reaches a store; that of the loopback interface for one in a file.

    Args:
        store: A store of torch.distributed.
    """
    store = innermost(store)
    host, port = getattr(store, "host", ""), getattr(store, "port", 0)
    with contextlib.suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM) if host else ():
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(place)  # sends nothing
                return str(probe.getsockname()[0])
    return LOOPBACK
