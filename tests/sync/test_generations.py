"""Generations in real processes: members are killed, stopped and cut off while the others wait for them."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pool import Pool
from resist.errors import NotAMemberError, WorkerLostError
from resist.planning.members import Generation
from resist.sync.generations import connect_members, regroup
from resist.sync.membership import Membership
from resist.sync.transport import Move, Transport

pytestmark = pytest.mark.slow

HEARTBEAT_S, MISSED = 0.2, 5
BOUND_S = HEARTBEAT_S * MISSED
ABOUT = {"version": "1"}


@pytest.fixture
def port() -> Iterator[int]:
    """The port of a store that outlives the members."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def client(port: int) -> dist.Store:
    if dist.is_initialized():  # by the pool
        dist.destroy_process_group()
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
        membership = Membership(
            dist.PrefixStore("run", store), ABOUT, heartbeat_s=HEARTBEAT_S, missed=MISSED, timeout_s=20, **options
        )
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
    member = Member.join(port, 3)
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


@pytest.mark.parametrize("wait", ["mean", "text", "receive", "send"])
def test_survivors_go_on_after_a_kill(pool: Pool, port: int, wait: str) -> None:
    outcomes = pool.outcomes(3, lose_one, port, int(signal.SIGKILL), wait, timeout_s=60)
    assert [outcome.error for outcome in outcomes].count("") == 1, outcomes
    for outcome in outcomes:
        if outcome.error is None:
            seconds, text = outcome.value
            assert seconds < 5, text  # under 1 s on a quiet machine
            assert "lost contact while" in text


@pytest.mark.parametrize("wait", ["mean", "text", "receive", "send"])
def test_survivors_go_on_after_a_stop_and_who_wakes_leaves(pool: Pool, port: int, wait: str) -> None:
    outcomes = pool.outcomes(3, lose_one, port, int(signal.SIGSTOP), wait, timeout_s=60)
    values = [outcome.value for outcome in outcomes]
    assert [value for value in values if isinstance(value, str)] == [
        "the others have gone on without this process (generation 1): it was silent for more than 1 s, or did not come "
        "to agree in time; start it again to come back"
    ]
    for seconds, text in (value for value in values if isinstance(value, tuple)):
        assert BOUND_S - HEARTBEAT_S < seconds < BOUND_S + 5, text
        assert "no sign of life for 1 s, or has left" in text
