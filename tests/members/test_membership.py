"""Members agree at a store: who is taken in, who goes on, and who does not. Threads in the role of processes."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from resist.errors import NotAMemberError, UserError, WorkerLostError
from resist.members import membership as module
from resist.members.membership import Membership
from resist.members.watch import BEAT, GENERATION, TICKET, TICKETS
from resist.planning.generations import Generation

HEARTBEAT_S, MISSED = 0.2, 100  # a busy machine may keep a process waiting for seconds
SOON = 20  # in place of MISSED where a test waits for a silence
ABOUT = {"version of resist": "0.1.0", "configuration": "a1", "data": "d1"}


@pytest.fixture
def server() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


class Members:
    """Memberships of one run in this process. Those that are left over leave at the end."""

    def __init__(self, port: int) -> None:
        self.port, self.all = port, list[Membership]()
        self.pool = ThreadPoolExecutor(16)

    def new(
        self, about: Mapping[str, str] = ABOUT, *, timeout_s: float = 20.0, through: Callable[[Any], Any] = lambda s: s,
        **options: Any,
    ) -> Membership:  # fmt: skip
        client = dist.TCPStore("127.0.0.1", self.port, is_master=False, wait_for_workers=False)
        client.set_timeout(timedelta(seconds=10))
        store = through(dist.PrefixStore("run", client))
        options = {"heartbeat_s": HEARTBEAT_S, "missed": MISSED, **options}
        self.all.append(Membership(store, about, timeout_s=timeout_s, **options))
        return self.all[-1]

    def founded(self, count: int, **options: Any) -> list[Membership]:
        """Members of a first generation, in its order."""
        members = [self.new(**options) for _ in range(count)]
        self.together(*(lambda i=i, m=m: m.join({"i": i}, expected=count) for i, m in enumerate(members)))
        return sorted(members, key=lambda member: member.number)

    def together(self, *actions: Callable[[], Any]) -> list[Any]:
        """The results of actions that wait for each other; an exception is a result, too."""

        def result(action: Callable[[], Any]) -> Any:
            try:
                return action()
            except (UserError, WorkerLostError) as error:
                return error

        return list(self.pool.map(result, actions))

    def regroup(self, *members: Membership) -> list[Generation]:
        return self.together(*(lambda m=m: m.regroup({"was": m.number}) for m in members))

    def silence(self, member: Membership) -> None:
        """Let a member show no life any more, as if it was stopped: its port stays open."""
        member.watch.close()

    def die(self, member: Membership) -> None:
        """Let a member end, as if it was killed: its port is closed."""
        member.watch.close()
        member._door.close()

    def close(self) -> None:
        for member in self.all:
            member.leave()
        self.pool.shutdown()


@pytest.fixture
def members(server: dist.TCPStore) -> Iterator[Members]:
    found = Members(server.port)
    yield found
    found.close()


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_is_founded_by_those_that_are_expected(members: Members) -> None:
    three = members.founded(3)
    assert [member.number for member in three] == [1, 2, 3]
    first = three[0].generation
    assert first is not None
    assert (first.number, first.members, first.about) == (0, (1, 2, 3), ABOUT)
    assert sorted(fact["i"] for fact in first.facts) == [0, 1, 2]
    assert all(member.generation == first for member in three)
    assert all(member.lost() == () == member.newcomers() for member in three)


def test_fewer_found_it_when_the_patience_is_over(members: Members) -> None:
    a, b = members.new(), members.new()
    results = members.together(*(lambda m=m: m.join(expected=3, patience_s=0.5) for m in (a, b)))
    assert [result.members for result in results] == [(1, 2)] * 2


def test_too_few_do_not_found_a_run(members: Members) -> None:
    with pytest.raises(UserError, match=r"1 of at least `least=2` processes have come within 0.3 s; check that the"):
        members.new(least=2).join(patience_s=0.3)


def test_a_killed_member_is_noticed_at_once(members: Members) -> None:
    a, b, c = members.founded(3, heartbeat_s=5.0)
    until(lambda: all(3 in member._door._known for member in (a, b)))
    members.die(c)
    start = time.monotonic()
    first, second = members.regroup(a, b)
    assert first == second
    assert (first.number, first.members, first.departed) == (1, (1, 2), (3,))
    assert [fact["was"] for fact in first.facts] == [1, 2]
    assert time.monotonic() - start < 5  # without it: 25 s


def test_a_silent_member_is_lost_and_leaves_when_it_wakes(members: Members) -> None:
    a, b, c = members.founded(3, missed=SOON)
    members.silence(c)
    until(lambda: a.lost() == b.lost() == (3,))
    assert "member 3 (host " in a.watch.trouble
    assert f"no sign of life for {HEARTBEAT_S * SOON:g} s" in a.watch.trouble
    assert [generation.members for generation in members.regroup(a, b)] == [(1, 2)] * 2
    assert a.watch.trouble == ""
    (error,) = members.regroup(c)
    assert isinstance(error, NotAMemberError)
    assert str(error).startswith("the others have gone on without this process (generation 1): it was silent for")
    assert (a.lost(), a.newcomers()) == ((), ())  # nor is it a newcomer, whatever it shows


def test_a_member_that_was_only_late_is_shown_the_door_by_its_watch(members: Members) -> None:
    """It computes for long, and shows life: the others wait for it as long as `timeout_s`, and go on."""
    a, b, c = members.founded(3, timeout_s=0.5)
    assert [generation.members for generation in members.regroup(a, b)] == [(1, 2)] * 2
    until(lambda: c.watch.trouble.startswith("the others have gone on without this process (generation 1)"))
    with pytest.raises(NotAMemberError, match="gone on without"):
        c.newcomers()


def test_a_call_for_a_new_generation_ends_what_another_member_waits_in(members: Members) -> None:
    a, b = members.founded(2)
    reasons: list[str] = []
    b.watch.attach(reasons.append)
    waiting = members.pool.submit(a.regroup)
    until(lambda: reasons)
    assert reasons == ["another member has lost contact, and wants a new generation"]
    late: list[str] = []
    b.watch.attach(late.append)
    assert late == reasons  # what begins now does not end, either
    assert b.regroup().members == waiting.result().members == (1, 2)
    b.watch.detach(late.append)


def test_a_member_that_leaves_is_not_waited_for(members: Members) -> None:
    a, b, c = members.founded(3, missed=10_000, timeout_s=1000)
    c.leave()
    assert [generation.members for generation in members.regroup(a, b)] == [(1, 2)] * 2


def test_two_losses_one_after_the_other(members: Members) -> None:
    a, b, c, d = members.founded(4, missed=SOON)
    members.silence(d)
    waiting = members.pool.submit(members.regroup, a)
    members.silence(c)  # while another one agrees already
    (second,) = members.regroup(b)
    assert second.members == waiting.result()[0].members == (1, 2)
    members.silence(b)
    until(lambda: a.lost() == (2,))
    assert [g.members for g in members.regroup(a)] == [(1,)]
    assert a.generation.departed == (2, 3, 4)


def test_a_loss_after_the_agreement_leads_to_the_next_generation(members: Members) -> None:
    a, b, c = members.founded(3)
    until(lambda: all(3 in member._door._known for member in (a, b)))
    assert [generation.members for generation in members.regroup(a, b, c)] == [(1, 2, 3)] * 3
    members.die(c)
    errors = members.together(a.meet, b.meet)
    assert all(type(error) is WorkerLostError for error in errors)
    assert "member 3 (host " in str(errors[0])
    generations = members.regroup(a, b)
    assert [(g.number, g.members) for g in generations] == [(2, (1, 2))] * 2
    assert members.together(a.meet, b.meet) == [None, None]


def test_too_few_are_left_and_all_end_with_the_same_line(members: Members) -> None:
    a, b, c = members.founded(3, least=3)
    c.leave()
    errors = members.regroup(a, b)
    assert all(isinstance(error, NotAMemberError) for error in errors)
    assert {str(error) for error in errors} == {
        "2 members are left, fewer than `least=3`; start more processes, and go on from the last checkpoint"
    }
    with pytest.raises(UserError, match="the run has ended: 2 members are left"):
        members.new().join()


def test_a_newcomer_is_taken_in_and_others_wait_outside(members: Members) -> None:
    a, b = members.founded(2, most=3)
    new, late = members.new(most=3), members.new(most=3, timeout_s=2.0)
    joining = members.pool.submit(new.join, {"name": "new"})
    until(lambda: a.newcomers() == (3,))
    outside = members.pool.submit(members.together, late.join)
    until(lambda: 4 in a.watch.present())
    assert a.newcomers() == (3,)  # one more, of two
    generations = [*members.regroup(a, b), joining.result()]
    assert {g.members for g in generations} == {(1, 2, 3)}
    assert generations[0].facts == ({"was": 1}, {"was": 2}, {"name": "new"})
    assert members.together(a.meet, b.meet, new.meet) == [None] * 3
    assert a.newcomers() == ()
    (error,) = outside.result()
    assert str(error) == (
        "not taken in within 2 s: the run has members 1, 2, 3, of at most 3, and takes others in between two rounds; "
        "start this process again when one is missing"
    )


def test_a_place_that_becomes_free_is_filled(members: Members) -> None:
    a, b = members.founded(2, most=2)
    new = members.new(most=2)
    joining = members.pool.submit(new.join)
    until(lambda: 3 in a.watch.present())
    assert a.newcomers() == ()
    b.leave()
    assert members.regroup(a)[0].members == joining.result().members == (1, 3)


@pytest.mark.parametrize("name", ABOUT)
def test_who_differs_from_the_run_is_refused(members: Members, name: str) -> None:
    (a,) = members.founded(1)
    with pytest.raises(UserError) as raised:
        members.new(ABOUT | {name: "other" * 20}).join()
    value = "other" * 20
    assert str(raised.value) == (
        f"this process cannot join the run: {name} is {value[:57]}... here and {ABOUT[name]} in the run; start it with "
        "what the run has"
    )
    assert a.newcomers() == ()


def test_who_differs_from_the_first_is_refused_at_the_foundation(members: Members) -> None:
    a, b, c = members.new(), members.new(ABOUT | {"data": "d2"}), members.new()
    first = members.pool.submit(a.join, expected=2)
    until(lambda: a.number == 1)
    with pytest.raises(UserError, match="data is d2 here and d1 in the run"):
        b.join(expected=2)
    assert c.join(expected=2).members == first.result().members == (1, 3)


def test_the_end_of_a_run_is_said_to_those_that_come_later(members: Members) -> None:
    (a,) = members.founded(1)
    a.end("all 10 epochs are trained")
    with pytest.raises(UserError, match="the run has ended: all 10 epochs are trained"):
        members.new().join()


def test_a_text_is_published_to_those_that_have_not_joined(members: Members) -> None:
    (a,) = members.founded(1)
    other = members.new()
    assert other.published("place") == ""
    a.publish("place", "here")
    a.publish("place", "there")
    until(lambda: other.published("place") == "there")  # the store does not confirm what is written


def test_a_run_whose_members_have_all_died_takes_nobody_in(members: Members) -> None:
    (a,) = members.founded(1)
    members.die(a)
    with pytest.raises(UserError, match=r"none of its members \(1\) shows life any more; start it again from its last"):
        members.new(missed=SOON).join()


class Cut:
    """A store that can be cut off: its calls then wait for an answer that does not come."""

    def __init__(self, store: Any, silent: threading.Event) -> None:
        self._store, self._silent = store, silent

    def __getattr__(self, name: str) -> Any:
        if self._silent.is_set() and name not in ("host", "port", "underlying_store"):
            time.sleep(3)
            raise RuntimeError("cut off")
        return getattr(self._store, name)

    def clone(self) -> "Cut":
        return Cut(self._store.clone(), self._silent)


def test_who_does_not_reach_the_store_does_not_go_on(members: Members) -> None:
    """Two halves of a network: one has the store."""
    silent = threading.Event()
    a, b = members.new(missed=SOON), members.new(missed=SOON)
    c, d = (members.new(missed=SOON, through=lambda store: Cut(store, silent)) for _ in range(2))
    founding = [members.pool.submit(m.join, expected=4) for m in (a, b, c, d)]
    assert [len(future.result().members) for future in founding] == [4] * 4
    silent.set()
    errors = members.regroup(c, d)
    assert all(isinstance(error, NotAMemberError) for error in errors)
    for error in errors:
        assert str(error).startswith("the store at which the members agree cannot be reached (")
        assert "(cut off), and nobody goes on" in str(error) or "(no answer within 4 s), and nobody" in str(error)
    expected = tuple(sorted((a.number, b.number)))
    assert [g.members for g in members.regroup(a, b)] == [expected] * 2


def test_one_of_two_proposals_wins(members: Members, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both members have seen enough, and write at the same time."""
    a, b = members.founded(2)
    barrier = threading.Barrier(2, timeout=10)
    write = Membership._write

    def both(self: Membership, generation: Generation) -> None:
        barrier.wait()
        write(self, Generation(**{**generation.__dict__, "about": {"by": str(self.number)}}))

    monkeypatch.setattr(Membership, "_write", both)
    monkeypatch.setattr(module, "POLL_S", 0.2)
    first, second = members.regroup(a, b)
    assert first == second
    assert first.about["by"] in ("1", "2")


