"""A shared secret, and a connection whose two ends have shown each other that they know it. Imports no torch.

Each end sends a random number, and gets back a digest (HMAC-SHA256) of both numbers with the secret as the key: the
secret itself is never sent. Every later message carries a digest with its number in the order, under a key that only
these two ends of this connection have. So nobody else can answer, change, repeat or insert a message. All can be read:
nothing is encrypted. A short secret could be guessed by who has recorded a greeting, so it must be long.
"""

import contextlib
import hmac
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from resist.errors import UserError, quoted

VARIABLE = "RESIST_SECRET"
SHORTEST, LONGEST = 16, 4096  # bytes of a secret
GREETING, FULL = b"resist store 1\n\n", b"resist full  1\n\n"
NONCE_BYTES = TAG_BYTES = 32
REFUSED = bytes(TAG_BYTES)  # in place of a digest
MESSAGE_BYTES = 16 << 20  # of a message, at most
MAKE = 'python -c "import secrets; print(secrets.token_hex())"'


class WrongSecretError(Exception):
    """The other end has another secret, or none."""


class FullError(Exception):
    """The other end has as many connections as it allows."""


class NoStoreError(Exception):
    """The other end is something else."""


def read_secret(file: Path | None = None) -> bytes:
    """Read the secret from a file, or from the environment.

    Args:
        file: The file. Default: the environment variable RESIST_SECRET.

    Returns:
        The secret, without white space around it.

    Raises:
        UserError: There is none, or it is too short. Its value is not in the message.
    """
    where = f"the file {quoted(file)}" if file is not None else f"{VARIABLE} in the environment"
    if file is not None:
        try:
            with file.open("rb") as opened:
                secret = opened.read(LONGEST + 1).strip()
        except OSError as error:
            raise UserError(f"the secret cannot be read from {where}: {error.strerror}") from error
    else:
        secret = os.environ.get(VARIABLE, "").encode("utf-8", "surrogateescape").strip()
    if not secret and file is None:
        raise UserError(f"no secret: set {where}, or give `secret_file`; {MAKE} makes one")
    if not SHORTEST <= len(secret) <= LONGEST:
        raise UserError(
            f"the secret in {where} has {len(secret)} bytes; it must have {SHORTEST} to {LONGEST}; {MAKE} makes one"
        )
    return secret


