"""When a run began, for its wall clock."""

import subprocess
import sys
import time

import pytest

from resist.training import wall


@pytest.fixture(autouse=True)
def no_run_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wall, "_begun", False)
    monkeypatch.setenv(wall.BEGAN, "")
    monkeypatch.delenv("RANK", raising=False)


def test_the_first_run_began_with_the_process_and_the_next_one_now() -> None:
    before = time.monotonic()
    wall.begin_run()
    assert wall.run_began() < before - 0.5  # torch has been imported since
    wall.begin_run()
    noted = wall.run_began()
    assert before <= noted <= time.monotonic()
    wall.end_run()
    assert wall.run_began() > noted


@pytest.mark.parametrize("set_to", ["", "soon", "1e30"])
def test_without_a_usable_note_the_run_begins_now(monkeypatch: pytest.MonkeyPatch, set_to: str) -> None:
    monkeypatch.setenv(wall.BEGAN, set_to)
    before = time.monotonic()
    assert before <= wall.run_began() <= time.monotonic()
    monkeypatch.setenv("RANK", "1")  # as torchrun does
    assert wall.run_began() < before - 0.5 or set_to == "1e30"


def test_a_process_knows_when_it_began() -> None:
    code = "import time; time.sleep(0.3); from resist.training import wall; "
    code += "print(time.monotonic() - wall.process_began())"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    passed = time.monotonic() - start
    assert (0.25 if sys.platform == "linux" else 0) < float(done.stdout) < passed + 0.1
