"""The meeting point: each way in which it is missing, taken or wrong ends within the timeout, in one line."""

import contextlib
import ipaddress
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from resist.errors import UserError
from resist.sync.distributed import connect
from resist.sync.interfaces import interface_failure, introduction, judge, matching, reason
from resist.sync.meeting import Place, _listen_at, captured_stderr, open_store, within
from resist.sync.process_group import loopback_store

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"RANK": ""}, "RANK not set in the environment, where a job of several processes needs RANK, WORLD_SIZE,"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR not set"),
        ({"RANK": "x"}, "RANK=x in the environment; give a whole number, 0 to 1, WORLD_SIZE - 1"),
        ({"RANK": "2"}, "RANK=2 in the environment; give a whole number, 0 to 1, WORLD_SIZE - 1"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0 in the environment; give a whole number, at least 1"),
        ({"WORLD_SIZE": "9" * 30}, f"WORLD_SIZE={'9' * 30} in the environment; give a whole number, at least 1"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 in the environment; give a whole number, 1 to 65535"),
        ({"MASTER_PORT": "-1"}, "MASTER_PORT=-1 in the environment; give a whole number, 1 to 65535"),
    ],
    ids=str,
)
def test_the_environment(monkeypatch: pytest.MonkeyPatch, values: dict[str, str], expected: str) -> None:
    good = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (good | values).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=re.escape(expected)):
        connect(2, CPU, 1.0)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def failure_to_meet(rank: int, host: str, port: int, timeout_s: float) -> tuple[str, float]:
    start = time.monotonic()
    with captured_stderr(), pytest.raises(UserError) as raised:
        open_store(Place(rank, 2, host, port, served=False), timeout_s)
    return str(raised.value), time.monotonic() - start


def test_nothing_listens(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    text, seconds = failure_to_meet(1, "127.0.0.1", port, 0.5)
    assert text.startswith(f"process 1: nothing listens at 127.0.0.1:{port} after 0 s (Connection refused); check that")
    assert seconds < 3


def test_a_name_that_nobody_knows() -> None:
    text, seconds = failure_to_meet(1, "nosuch.invalid", 29500, 0.3)
    assert text.startswith("process 1: nothing listens at nosuch.invalid:29500 after 0 s (")
    assert seconds < 20  # of the resolver


def test_what_listens_does_not_answer(listener: socket.socket) -> None:
    """torch's client would wait without end."""
    text, seconds = failure_to_meet(1, "127.0.0.1", listener.getsockname()[1], 0.5)
    assert "is no rendezvous of torch.distributed (no valid answer within 0 s); another program has the port" in text
    assert seconds < 3


def test_what_listens_answers_something_else(listener: socket.socket) -> None:
    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()
            except OSError:
                return

    threading.Thread(target=serve, daemon=True).start()
    text, seconds = failure_to_meet(1, "127.0.0.1", listener.getsockname()[1], 1.0)
    assert "is no rendezvous of torch.distributed" in text
    assert seconds < 4


def test_process_0_finds_the_port_in_use(listener: socket.socket) -> None:
    text, _ = failure_to_meet(0, "127.0.0.1", listener.getsockname()[1], 5.0)
    assert text == (
        f"process 0, which serves the rendezvous: cannot listen at port {listener.getsockname()[1]}: it is in use; "
        "give another MASTER_PORT, the same in all processes"
    )


def test_an_address_that_is_not_of_process_0(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    text, seconds = failure_to_meet(0, "203.0.113.1", port, 0.6)
    assert "process 0, which serves the rendezvous: MASTER_ADDR=203.0.113.1 does not lead to this machine" in text
    assert seconds < 5


def listening_at(port: int, *hosts: str) -> list[str]:
    """The addresses at which something listens."""
    found: list[str] = []
    for host in hosts:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=5):
            found.append(host)
    return found


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", ["127.0.0.1"]),
        ("127.0.0.2", ["127.0.0.2"]),
        ("localhost", ["127.0.0.1"]),
        ("0.0.0.0", ["127.0.0.1", "127.0.0.2"]),
    ],
)
def test_process_0_listens_at_the_address_that_it_was_given(
    listener: socket.socket, host: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = listener.getsockname()[1]
    listener.close()
    resolve = socket.getaddrinfo
    if host == "localhost":  # not on every machine with IPv4 only
        monkeypatch.setattr(socket, "getaddrinfo", lambda h, *a, **k: resolve("127.0.0.1", *a, **k))
    store = open_store(Place(0, 2, host, port, served=False), 20.0)
    monkeypatch.undo()
    assert listening_at(port, "127.0.0.1", "127.0.0.2") == expected
    again = open_store(Place(0, 2, host, port, served=False), 20.0)  # the same process, which serves it already
    store.set("a", "b")
    assert again.get("a") == b"b"
    assert open_store(Place(1, 2, host, port, served=False), 20.0).get("a") == b"b"


@pytest.mark.parametrize(
    "found",
    [[], ["127.0.0.2"], ["203.0.113.1"]],  # the second: /etc/hosts of Debian; others find another address
    ids=["unknown", "loopback", "not here"],
)
def test_process_0_listens_everywhere_where_a_name_is_not_clear(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch, found: list[str]
) -> None:
    port = listener.getsockname()[1]
    listener.close()
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda h, *a, **k: [r for f in found for r in resolve(f, *a, **k)])
    assert _listen_at(Place(0, 2, "node0", port, served=False)) is None


