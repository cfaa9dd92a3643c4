"""The store behind a secret: it does what torch's does, for those that know the secret and for nobody else."""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from pool import Pool
from resist.errors import UserError
from resist.members import secret as module
from resist.members import store_client, store_server
from resist.members.secret import GREETING, read_secret
from resist.members.store_client import SecretStore
from resist.members.store_server import StoreServer

SECRET = b"a secret of the tests"
HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def server() -> Iterator[StoreServer]:
    server = StoreServer(HOST, 0, SECRET)
    yield server
    server.close()


def client(port: int, secret: bytes = SECRET, timeout_s: float = 5.0) -> SecretStore:
    return SecretStore(HOST, port, secret, timeout_s)


@pytest.fixture(autouse=True)
def _close_clients() -> Iterator[None]:
    yield
    for store in list(store_client._open):
        store.close()


KEYS, VALUES = st.sampled_from(["a", "b", "k/c"]), st.sampled_from(["", "1", "two", "3" * 5000])
STEPS = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES.filter(bool)),
    st.tuples(st.just("add"), st.just("number"), st.integers(-5, 5)),
    st.tuples(st.just("compare_set"), KEYS, VALUES, VALUES.filter(bool)),
    st.tuples(st.just("check"), st.lists(KEYS, min_size=1, max_size=3)),
    st.tuples(st.just("delete_key"), KEYS),
    st.tuples(st.just("get"), KEYS),
    st.tuples(st.just("append"), KEYS, VALUES.filter(bool)),
)


@pytest.fixture(scope="module")
def of_torch() -> dist.TCPStore:
    return dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)


@given(st.lists(STEPS, max_size=20))
def test_it_does_what_the_store_of_torch_does(server: StoreServer, of_torch: dist.TCPStore, steps: list[Any]) -> None:
    run = os.urandom(8).hex()
    stores = [dist.PrefixStore(run, client(server.port)), dist.PrefixStore(run, of_torch)]
    for name, *arguments in steps:
        if name == "get" and not stores[1].check(arguments):
            continue
        first, second = (getattr(store, name)(*arguments) for store in stores)
        assert first == second, name


def test_a_key_is_waited_for(server: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_server, "WAIT_S", 8.0)
    a, b = client(server.port), client(server.port).clone()
    threading.Timer(0.2, b.set, ("late", "now")).start()
    start = time.monotonic()
    assert a.get("late") == b"now"
    assert time.monotonic() - start < 5  # it is not looked for: it is sent
    with pytest.raises(RuntimeError, match=r"has no late, never after 0.1 s"):
        a.wait(["late", "never"], timedelta(seconds=0.1))
    a.set_timeout(timedelta(seconds=0.2))
    with pytest.raises(RuntimeError, match=r"has no late, never after 0.2 s"):
        a.multi_get(["late", "never"])
    a.multi_set(["x", "y"], ["1", b"2"])
    assert a.multi_get(["y", "x"]) == [b"2", b"1"]
    assert b.num_keys() >= 3


def test_who_has_another_secret_is_refused_at_once(
    server: StoreServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_server, "REPORT_S", 0.0)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(UserError) as raised:
        client(server.port, b"another secret of the tests", timeout_s=60)
    assert str(raised.value) == (
        f"the store at 127.0.0.1:{server.port} has another secret; give all processes the one of `resist rendezvous`"
    )
    assert time.monotonic() - start < 3
    until(lambda: "refused a connection from 127.0.0.1: another secret" in caplog.text)
    assert "secret of the tests" not in caplog.text