@pytest.mark.parametrize("options", [{"heartbeat_s": 0}, {"missed": 1}, {"least": 0}, {"least": 3, "most": 2}], ids=str)
def test_bounds(members: Members, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"must be"):
        members.new(**options)


@pytest.mark.parametrize("text", ["", "{}", "[1]", "nonsense", '{"number": 1, "members": 3}'])
def test_what_another_version_has_written_ends_a_member_in_one_line(members: Members, text: str) -> None:
    a, b = members.founded(2)
    reasons: list[str] = []
    b.watch.attach(reasons.append)
    a.store.set(f"{GENERATION}1", text)
    (error,) = members.regroup(a)
    assert isinstance(error, NotAMemberError)
    assert str(error).startswith("the store holds an entry that this version cannot read (")
    assert str(error).count("\n") == 0
    until(lambda: reasons)
    assert reasons[0].startswith("the store holds an entry that this version cannot read (")


def test_a_ticket_of_another_version_is_refused(members: Members) -> None:
    (a,) = members.founded(1)
    a.store.set(f"{TICKET}{a.store.add(TICKETS, 1)}", "nonsense")
    a.store.set(f"{BEAT}2", "1")
    until(lambda: 2 in a.watch.tickets)
    assert a.newcomers() == ()
    assert a.watch.trouble == ""
