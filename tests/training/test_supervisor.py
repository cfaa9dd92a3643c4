"""The supervisor of an elastic run, with processes that only have an exit status."""

from pathlib import Path

import pytest

from resist.training import supervisor
from resist.training.supervisor import DONE, Supervised


class Ended:
    """A process that has ended."""

    pid = 0

    def __init__(self, status: int) -> None:
        self.status = status

    def poll(self) -> int | None:
        return self.status

    def wait(self) -> int:
        return self.status

    def send_signal(self, sig: int) -> None:
        pass

    def kill(self) -> None:
        pass


class Running(Ended):
    """A process that runs until a signal comes."""

    def __init__(self) -> None:
        super().__init__(0)
        self.signaled = False

    def poll(self) -> int | None:
        return 75 if self.signaled else None

    def send_signal(self, sig: int) -> None:
        self.signaled = True


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLL_S", 0.0)


def group(status: int, *, how: str | None = None, rounds: int = 1, serves: bool = True) -> tuple[Supervised, list[int]]:
    """One process that runs, and one that ends with a status again and again; how often it was started again."""
    started: list[int] = []

    def start(number: int) -> Ended:
        started.append(number)
        return Ended(status)

    made = Supervised(start, lambda: rounds, lambda: how, lambda: serves, timeout_s=1.0, out=Path("nowhere"))
    made.children = {0: Running(), 1: Ended(status)}
    return made, started


def test_it_gives_up_where_processes_end_again_and_again(capsys: pytest.CaptureFixture[str]) -> None:
    made, started = group(70)
    assert (made.watch(), len(started)) == (70, 2 * 2 + 3)
    assert "processes have ended 8 times without a completed round; none is started again" in capsys.readouterr().err


def test_completed_rounds_give_further_attempts() -> None:
    made, started = group(70)
    numbers = iter([*range(1, 30), *[30] * 100])
    made.rounds = lambda: next(numbers)
    assert (made.watch(), len(started)) == (70, 29 + 2 * 2 + 3)


def test_a_process_that_cannot_take_part_is_given_up_alone() -> None:
    made, started = group(2)
    made.children[0] = Last()
    assert (made.watch(), len(started)) == (1, 2)


class Last(Running):
    """A process that runs for some looks."""

    looks = 0

    def poll(self) -> int | None:
        self.looks += 1
        return 1 if self.looks > 100 else None


def test_before_the_first_round_an_invalid_option_ends_all() -> None:
    made, started = group(2, rounds=0)
    assert (made.watch(), started) == (2, [])


def test_nothing_is_started_again_when_the_run_or_its_store_has_ended(capsys: pytest.CaptureFixture[str]) -> None:
    for made, started in (group(-9, how=DONE), group(-9, how="1 member is left"), group(-9, serves=False)):
        made.children[0] = Ended(0 if made.how() == DONE else 1)
        assert (made.watch(), started) == (0 if made.how() == DONE else 1, [])
    assert capsys.readouterr().err.count("process 1: ended by SIGKILL") == 3