def test_a_server_with_another_secret_is_refused() -> None:
    """A server has to show that it knows the secret, too: it could tell any members to go on."""
    with socket.create_server((HOST, 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(GREETING + bytes(32))
                connection.recv(1 << 10)
                connection.sendall(os.urandom(32))

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="has another secret"):
            client(listener.getsockname()[1])


class Relay:
    """Passes bytes on between a client and a server, keeps them, and may change them."""

    def __init__(self, port: int) -> None:
        self.listener = socket.create_server((HOST, 0))
        self.port, self.target = self.listener.getsockname()[1], port
        self.seen, self.change = bytearray(), False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection((HOST, self.target))
            for pair in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with source, contextlib.suppress(OSError):
            while content := bytearray(source.recv(1 << 16)):
                self.seen += content
                if self.change:
                    content[-1] ^= 1
                target.sendall(content)
            target.shutdown(socket.SHUT_RDWR)


def test_the_secret_is_not_sent_and_nothing_can_be_changed_on_the_way(server: StoreServer) -> None:
    relay = Relay(server.port)
    store = client(relay.port)
    store.set("key", "value")
    assert b"value" in relay.seen  # nothing is encrypted
    assert SECRET not in relay.seen
    relay.change = True
    with pytest.raises(RuntimeError, match="does not answer"):
        store.set("key", "other")
    assert client(server.port).get("key") == b"value"
    with pytest.raises(RuntimeError, match="does not answer"):
        store.get("key")  # of the next message nobody would know what it answers
    relay.listener.close()


def test_a_recorded_message_is_not_taken_again(server: StoreServer) -> None:
    """Nor in another connection: each has a key of its own."""
    store = client(server.port)
    sent: list[bytes] = []
    connection = store._channel._connection

    class Recorded:
        def sendall(self, content: bytes) -> None:
            sent.append(content)
            connection.sendall(content)

        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

    store._channel._connection = Recorded()  # type: ignore[assignment]
    store.add("count", 1)
    connection.sendall(sent[0])
    assert connection.recv(10) == b"", "the server has ended the connection"
    other = client(server.port)
    other._channel._connection.sendall(sent[0])
    assert other._channel._connection.recv(10) == b""
    assert client(server.port).add("count", 0) == 1


def until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\n\r\n" + bytes(80), GREETING, GREETING + bytes(32)], ids=str)
def test_a_connection_without_the_secret_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, sent: bytes
) -> None:
    monkeypatch.setattr(store_server, "GREETING_S", 0.3)
    server = StoreServer(HOST, 0, SECRET)
    received = b""
    with (
        caplog.at_level(logging.WARNING),
        socket.create_connection((HOST, server.port), timeout=5) as connection,
        contextlib.suppress(ConnectionResetError),  # the server has not read all
    ):
        connection.sendall(sent)
        while part := connection.recv(1 << 10):
            received += part
    assert len(received) <= len(GREETING) + 64
    until(lambda: "refused a connection from 127.0.0.1: no " in caplog.text)
    assert server._strangers == 0 == len(server._connections)
    server.close()


def test_the_number_of_connections_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_server, "GREETING_S", 0.5)
    monkeypatch.setattr(store_server, "MOST_STRANGERS", 2)
    server = StoreServer(HOST, 0, SECRET)
    silent = [socket.create_connection((HOST, server.port)) for _ in range(5)]
    until(lambda: server._refused == 3)
    assert len(server._connections) == 2
    store = client(server.port)  # tries again until the silent ones are dropped
    store.set("a", "b")
    monkeypatch.setattr(store_server, "MOST_CONNECTIONS", 1)
    with pytest.raises(UserError, match=r"cannot be reached within 0.3 s \(too many connections\); check that"):
        client(server.port, timeout_s=0.3)
    assert store.get("a") == b"b"
    for connection in silent:
        connection.close()
    server.close()


def test_the_size_of_the_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_server, "MOST_BYTES", 1000)
    server = StoreServer(HOST, 0, SECRET)
    store = client(server.port)
    store.set("a", "x" * 900)
    with pytest.raises(RuntimeError, match="the store is full"):
        store.set("b", "x" * 200)
    store.set("a", "x")
    store.set("b", "x" * 200)
    store.delete_key("a")
    store.delete_key("b")
    assert (server._size, store.num_keys()) == (0, 0)
    monkeypatch.setattr(module, "MESSAGE_BYTES", 100)
    with pytest.raises(ValueError, match="a message of 216 bytes exceeds the 100 that a store takes"):
        store.set("a", "x" * 200)
    server.close()


