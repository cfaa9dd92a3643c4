"""A store of torch.distributed behind a shared secret: the client of `resist rendezvous`."""

import logging
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from resist.errors import UserError
from resist.members.secret import Channel, FullError, NoStoreError, WrongSecretError, greet
from resist.members.store_server import ERROR, GREETING_S, WAIT_S, reason

log = logging.getLogger(__name__)

SILENCE_S = 5.0  # seconds after which a process says that it waits for the server
POLL_S = 0.2  # seconds between two attempts to connect
ANSWER_S = 10.0  # seconds that an answer may take, beyond what the server waits for a key

Text = str | bytes
# Objects that only torch refers to, as below a PrefixStore, lose their part in Python: they are kept until `close`.
_open: "set[SecretStore]" = set()


class SecretStore(dist.Store):  # pyright: ignore[reportPrivateImportUsage]
    """A client of `resist.members.store_server.StoreServer`.

    Every call fails within seconds where the server is gone or does not answer. A clone has a connection of its own.

    Args:
        host: Name or address at which the server listens.
        port: Its port.
        secret: The secret that both have.
        timeout_s: Seconds to wait for the server to listen, and for keys in `get` and `wait`.

    Attributes:
        host: See above.
        port: See above.

    Raises:
        UserError: Nothing listens there in time, or what listens does not know the secret.
    """

    def __init__(self, host: str, port: int, secret: bytes, timeout_s: float = 300.0) -> None:
        super().__init__()
        self.host, self.port, self._secret, self._timeout_s = host, port, secret, timeout_s
        self._channel = _connect(host, port, secret, timeout_s)
        self._lock = threading.Lock()
        _open.add(self)

    def _request(self, name: str, *arguments: Text) -> list[bytes]:
        fields = [name.encode(), *(a.encode() if isinstance(a, str) else bytes(a) for a in arguments)]
        with self._lock:
            try:
                self._channel.send(fields, ANSWER_S)
                status, *result = self._channel.receive(ANSWER_S + WAIT_S)
            except OSError as error:  # what comes later would be the answer to something else
                self._channel.close()
                raise RuntimeError(f"the store at {self.host}:{self.port} does not answer: {reason(error)}") from error
        if status == ERROR:
            raise RuntimeError(f"the store at {self.host}:{self.port}: {result[0].decode()}")
        return result

    def set(self, key: str, value: Text) -> None:
        """Set a value."""
        self._request("set", key, value)

    def get(self, key: str) -> bytes:
        """Return a value. Waits until there is one."""
        self.wait([key])
        return self._request("get", key)[0]

    def add(self, key: str, value: int) -> int:
        """Add to a number, which begins at 0, and return it."""
        return int(self._request("add", key, str(value))[0])

    def append(self, key: str, value: Text) -> None:
        """Append to a value."""
        self._request("append", key, value)

    def compare_set(self, key: str, expected_value: Text, desired_value: Text) -> bytes:
        """Set a value if the present one is as expected ("" if there is none). Returns the value after that."""
        return self._request("compare_set", key, expected_value, desired_value)[0]

    def check(self, keys: Sequence[str]) -> bool:
        """Return True if all keys have values."""
        return self._request("check", *keys)[0] == b"1"

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all keys have values.

        Raises:
            RuntimeError: They have none in time.
        """
        seconds = self._timeout_s if timeout is None else timeout.total_seconds()
        end = time.monotonic() + seconds
        while self._request("wait", str(max(0.0, end - time.monotonic())), *keys)[0] != b"1":
            if time.monotonic() >= end:
                raise RuntimeError(f"the store at {self.host}:{self.port} has no {', '.join(keys)} after {seconds:g} s")

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        """Return several values. Waits until there are all."""
        self.wait(keys)
        return self._request("get", *keys)

    def multi_set(self, keys: Sequence[str], values: Sequence[Text]) -> None:
        """Set several values."""
        self._request("set", *(text for pair in zip(keys, values, strict=True) for text in pair))

    def delete_key(self, key: str) -> bool:
        """Delete a value. Returns False if there was none."""
        return self._request("delete", key)[0] == b"1"

    def num_keys(self) -> int:
        """Return the number of keys."""
        return int(self._request("count")[0])

    # Under these names torch calls them, where the store is below one that adds a prefix.
    deleteKey, getNumKeys = delete_key, num_keys  # noqa: N815

    def has_extended_api(self) -> bool:
        """Return True: the store has `append`, `multi_get` and `multi_set`."""
        return True

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long `get` and `wait` wait for keys."""
        self._timeout_s = timeout.total_seconds()

    @property
    def timeout(self) -> timedelta:
        """How long `get` and `wait` wait for keys."""
        return timedelta(seconds=self._timeout_s)

    def clone(self) -> "SecretStore":
        """Return a client with a connection of its own."""
        return SecretStore(self.host, self.port, self._secret, self._timeout_s)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()
        _open.discard(self)


def _connect(host: str, port: int, secret: bytes, timeout_s: float) -> Channel:
    """Connect to the server, which may start later. Raises UserError."""
    where, end, why = f"the store at {host}:{port}", time.monotonic() + timeout_s, ""
    said = time.monotonic() + SILENCE_S
    while True:
        left = min(GREETING_S, max(0.1, end - time.monotonic()))
        try:
            connection = socket.create_connection((host, port), left)
        except OSError as error:
            why = "no answer" if isinstance(error, TimeoutError) else reason(error)
        else:
            try:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return greet(connection, secret, left)
            except BaseException as error:
                connection.close()
                why = _failure(where, error)
        if time.monotonic() + POLL_S >= end:
            raise UserError(
                f"{where} cannot be reached within {timeout_s:g} s ({why}); check that `resist rendezvous` runs there, "
                "and that no firewall is between"
            )
        if time.monotonic() >= said:
            said = end
            log.warning("waiting for %s, up to %g s (%s)", where, timeout_s, why)
        time.sleep(POLL_S)


def _failure(where: str, error: BaseException) -> str:
    """Why a greeting has failed, where it may succeed later. Raises UserError where it never will."""
    if isinstance(error, WrongSecretError):
        raise UserError(f"{where} has another secret; give all processes the one of `resist rendezvous`") from error
    if isinstance(error, NoStoreError):
        raise UserError(f"what listens in place of {where} is no `resist rendezvous`; check host and port") from error
    if isinstance(error, FullError):
        return "too many connections"
    if isinstance(error, OSError):
        return reason(error)
    raise error


def run_store(store: dist.Store, name: str) -> Any:  # pyright: ignore[reportPrivateImportUsage]
    """Return the part of a store that belongs to one run.

    Args:
        store: The store, which may serve several runs.
        name: The name of the run.
    """
    return dist.PrefixStore(name, store)  # pyright: ignore[reportPrivateImportUsage]


def innermost(store: Any) -> Any:
    """Return the store below those that add a prefix.

    Args:
        store: A store of torch.distributed.
    """
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return store


def close_clone(store: Any) -> None:
    """End the connection of a clone of a store; one of torch ends with its object.

    Args:
        store: A store of torch.distributed.
    """
    store = innermost(store)
    if isinstance(store, SecretStore):
        store.close()
