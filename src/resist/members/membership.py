"""Membership: which processes go on together when some are lost and others come.

The members agree at a store that outlives them. Each generation has one entry there, written by compare-and-set: so
there is exactly one list of members for each number, and a process that does not reach the store is in none. Two halves
of a network that cannot reach each other never both go on.

    membership = Membership(store, about={"version": ..., "configuration": ..., "data": ...})
    generation = membership.join()              # waits until it is taken in
    ...                                         # WorkerLostError, or membership.newcomers() at a round's end
    generation = membership.regroup(facts)      # in every member

A process is lost when its heartbeat at the store has stopped (`resist.members.watch`), when its port is closed
(`resist.members.door`), or when it leaves. Losses while the members agree, and after it, lead to the generation after
the next one: see `resist.members.generations`.
"""

import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from resist.errors import LeftBehindError, NotAMemberError, RunEndedError, UserError, WorkerLostError
from resist.members.door import Door, own_address
from resist.members.store_client import close_clone
from resist.members.watch import (
    ARRIVAL,
    BEAT,
    CALL,
    GENERATION,
    TICKET,
    TICKETS,
    Watch,
    left_behind,
    unreachable,
    unreadable,
)
from resist.planning.generations import Bounds, Generation, difference, first_members, next_members, too_few
from resist.sync.meeting import within
from resist.sync.rendezvous import parsed

T = TypeVar("T")
# Keys in the store: a generation not much older than the latest one; how the run has ended; the members that are
# about to connect, and those that are done; texts that are published.
LATEST, ENDED, READY, DONE, TEXT = "latest", "ended", "ready/", "done/", "text/"
POLL_S = 0.05  # seconds between two looks of a process that agrees
PATIENT_POLL_S = 0.2  # the same of one that waits to be taken in