def test_a_server_that_ends_or_is_silent_ends_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_client, "ANSWER_S", 0.2)
    monkeypatch.setattr(store_client, "WAIT_S", 0.2)
    server = StoreServer(HOST, 0, SECRET)
    store, second = client(server.port), client(server.port)
    monkeypatch.setattr(StoreServer, "_do", lambda *_: time.sleep(1) or [])
    with pytest.raises(RuntimeError, match="does not answer: no answer in time"):
        store.check(["a"])
    monkeypatch.undo()
    server.close()
    until(lambda: not server._connections)
    with pytest.raises(RuntimeError, match="does not answer"):
        second.check(["a"])
    with pytest.raises(UserError, match=r"cannot be reached within 0.3 s \(Connection refused\); check that"):
        client(server.port, timeout_s=0.3)


def test_who_waits_for_a_server_says_so_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    server = StoreServer(HOST, 0, SECRET)
    monkeypatch.setattr(store_client, "SILENCE_S", 0.05)
    monkeypatch.setattr(store_client, "POLL_S", 0.02)
    client(server.port).close()
    assert not caplog.messages
    server.close()
    with pytest.raises(UserError, match="cannot be reached"):
        client(server.port, timeout_s=0.4)
    assert caplog.messages == [f"waiting for the store at {HOST}:{server.port}, up to 0.4 s (Connection refused)"]


def test_it_listens_at_its_address_only(server: StoreServer) -> None:
    for other in ("127.0.0.2", "::1"):
        with pytest.raises(OSError, match=r"refused|assign|unreachable"):
            socket.create_connection((other, server.port), timeout=5)
    with pytest.raises(UserError, match=r"cannot listen at 127.0.0.1, port \d+: Address already in use; give an"):
        StoreServer(HOST, server.port, SECRET)
    with pytest.raises(UserError, match=r"cannot listen at 203.0.113.7, port 0: Cannot assign requested address; give"):
        StoreServer("203.0.113.7", 0, SECRET)


def test_what_is_no_store(of_torch: dist.TCPStore) -> None:
    with pytest.raises(UserError, match=r"cannot be reached within 0.3 s \("):
        client(of_torch.port, timeout_s=0.3)
    with socket.create_server((HOST, 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match="is no `resist rendezvous`; check host and port"):
            client(listener.getsockname()[1])


def test_where_the_secret_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESIST_SECRET", " from the environment\n")
    assert read_secret() == b"from the environment"
    (tmp_path / "secret").write_text("sixteen bytes ok\n")
    assert read_secret(tmp_path / "secret") == b"sixteen bytes ok"
    (tmp_path / "secret").write_text("too short\n")
    with pytest.raises(UserError, match=r"has 9 bytes; it must have 16 to 4096; python -c ") as raised:
        read_secret(tmp_path / "secret")
    assert "too short" not in str(raised.value)
    with pytest.raises(UserError, match=r"the secret cannot be read from the file .*none: No such file or directory"):
        read_secret(tmp_path / "none")
    monkeypatch.delenv("RESIST_SECRET")
    with pytest.raises(UserError, match="no secret: set RESIST_SECRET in the environment, or give `secret_file`"):
        read_secret()


def groups(port: int) -> list[float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    store = dist.PrefixStore("g", client(port, timeout_s=20))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=20))
    group = dist.new_group(backend="gloo")
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=group)
    return tensor.tolist()


@pytest.mark.slow
def test_groups_of_gloo_meet_at_it(pool: Pool, server: StoreServer) -> None:
    assert pool.run(3, groups, server.port, timeout_s=60) == [[3.0] * 3] * 3
