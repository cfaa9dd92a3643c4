"""A store server for hosts that are started by hand: it outlives the workers, and asks for a secret. Imports no torch.

torch's own server listens on every interface and answers everyone. This one listens at one address, and a connection
has to show within seconds that its process knows the secret (`resist.members.secret`). The client is
`resist.members.store_client.SecretStore`.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Sequence

from resist.errors import UserError, first_line
from resist.members.secret import FULL, Channel, NoStoreError, WrongSecretError, admit

log = logging.getLogger(__name__)

GREETING_S = 5.0  # seconds in which a connection has to show the secret
ANSWER_S = 30.0  # seconds in which a client has to read an answer
WAIT_S = 1.0  # seconds after which a client that waits for a key is answered that it is not there yet
MOST_CONNECTIONS = 512
MOST_STRANGERS = 32  # connections that have not shown the secret yet
MOST_BYTES = 256 << 20  # of all keys and values
REPORT_S = 1.0  # seconds between two reports of refused connections
OK, ERROR = b"ok", b"error"
# How the system looks after connections whose other machine is gone.
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


class StoreServer:
    """Keys and values, for those that know the secret.

    Args:
        host: Name or address of this machine to listen at, and nowhere else.
        port: Its port. 0: one that is free.
        secret: The secret.
        listener: What listens already, at this host and port. Default: the server begins to listen.

    Attributes:
        address: Host and port, as they are written.
        port: The port.

    Raises:
        UserError: It cannot listen there.
    """

    def __init__(self, host: str, port: int, secret: bytes, listener: socket.socket | None = None) -> None:
        self._listener, self._secret = listen(host, port) if listener is None else listener, secret
        self.port = self._listener.getsockname()[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._values: dict[bytes, bytes] = {}
        self._size = 0  # bytes of all keys and values
        self._changed = threading.Condition()
        self._connections: set[socket.socket] = set()
        self._strangers = 0
        self._counting = threading.Lock()
        self._refused, self._reported = 0, 0.0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return len(self._connections)

    def close(self) -> None:
        """End the server and all connections."""
        for connection in [self._listener, *self._connections]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if self._listener.fileno() < 0 or error.errno is None or not _listens(self._listener):
                    return
                time.sleep(0.1)  # no more files, for a moment
                continue
            with self._counting:
                room = len(self._connections) < MOST_CONNECTIONS and self._strangers < MOST_STRANGERS
                if room:
                    self._connections.add(connection)
                    self._strangers += 1
            if room:
                threading.Thread(target=self._serve, args=(connection, address[0]), daemon=True).start()
                continue
            self._refuse(address[0], "too many connections")
            with contextlib.suppress(OSError), connection:
                connection.setblocking(False)
                connection.send(FULL)

    def _serve(self, connection: socket.socket, host: str) -> None:
        try:
            channel = self._admit(connection, host)
            while channel is not None:
                channel.send(self._answer(channel.receive(None)), ANSWER_S)
        except (OSError, ValueError):  # the client has ended
            pass
        finally:
            with self._counting:
                self._connections.discard(connection)
            connection.close()

    def _admit(self, connection: socket.socket, host: str) -> Channel | None:
        """Ask for the secret. Returns None where the other end does not know it."""
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if hasattr(socket, name):  # not on every system
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
            return admit(connection, self._secret, GREETING_S)
        except WrongSecretError:
            self._refuse(host, "another secret")
        except NoStoreError:
            self._refuse(host, "no member of a run")
        except TimeoutError:
            self._refuse(host, f"no secret within {GREETING_S:g} s")
        except OSError:
            self._refuse(host, "no secret")
        finally:
            with self._counting:
                self._strangers -= 1
        return None

    def _refuse(self, host: str, why: str) -> None:
        """Report that a connection was refused; of many in a short time only the first one."""
        with self._counting:
            self._refused += 1
            if time.monotonic() - self._reported < REPORT_S:
                return
            self._reported = time.monotonic()
            number = self._refused
        log.warning("refused a connection from %s: %s (%d refused so far)", host, why, number)

    def _answer(self, request: Sequence[bytes]) -> list[bytes]:
        try:
            return [OK, *self._do(request[0].decode("ascii"), request[1:])]
        except (ValueError, IndexError, KeyError) as error:
            return [ERROR, first_line(error).encode()]

    def _do(self, name: str, arguments: Sequence[bytes]) -> list[bytes]:
        """Carry out a request. Raises ValueError, IndexError or KeyError for one that is invalid."""
        with self._changed:
            if name == "wait":  # for WAIT_S at most
                seconds, keys = min(max(float(arguments[0]), 0.0), WAIT_S), arguments[1:]
                return [b"%d" % self._changed.wait_for(lambda: all(key in self._values for key in keys), seconds)]
            if name == "check":
                return [b"%d" % all(key in self._values for key in arguments)]
            if name == "get":
                return [self._values[key] for key in arguments]
            if name == "count":
                return [b"%d" % len(self._values)]
            if name == "delete":
                value = self._values.pop(arguments[0], None)
                self._size -= 0 if value is None else len(arguments[0]) + len(value)
                return [b"%d" % (value is not None)]
            return self._write(name, arguments)

    def _write(self, name: str, arguments: Sequence[bytes]) -> list[bytes]:
        before = self._values.get(arguments[0])
        result: list[bytes] = []
        if name == "set":
            written = dict(zip(arguments[::2], arguments[1::2], strict=True))
        elif name == "add":
            result = [b"%d" % (int(before or b"0") + int(arguments[1]))]
            written = {arguments[0]: result[0]}
        elif name == "append":
            written = {arguments[0]: (before or b"") + arguments[1]}
        elif name == "compare_set":
            expected, desired = arguments[1:]
            same = before == expected or (before is None and not expected)
            written = {arguments[0]: desired} if same else {}
            result = [desired if same else expected if before is None else before]
        else:
            raise ValueError(f"no request {name!r}")
        size = self._size + sum(
            len(value) - len(self._values[key]) if key in self._values else len(key) + len(value)
            for key, value in written.items()
        )
        if size > MOST_BYTES:
            raise ValueError(f"the store is full, with {MOST_BYTES >> 20} MiB")
        self._size = size
        self._values |= written
        self._changed.notify_all()
        return result


def listen(host: str, port: int) -> socket.socket:
    """Listen at one address of this machine.

    Args:
        host: Its name or address.
        port: The port. 0: one that is free.

    Raises:
        UserError: It is not of this machine, or the port is in use.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"cannot listen at {host}, port {port}: {reason(error)}; give an address of this machine, and a free port"
        ) from error


def reason(error: Exception) -> str:
    """Return the reason in an error of a socket."""
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)  # without the address, which Python adds
    return getattr(error, "strerror", None) or first_line(error)


def _listens(listener: socket.socket) -> bool:
    try:
        return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError:
        return False
