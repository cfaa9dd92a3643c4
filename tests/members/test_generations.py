"""Generations in real processes: members are killed, stopped and cut off while the others wait for them."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pool import Pool
from resist.errors import NotAMemberError, WorkerLostError
from resist.members.generations import connect_members, regroup
from resist.members.membership import Membership
from resist.members.store_client import SecretStore
from resist.members.store_server import StoreServer
from resist.planning.generations import Generation
from resist.sync.groups import Groups
from resist.sync.local import Local
from resist.sync.process_group import DefaultGroup
from resist.sync.transport import Move, Transport

pytestmark = pytest.mark.slow

HEARTBEAT_S, MISSED = 0.4, 5  # a busy machine may keep a process waiting for a second
BOUND_S = HEARTBEAT_S * MISSED
PATIENT = {"heartbeat_s": 1.0}  # of tests whose losses are noticed without the heartbeat
ABOUT = {"version": "1"}


SECRET = b"a secret of the tests"


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a store that outlives the members."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


@pytest.fixture
def secret_port() -> Iterator[int]:
    """Minus the port of a store that asks for a secret."""
    server = StoreServer("127.0.0.1", 0, SECRET)
    yield -server.port
    server.close()


def client(port: int) -> dist.Store:
    if dist.is_initialized():  # by the pool
        dist.destroy_process_group()
    if port < 0:
        return SecretStore("127.0.0.1", -port, SECRET, 20)
    return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=20))


@dataclass
class Member:
    """A process of a test: its membership, and the transport of its generation."""

    membership: Membership
    store: dist.Store
    generation: Generation
    transport: Transport

    @classmethod
    def join(cls, port: int, processes: int, **options: Any) -> "Member":
        store = client(port)
        options = {"heartbeat_s": HEARTBEAT_S, "missed": MISSED, "timeout_s": 20} | options
        membership = Membership(dist.PrefixStore("run", store), ABOUT, **options)
        membership.join(expected=processes)
        generation, transport = connect_members(membership, dict, lambda g: len(g.members), timeout_s=30)
        return cls(membership, store, generation, transport)

    @property
    def place(self) -> int:
        return self.generation.members.index(self.membership.number)

    def regroup(self, **facts: object) -> None:
        self.generation, self.transport = regroup(
            self.membership, self.transport, facts, lambda g: len(g.members), timeout_s=30
        )

    def mean(self) -> float:
        """The mean of the numbers of the members, by the transport."""
        tensor = torch.tensor([float(self.membership.number)])
        self.transport.mean([tensor], "shared").finish()
        return float(tensor)

    def pause(self, wait: str) -> tuple[float, str]:
        """Wait for the others in some way until one is lost, and regroup. Returns the seconds from the loss on."""
        while self.store.check(["lost at"]) is False:
            time.sleep(0.01)
        lost_at = float(self.store.get("lost at"))
        with pytest.raises(WorkerLostError) as raised:
            waiting(self, wait)
        self.regroup()
        seconds = time.monotonic() - lost_at  # of one machine's clock
        assert self.mean() == sum(self.generation.members) / len(self.generation.members)
        return seconds, str(raised.value)

    def leave(self) -> None:
        self.transport.close()
        self.membership.leave()


def waiting(member: Member, wait: str) -> None:
    """Wait for all members, one of which does not come."""
    place, size = member.place, len(member.generation.members)
    lost = size - 1
    if wait == "mean":
        member.transport.mean([torch.ones(3_000_000)], "shared").finish()
    elif wait == "text":
        member.transport.all_gather_text("x")
    elif wait == "receive":
        moves = [Move("blocks", lost, other, 4 << 20) for other in range(lost)]
        moves[place] = Move("blocks", lost, place, 4 << 20, incoming=torch.empty(1 << 20))
        member.transport.transfer(moves).finish()
    else:
        moves = [Move("blocks", other, lost, 64 << 20) for other in range(lost)]  # more than the sockets hold
        moves[place] = Move("blocks", place, lost, 64 << 20, outgoing=torch.empty(16 << 20))
        member.transport.transfer(moves).finish()


def lose_one(port: int, number: int, wait: str) -> tuple[float, str] | str:
    member = Member.join(port, 3, **(PATIENT if number == signal.SIGKILL else {}))
    assert member.mean() == 2
    if member.place < 2:
        result = member.pause(wait)
        if number == signal.SIGSTOP and member.place == 0:
            os.kill(int(member.store.get("lost")), signal.SIGCONT)
        member.leave()
        return result
    member.store.set("lost", str(os.getpid()))
    member.store.set("lost at", str(time.monotonic()))
    os.kill(os.getpid(), number)
    with pytest.raises(WorkerLostError):
        waiting(member, "text")
    with pytest.raises(NotAMemberError) as raised:
        member.regroup()
    member.membership.leave()
    return str(raised.value)


WAITS = ["mean", *(pytest.param(wait, marks=pytest.mark.nightly) for wait in ("text", "receive", "send"))]


@pytest.mark.parametrize("wait", WAITS)
def test_survivors_go_on_after_a_kill(pool: Pool, port: int, wait: str) -> None:
    outcomes = pool.outcomes(3, lose_one, port, int(signal.SIGKILL), wait, timeout_s=60)
    assert [outcome.error for outcome in outcomes].count("") == 1, outcomes
    for outcome in outcomes:
        if outcome.error is None:
            seconds, text = outcome.value
            assert seconds < 5, text  # under 1 s on a quiet machine
            assert "lost contact while" in text


@pytest.mark.parametrize("wait", WAITS)
def test_survivors_go_on_after_a_stop_and_who_wakes_leaves(pool: Pool, port: int, wait: str) -> None:
    outcomes = pool.outcomes(3, lose_one, port, int(signal.SIGSTOP), wait, timeout_s=60)
    assert all(outcome.error is None for outcome in outcomes), outcomes
    values = [outcome.value for outcome in outcomes]
    assert [value for value in values if isinstance(value, str)] == [
        "the others have gone on without this process (generation 1): it was silent for more than 2 s, or did not come "
        "to agree in time; start it again to come back"
    ]
    for seconds, text in (value for value in values if isinstance(value, tuple)):
        assert BOUND_S - HEARTBEAT_S < seconds < BOUND_S + 5, text
        # The first one to notice asks the other for a new generation, and closes the connection.
        known = ("no sign of life for 2 s, or has left", "another member has lost contact", "the connection has ended")
        assert any(cause in text for cause in known), text


def kill_self(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def lose_two(port: int, point: str) -> tuple[tuple[int, ...], int, float]:
    """One member is killed in a round, and another one at a point of the agreement that follows."""
    member = Member.join(port, 4, **PATIENT)
    if member.place == 3:
        kill_self()
    if member.place == 2:
        if point == "before it arrives":
            member.membership.regroup = kill_self
        elif point == "before it is ready":
            member.membership.meet = kill_self
        elif point == "before it connects":
            DefaultGroup.found = kill_self
        else:
            Groups.open = kill_self
    with pytest.raises(WorkerLostError):
        member.mean()
    start = time.monotonic()
    member.regroup(place=member.place)
    seconds = time.monotonic() - start
    assert [fact["place"] for fact in member.generation.facts] == [0, 1]
    assert member.mean() == sum(member.generation.members) / 2
    result = member.generation.members, member.generation.number, seconds
    member.leave()
    return result


@pytest.mark.parametrize(
    "point", ["before it arrives", "before it is ready", "before it connects", "while it connects"]
)
def test_a_loss_while_the_others_agree(pool: Pool, port: int, point: str) -> None:
    outcomes = pool.outcomes(4, lose_two, port, point, timeout_s=60)
    values = [outcome.value for outcome in outcomes if outcome.error is None]
    assert [outcome.error for outcome in outcomes].count("") == 2, outcomes
    assert values[0][:2] == values[1][:2]
    # One more where gloo fails to connect the two at first, which it rarely does.
    assert values[0][1] in ((1, 2) if point == "before it arrives" else (2, 3))
    assert all(seconds < 12 for _, _, seconds in values)


def come_and_go(port: int) -> list[tuple[int, ...]]:
    """Two found a run, a third one comes, one leaves, and the rest goes on; a last one trains alone."""
    if int(dist.get_rank()) == 2:
        store = client(port)
        store.get("founded")
        member = Member.join(port, 1)
    else:
        member = Member.join(port, 2)
        member.store.set("founded", "")
        while not member.membership.newcomers():
            time.sleep(0.02)
        member.regroup()
    seen = [member.generation.members]
    assert member.mean() == 2
    member.transport.all_gather_text("all are done with it")
    if member.membership.number == 1:
        member.leave()
        return seen
    member.regroup()
    seen.append(member.generation.members)
    assert member.mean() == 2.5
    member.transport.all_gather_text("all are done with it")
    if member.membership.number == 2:
        member.leave()
        return seen
    member.regroup()
    assert isinstance(member.transport, Local)
    member.leave()
    return [*seen, member.generation.members]


@pytest.mark.parametrize("store", ["port", "secret_port"])
def test_members_come_and_go(pool: Pool, request: pytest.FixtureRequest, store: str) -> None:
    results = pool.run(3, come_and_go, request.getfixturevalue(store), timeout_s=60)
    assert sorted(results) == [[(1, 2, 3)], [(1, 2, 3), (2, 3)], [(1, 2, 3), (2, 3), (3,)]]


def lose_the_store(port: int, where: str) -> str:
    """All wait for a member that only computes, and the store ends."""
    member = Member.join(port, 2)
    Path(where, str(member.place)).touch()
    if member.place == 1:
        time.sleep(BOUND_S + 1)
    # The other one may have noticed it first, and closed the connection.
    with pytest.raises(WorkerLostError, match=r"the store at which the members agree cannot be reached|has ended$"):
        member.transport.all_gather_text("x")
    with pytest.raises(NotAMemberError) as raised:
        member.regroup()
    member.membership.leave()
    return str(raised.value)


def test_nobody_goes_on_without_the_store(pool: Pool, tmp_path: Path) -> None:
    script = "import sys, time, torch.distributed as d; s = d.TCPStore('127.0.0.1', 0, is_master=True, "
    script += "wait_for_workers=False); print(s.port, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())

        def end() -> None:
            while len(list(tmp_path.iterdir())) < 2:
                time.sleep(0.05)
            server.kill()

        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        texts = pool.run(2, lose_the_store, port, str(tmp_path), timeout_s=60)
    for text in texts:
        assert re.match(r"the store at which the members agree cannot be reached \(\w.*\), and nobody goes on", text)


def found_two_generations() -> bool:
    """Make the groups of two generations of this process alone, and compare the exception hook with that of before."""
    if dist.is_initialized():  # by the pool
        dist.destroy_process_group()
    before = sys.excepthook
    for number in range(2):
        DefaultGroup.found(dist.PrefixStore(str(number), dist.HashStore()), 0, 1, 20.0)
        dist.destroy_process_group()
    return sys.excepthook is before


def test_an_exception_does_not_show_the_ranks_of_former_generations(pool: Pool) -> None:
    assert pool.run(1, found_two_generations) == [True]
