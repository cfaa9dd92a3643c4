"""`resist rendezvous` as a process: it serves those that know the secret, until a signal comes."""

import re
import signal
import time
from pathlib import Path

import pytest

from commands import Command, Commands
from resist.errors import UserError
from resist.members.store_client import SecretStore

SECRET = "a secret of the tests"


def port_of(running: Command) -> int:
    end = time.monotonic() + 30
    while not running.output.exists() or not (found := re.search(r":(\d+);", running.output.read_text())):
        assert time.monotonic() < end
        time.sleep(0.05)
    return int(found[1])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_comes(commands: Commands, tmp_path: Path, number: int) -> None:
    (tmp_path / "secret").write_text(SECRET + "\n")
    running = commands.start("rendezvous", "--bind", "127.0.0.1", "--port", "0", "--secret-file", tmp_path / "secret")
    port = port_of(running)
    first, second = (SecretStore("127.0.0.1", port, SECRET.encode(), 10) for _ in range(2))
    first.set("key", "value")
    assert second.get("key") == b"value"
    with pytest.raises(UserError, match="has another secret"):
        SecretStore("127.0.0.1", port, b"another secret of the tests", 10)
    running.send_signal(number)
    out, err = running.communicate()
    assert running.returncode == 0
    assert out == f"resist: rendezvous at 127.0.0.1:{port}; runs end when this process ends\n"
    assert err == "resist: refused a connection from 127.0.0.1: another secret (1 refused so far)\n"
    for store in (first, second):
        store.close()


@pytest.mark.slow
def test_a_secret_of_the_environment_and_a_port_in_use(commands: Commands) -> None:
    environment = {"RESIST_SECRET": SECRET}
    running = commands.start("rendezvous", "--bind", "127.0.0.1", "--port", "0", env=environment)
    port = port_of(running)
    second = commands.run("rendezvous", "--bind", "127.0.0.1", "--port", port, env=environment)
    assert (second.returncode, second.stdout, second.stderr.count("\n")) == (2, "", 1)
    assert second.stderr.startswith(f"resist: cannot listen at 127.0.0.1, port {port}: Address already in use; give an")