class Membership:
    """This process among those that take part in a run.

    Args:
        store: A store of torch.distributed that all processes of the run share, and no other run: a PrefixStore with
            the run's name. It has to outlive every member.
        about: What all members must have in common, name -> value: versions, digests of configuration and data.
        heartbeat_s: Seconds between two heartbeats.
        missed: Heartbeats after which a silent process is lost.
        least: With fewer members nobody goes on.
        most: More members are not taken in. Default: no bound.
        timeout_s: Seconds that a process waits to be taken in, and members for one that lives and does not come.

    Attributes:
        store: The store.
        number: The number of this process, which no other one ever gets; 0 before `join`.
        generation: The one that this process is a member of.
        watch: Looks at the other members.

    Raises:
        UserError: A bound is invalid.
    """

    def __init__(
        self, store: Any, about: Mapping[str, str], *, heartbeat_s: float = 2.0, missed: int = 5, least: int = 1,
        most: int | None = None, timeout_s: float = 600.0,
    ) -> None:  # fmt: skip
        if not (heartbeat_s > 0 and missed >= 2):
            raise UserError(f"`heartbeat_s={heartbeat_s:g}` and `missed={missed}` must be more than 0 and at least 2")
        if least < 1 or (most is not None and most < least):
            raise UserError(f"`least={least}` must be at least 1, and `most={most}` not smaller")
        self.store, self.number, self.generation = store, 0, None
        self._about, self._bounds, self._timeout_s = dict(about), Bounds(least, most), timeout_s
        self._calls = store.clone()  # those of this object, which may wait; the groups use `store`
        self._door = Door(own_address(store))
        self.watch = Watch(store.clone(), self._door, heartbeat_s, missed)

    generation: Generation | None

    def founded(self) -> bool:
        """Return True where the run has members already, which this process can only join."""
        return self._latest() is not None

    def publish(self, name: str, text: str) -> None:
        """Show a text to all processes that reach the store, also to those that have not joined.

        Args:
            name: Its name. An earlier text of this name is replaced.
            text: The text.

        Raises:
            NotAMemberError: The store cannot be reached.
        """
        self._call(lambda store: store.set(f"{TEXT}{name}", text))

    def published(self, name: str) -> str:
        """Return the latest text of a name that a process has published, or "".

        Args:
            name: Its name.

        Raises:
            NotAMemberError: The store cannot be reached.
        """
        key = f"{TEXT}{name}"
        return self._call(lambda store: store.get(key).decode() if store.check([key]) else "")

    def join(
        self, facts: Mapping[str, Any] | None = None, *, expected: int | None = None, patience_s: float = 60.0
    ) -> Generation:
        """Become a member. Waits until the others take this process in.

        Args:
            facts: What the others have to know of it: JSON data.
            expected: The number of processes that found the run together. Default: `least`.
            patience_s: Seconds after which fewer of them found it, if they are at least `least`.

        Returns:
            The generation that it is a member of.

        Raises:
            RunEndedError: The run has ended.
            UserError: It differs from the run, or it was not taken in in time.
            NotAMemberError: The store cannot be reached.
        """
        expected = max(expected or 0, self._bounds.least)
        if self._call(lambda store: store.check([ENDED])):
            raise RunEndedError(f"the run has ended: {self._call(lambda store: store.get(ENDED)).decode()}")
        ticket = {"about": self._about, "facts": dict(facts or {}), "hostname": socket.gethostname()}
        self.number = self._call(lambda store: store.add(TICKETS, 1))
        self._call(lambda store: store.set(f"{BEAT}{self.number}", ""))
        self._call(lambda store: store.set(f"{TICKET}{self.number}", json.dumps(ticket | {"door": self._door.entry})))
        self.watch.start(self.number)
        try:
            return self._adopt(self._wait_to_be_taken_in(expected, patience_s))
        except BaseException:
            self.leave()
            raise

    def _wait_to_be_taken_in(self, expected: int, patience_s: float) -> Generation:
        start, latest = time.monotonic(), None
        while (waited := time.monotonic() - start) < self._timeout_s:
            self.watch.check()
            latest = self._latest()
            if latest is not None:
                self._check_can_join(latest)
                if self.number in latest.members:
                    return latest
            else:
                self._found(expected, waited, patience_s)
            time.sleep(PATIENT_POLL_S if latest is not None else POLL_S)
        members = "no members" if latest is None else f"members {', '.join(map(str, latest.members))}"
        bound = "" if self._bounds.most is None else f", of at most {self._bounds.most}"
        raise UserError(
            f"not taken in within {self._timeout_s:g} s: the run has {members}{bound}, and takes others in between two "
            "rounds; start this process again when one is missing"
        )

    def _check_can_join(self, latest: Generation) -> None:
        if different := difference(latest.about, self._about):
            raise UserError(f"this process cannot join the run: {different}; start it with what the run has")
        if latest.failure:
            raise RunEndedError(f"the run has ended: {latest.failure}")
        if latest.members and set(latest.members) <= self.watch.lost():
            raise RunEndedError(
                f"the run has ended: none of its members ({', '.join(map(str, latest.members))}) shows life any more; "
                "start it again from its last checkpoint, under another name"
            )

    def _found(self, expected: int, waited_s: float, patience_s: float) -> None:
        """Write the first generation if all have come who are waited for."""
        present = self.watch.present()
        if self.number not in present:  # before the first look
            return
        tickets, patient = self.watch.tickets, waited_s < patience_s
        about = tickets[present[0]].get("about", {})  # of the first one that has come
        if different := difference(about, self._about):
            raise UserError(f"this process cannot join the run: {different}; start it with what the run has")
        alike = [number for number in present if not difference(about, tickets[number].get("about", {}))]
        members = first_members(alike, expected, self._bounds, patient=patient)
        if members is not None:
            self._write(Generation(0, members, tuple(_facts(tickets[number]) for number in members), about))
        elif not patient:
            raise UserError(
                f"{len(alike)} of at least `least={self._bounds.least}` processes have come within {patience_s:g} s; "
                "check that the others were started, with the same store and name of the run"
            )

    def lost(self) -> tuple[int, ...]:
        """Return the members that have left or shown no life for too long, ascending. Asks nobody."""
        members = () if self.generation is None else self.generation.members
        return tuple(sorted(self.watch.lost() & set(members)))

    def newcomers(self) -> tuple[int, ...]:
        """Return the processes that wait and would be taken in by `regroup`, in their order.

        Members may see different ones, and each of them sees a new one some looks late. So one of them looks, and the
        others are sent what it saw.

        Raises:
            NotAMemberError: The others have gone on without this process, or it does not reach the store.
        """
        self.watch.check()
        generation = self._member_of()
        room = None if self._bounds.most is None else max(0, self._bounds.most - len(generation.members))
        return tuple(number for number in self._acceptable(generation)[:room] if self.watch.known(number))

    def _acceptable(self, generation: Generation) -> list[int]:
        tickets = self.watch.tickets
        return [
            number
            for number in self.watch.present()
            if number not in generation.members and not difference(generation.about, tickets[number].get("about", {}))
        ]

    def regroup(self, facts: Mapping[str, Any] | None = None) -> Generation:
        """Agree on the next generation. Every member has to call it, and it waits for those that live.

        Args:
            facts: What the others have to know of this process: JSON data.

        Returns:
            The next generation, with the facts of all its members.

        Raises:
            NotAMemberError: The others have gone on without this process, it does not reach the store, or fewer than
                `least` members are left.
        """
        generation = self._member_of()
        number, end = generation.number + 1, time.monotonic() + self._timeout_s
        self.watch.regrouping()
        self._call(lambda store: store.set(f"{ARRIVAL}{number}/{self.number}", json.dumps(dict(facts or {}))))
        self._call(lambda store: store.set(f"{CALL}{number}", str(self.number)))
        while not self._call(lambda store: store.check([f"{GENERATION}{number}"])):
            self.watch.check()
            self._propose(generation, late=time.monotonic() > end)
            time.sleep(POLL_S)
        latest = self._latest()
        assert latest is not None, "it is written"
        return self._adopt(latest)

    def _propose(self, generation: Generation, *, late: bool) -> None:
        """Write the next generation if all have arrived that live. `late`: who has not arrived by now is lost."""
        following, members = generation.number + 1, generation.members
        arrived = self._call(lambda store: _arrived(store, following, members))
        missing = [member for member in members if member not in arrived]
        lost = self.watch.lost() | self._door.closed(missing) | (set(missing) if late else set[int]())
        waiting = self._acceptable(generation)
        ended = self._door.closed(waiting)  # just now: it is silent soon
        waiting = [number for number in waiting if number not in ended]
        chosen = next_members(members, arrived, lost, waiting, self._bounds)
        if chosen is None:
            return
        said = {n: arrived[n] if n in arrived else _facts(self.watch.tickets[n]) for n in chosen}
        departed = {*generation.departed, *members} - set(chosen)
        self._write(
            Generation(
                following, chosen, tuple(said[number] for number in chosen), generation.about, tuple(sorted(departed)),
                too_few(chosen, self._bounds),
            )
        )  # fmt: skip

    def meet(self) -> None:
        """Wait until all members of the generation are about to connect: connecting to one that is lost takes long.

        Afterwards this process knows the doors of all, so that it sees at once when one of them ends.

        Raises:
            WorkerLostError: One of them is lost, or wants another generation.
            NotAMemberError: This process does not reach the store.
        """
        generation, end = self._member_of(), time.monotonic() + self._timeout_s
        keys = {member: f"{READY}{generation.number}/{member}" for member in generation.members}
        self._call(lambda store: store.set(keys[self.number], ""))
        while missing := self._call(lambda store: [m for m, key in keys.items() if not store.check([key])]):
            self.watch.check()
            if ended := self._door.closed(missing):
                raise WorkerLostError(f"{self.watch.named(ended)}: ended before all had connected")
            if self.watch.trouble or time.monotonic() > end:
                late = f"{self.watch.named(missing)}: not there within {self._timeout_s:g} s"
                raise WorkerLostError(self.watch.trouble or late)
            time.sleep(POLL_S)
        others = [member for member in generation.members if member != self.number]
        self._door.meet_now(self._call(lambda store: {m: _door(store, m) for m in others}))

    def _write(self, generation: Generation) -> None:
        """Propose a generation: only the first one that is written for a number counts."""
        self._call(lambda store: store.compare_set(f"{GENERATION}{generation.number}", "", generation.to_text()))
        self._call(lambda store: store.set(LATEST, str(generation.number)))

    def _latest(self) -> Generation | None:
        return self._call(_latest)

    def _adopt(self, latest: Generation) -> Generation:
        """Become a member of the latest generation."""
        if self.number not in latest.members:
            raise LeftBehindError(left_behind(latest.number, self.watch.bound_s))
        if latest.failure:
            raise NotAMemberError(latest.failure)
        self.generation = latest
        self.watch.follow(latest)
        return latest

    def _member_of(self) -> Generation:
        if self.generation is None:
            raise UserError("this process is no member yet; call join() first")
        return self.generation

    def _call(self, action: Callable[[Any], T]) -> T:
        """Use the store, which answers within the watch's bound or cannot be reached."""
        try:
            return within(self.watch.bound_s, lambda: action(self._calls), slices=20)
        except (RuntimeError, TimeoutError) as error:
            self.watch.check()
            raise NotAMemberError(unreachable(error)) from error
        except (ValueError, KeyError, TypeError) as error:
            raise NotAMemberError(unreadable(error)) from error

    def end(self, how: str, *, together: bool = False) -> None:
        """Note that the run has ended, so that nobody waits to be taken in. Leaves.

        Args:
            how: One line for those who come later.
            together: Wait until all members have come here, so that leaving disturbs none in its last exchange.
        """
        if together:
            self._wait_for_the_end()
        self._call(lambda store: store.set(ENDED, how))
        self.leave()

    def _wait_for_the_end(self) -> None:
        """Wait until all members are done, for as long as a silent one may take to be lost."""
        generation, end = self._member_of(), time.monotonic() + self.watch.bound_s
        keys = {member: f"{DONE}{member}" for member in generation.members}
        self._call(lambda store: store.set(keys[self.number], ""))
        while missing := self._call(lambda store: [m for m, key in keys.items() if not store.check([key])]):
            if time.monotonic() > end or set(missing) <= self.watch.lost() | self._door.closed(missing):
                return
            time.sleep(POLL_S)

    def leave(self) -> None:
        """Leave the run in order: the others need not wait for this process to be silent."""
        self.watch.close(leave=True)
        self._door.close()
        close_clone(self._calls)


def _door(store: Any, member: int) -> Mapping[str, Any]:
    return parsed(store.get(f"{TICKET}{member}").decode()).get("door", {})


def _facts(ticket: Mapping[str, Any]) -> Mapping[str, Any]:
    return ticket.get("facts", {})


def _arrived(store: Any, number: int, members: Sequence[int]) -> dict[int, Mapping[str, Any]]:
    """The facts of the members that have arrived for a generation."""
    keys = {member: f"{ARRIVAL}{number}/{member}" for member in members}
    return {member: json.loads(store.get(key)) for member, key in keys.items() if store.check([key])}


def _latest(store: Any) -> Generation | None:
    """The generation with the largest number. Members of different speed write `LATEST` in any order."""
    number = int(store.get(LATEST)) if store.check([LATEST]) else 0
    if not store.check([f"{GENERATION}{number}"]):
        return None
    while store.check([f"{GENERATION}{number + 1}"]):
        number += 1
    return Generation.from_text(store.get(f"{GENERATION}{number}").decode())