class Channel:
    """A connection between two ends that know the secret.

    Args:
        connection: The socket, connected.
        key: The key of the messages of this connection.
        server: True at the end that has listened.
    """

    def __init__(self, connection: socket.socket, key: bytes, *, server: bool) -> None:
        self._connection, self._key = connection, key
        self._sent, self._received = (b"s", b"c") if server else (b"c", b"s")
        self._number_sent = self._number_received = 0

    def send(self, fields: Sequence[bytes], timeout_s: float) -> None:
        """Send a message.

        Args:
            fields: Its content.
            timeout_s: Seconds that it may take.

        Raises:
            OSError: The connection has ended, or the other end does not read.
            ValueError: The message is too long.
        """
        content = b"".join(struct.pack("!I", len(field)) + field for field in fields)
        if len(content) > MESSAGE_BYTES:
            raise ValueError(f"a message of {len(content)} bytes exceeds the {MESSAGE_BYTES} that a store takes")
        tag = self._tag(self._sent, self._number_sent, content)
        self._number_sent += 1
        self._connection.settimeout(timeout_s)
        self._connection.sendall(struct.pack("!I", len(content)) + tag + content)

    def receive(self, timeout_s: float | None) -> list[bytes]:
        """Wait for a message.

        Args:
            timeout_s: Seconds to wait. None: until the connection ends.

        Returns:
            Its content.

        Raises:
            OSError: The connection has ended, the message is not of the other end, or it does not come in time.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        (length,) = struct.unpack("!I", _exactly(self._connection, 4, end))
        if length > MESSAGE_BYTES:
            raise ConnectionError("a message that is too long")
        tag, content = _exactly(self._connection, TAG_BYTES, end), _exactly(self._connection, length, end)
        if not hmac.compare_digest(tag, self._tag(self._received, self._number_received, content)):
            raise ConnectionError("a message that is not of the other end")
        self._number_received += 1
        return _fields(content)

    def _tag(self, direction: bytes, number: int, content: bytes) -> bytes:
        return hmac.digest(self._key, direction + struct.pack("!Q", number) + content, "sha256")

    def close(self) -> None:
        """Close the connection; a wait for a message ends, too."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def greet(connection: socket.socket, secret: bytes, timeout_s: float) -> Channel:
    """Show a server that this process knows the secret, and make it show the same.

    Args:
        connection: The socket, connected.
        secret: The secret.
        timeout_s: Seconds that the server may take.

    Raises:
        WrongSecretError: The server has another one.
        FullError: The server has too many connections.
        NoStoreError: The server is something else.
        OSError: The connection has ended, or the server does not answer in time.
    """
    end = time.monotonic() + timeout_s
    greeting = _exactly(connection, len(GREETING), end)
    if greeting == FULL:
        raise FullError
    if greeting != GREETING:
        raise NoStoreError
    theirs, ours = _exactly(connection, NONCE_BYTES, end), secrets.token_bytes(NONCE_BYTES)
    proof, expected, key = _digests(secret, theirs, ours)
    connection.settimeout(timeout_s)
    connection.sendall(GREETING + ours + proof)
    if not hmac.compare_digest(_exactly(connection, TAG_BYTES, end), expected):
        raise WrongSecretError
    return Channel(connection, key, server=False)


def admit(connection: socket.socket, secret: bytes, timeout_s: float) -> Channel:
    """Let a client show that it knows the secret, and show the same.

    Args:
        connection: The socket, connected.
        secret: The secret.
        timeout_s: Seconds that all of it may take.

    Raises:
        WrongSecretError: The client has another one.
        NoStoreError: The client is something else.
        OSError: The connection has ended, or the client does not answer in time.
    """
    end, ours = time.monotonic() + timeout_s, secrets.token_bytes(NONCE_BYTES)
    connection.settimeout(timeout_s)
    connection.sendall(GREETING + ours)
    if _exactly(connection, len(GREETING), end) != GREETING:
        raise NoStoreError
    theirs = _exactly(connection, NONCE_BYTES, end)
    expected, proof, key = _digests(secret, ours, theirs)
    right = hmac.compare_digest(_exactly(connection, TAG_BYTES, end), expected)
    connection.sendall(proof if right else REFUSED)
    if not right:
        raise WrongSecretError
    return Channel(connection, key, server=True)


def _digests(secret: bytes, server: bytes, client: bytes) -> tuple[bytes, bytes, bytes]:
    """What the client shows, what the server shows, and the key of the messages."""
    of: Callable[[bytes], bytes] = lambda name: hmac.digest(secret, name + server + client, "sha256")  # noqa: E731
    return of(b"resist client"), of(b"resist server"), of(b"resist messages")


def _exactly(connection: socket.socket, size: int, end: float | None) -> bytes:
    """Receive `size` bytes, until `end` at most."""
    parts: list[bytes] = []
    while size > 0:
        connection.settimeout(None if end is None else max(0.001, end - time.monotonic()))
        try:
            part = connection.recv(min(size, 1 << 20))
        except TimeoutError as error:
            raise TimeoutError("no answer in time") from error
        if end is not None and time.monotonic() > end:  # it comes in drops
            raise TimeoutError("no answer in time")
        if not part:
            raise ConnectionError("the connection has ended")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _fields(content: bytes) -> list[bytes]:
    fields: list[bytes] = []
    place = 0
    while place < len(content):
        end = place + 4 + int.from_bytes(content[place : place + 4], "big")
        fields.append(content[place + 4 : end])
        place = end
    return fields