def test_process_0_listens_at_the_only_address_of_a_name(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = listener.getsockname()[1]
    listener.close()
    resolve = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda h, *a, **k: resolve("127.0.0.2", *a, **k))
    monkeypatch.setattr(ipaddress.IPv4Address, "is_loopback", False)  # stands for an address of a network
    listening = _listen_at(Place(0, 2, "node0", port, served=False))
    assert listening is not None
    monkeypatch.undo()
    with listening:
        assert listening_at(port, "127.0.0.1", "127.0.0.2") == ["127.0.0.2"]


def test_what_torch_logs_is_not_seen_at_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    for success in (False, True):
        with captured_stderr() as done:
            os.write(2, b"pages\n[W1126 13:43:57.769276439 socket.cpp:207] [c10d] no name\n")
            if success:
                done()
        assert capfd.readouterr().err == "pages\n" * success


def test_an_action_without_end_is_left() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        within(0.05, lambda: time.sleep(20))


@pytest.mark.slow
def test_a_transport_that_this_torch_does_not_have() -> None:
    """In a process of its own: torch reads the variable once."""
    script = "import torch; from resist.sync.interfaces import introduction; "
    script += "print(introduction(torch.device('cpu'), '')['failure'])"
    environment = os.environ | {"GLOO_DEVICE_TRANSPORT": "FOO", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.startswith("GLOO_DEVICE_TRANSPORT=FOO: gloo cannot use it here ("), done.stderr
    assert done.stdout.endswith("); unset it\n")


def test_tls_that_does_not_encrypt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch reads the variable, which it does once in a process."""
    monkeypatch.setenv("GLOO_DEVICE_TRANSPORT", "TCP_TLS")
    assert interface_failure(CPU) == (
        "GLOO_DEVICE_TRANSPORT=TCP_TLS: torch 2.11.0 does not encrypt with it, and torch 2.14.1 does not have it; "
        "unset it, and use a tunnel such as WireGuard"
    )


NAMES = ["lo", "eth0", "eth1", "docker0"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("eth", ["eth0", "eth1"]),
        ("=eth0", ["eth0"]),
        ("=eth", []),
        ("^lo,docker", ["eth0", "eth1"]),
        ("^=lo,docker", ["eth0", "eth1", "docker0"]),
        ("eth1,docker", ["eth1", "docker0"]),
        ("ib", []),
        ("eth0:50000", ["eth0"]),
    ],
)
def test_interfaces_as_nccl_reads_them(value: str, expected: list[str]) -> None:
    assert matching(value, NAMES) == expected


@pytest.mark.parametrize("value", ["eth77", "^lo,docker", "=lo", "lo,eth77"])
def test_an_interface_that_is_not_there(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", value)
    text = str(introduction(CPU, "")["failure"])
    assert text.startswith(f"GLOO_SOCKET_IFNAME={value}: no interface ")
    assert "there are lo" in text
    assert ("(gloo takes whole names, without the ^ and = of NCCL)" in text) == (value[0] in "^=")
    assert text.endswith("; set GLOO_SOCKET_IFNAME to the interface that all machines share, or unset it")
    assert introduction(CPU, "another")["failure"] == "another"
    assert len(text) < 300


def test_interfaces_of_nccl_are_looked_at_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "=nosuch")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert introduction(CPU, "")["failure"] == ""
    text = str(introduction(torch.device("cuda", 0), "")["failure"])
    assert text.startswith("NCCL_SOCKET_IFNAME==nosuch: no such interface")


def named(ranks: object) -> str:
    return f"process {ranks}"


def test_which_processes_can_form_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    here = introduction(CPU, "") | {"size": 2, "hostname": "a"}
    there = here | {"host": ["another", 1], "hostname": "b", "unreachable": ""}
    assert judge([here, here], named) == ""
    assert "would listen at its loopback interface, which other machines cannot reach: GLOO" in judge(
        [here, there], named
    )
    assert judge([there, there], named) == ""
    other = there | {"versions": ["resist 0", "torch 1"]}
    assert judge([there, other], named).startswith("process [1] runs resist 0, torch 1, process [0] resist ")
    assert "WORLD_SIZE=3" in judge([here, here | {"size": 3}], named)
    assert judge([here, here | {"failure": "no data"}], named) == "no data (process [1] on a)"
    assert judge([here, {}], named).startswith("process [1] runs another version")


def test_the_cause_in_messages_of_gloo_and_nccl() -> None:
    gloo = "[/__w/gloo/transport/tcp/pair.cc:311] Connect timeout [none]. This is typically caused by"
    assert reason(RuntimeError(gloo)) == "Connect timeout [none]"
    nccl = "NCCL error in: /x.cpp:1, invalid usage (run with NCCL_DEBUG=WARN for details)\nLast error:\nDuplicate GPU"
    assert reason(RuntimeError(nccl)) == "Duplicate GPU"


def test_the_store_of_a_machine_without_dns_is_served_without_a_note(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def noting(*_: object, **__: object) -> str:
        os.write(2, b"[W1127 16:21:53.810396165 socket.cpp:207] [c10d] The hostname cannot be retrieved. err=-3\n")
        os.write(2, b"something else\n")
        return "the store"

    monkeypatch.setattr("torch.distributed.TCPStore", noting)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert loopback_store(listener) == "the store"
    assert capfd.readouterr().err == "something else\n"
