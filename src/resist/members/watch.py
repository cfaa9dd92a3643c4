"""Watch: a thread of each member that shows that it lives, and looks at the others, at the store.

Every `heartbeat_s` it counts up a number in the store; four times as often it looks at the numbers of the others. One
whose number has not changed for `missed` heartbeats is lost: it was stopped, its machine has ended, or it does not
reach the store. Looks are counted, so no clocks are compared, and after a pause of this process nobody is lost.

When a member is lost, nothing in which the others wait for it can end. So the watch ends it: it calls what `attach` was
given, which closes the connections of the groups.
"""

import contextlib
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

from resist.errors import LeftBehindError, NotAMemberError, first_line
from resist.members.door import Door
from resist.members.store_client import close_clone
from resist.planning.generations import Generation, Silence
from resist.sync.meeting import within
from resist.sync.rendezvous import parsed

# Keys in the store: processes that have come, and what they show.
TICKETS, TICKET, BEAT, LEFT = "tickets", "ticket/", "beat/", "left"
# The next generation: a member wants one, a member has arrived for it, and what was agreed on.
CALL, ARRIVAL, GENERATION = "call/", "arrival/", "generation/"
LOOKS = 4  # looks in a heartbeat
GRACE = 2  # looks after which a call for a new generation ends what this process waits in
KNOWN = 2  # looks after which all members have seen a process


class Watch:
    """Shows that this process lives, and looks at the others. The thread begins with `start`.

    Args:
        store: A store of torch.distributed, or one with its methods, for this object alone.
        door: The port of this process.
        heartbeat_s: Seconds between two heartbeats.
        missed: Heartbeats without a change after which a process is lost.

    Attributes:
        bound_s: Seconds after which a silent process is lost, and the store given up.
        tickets: Process -> what it has introduced itself with.
    """

    def __init__(self, store: Any, door: Door, heartbeat_s: float, missed: int) -> None:
        self.bound_s, self._pause_s, self._slices = heartbeat_s * missed, heartbeat_s / LOOKS, missed * LOOKS
        self._store, self._door = store, door
        self._silence = Silence(self._slices)
        self.tickets: dict[int, Mapping[str, Any]] = {}
        self._number, self._looks, self._called = -1, 0, 0
        self._first_look: dict[int, int] = {}  # at each process
        self._left: set[int] = set()
        self._generation: Generation | None = None
        self._regrouping = False
        self._trouble, self._final, self._behind = "", "", False
        self._attached: list[Callable[[str], None]] = []
        self._lock = threading.RLock()  # what an attached function does may end in `attach` or `detach`
        self._closed = threading.Event()

    def start(self, number: int) -> None:
        """Begin to show that this process lives.

        Args:
            number: Its number.
        """
        self._number = number
        threading.Thread(target=self._run, daemon=True).start()

    def follow(self, generation: Generation) -> None:
        """Look at the members of a generation from now on; what was the matter before is settled.

        Args:
            generation: The one that this process goes on in.
        """
        with self._lock:
            self._generation, self._regrouping, self._called, self._trouble = generation, False, 0, ""

    def regrouping(self) -> None:
        """Take note that this process agrees on a new generation: no call for it has to end anything."""
        with self._lock:
            self._regrouping = True

    def attach(self, abort: Callable[[str], None]) -> None:
        """Call a function as soon as nothing that waits for all members can end; at once if that is so already.

        Args:
            abort: Called with the reason, in another thread, once.
        """
        with self._lock:
            self._attached.append(abort)
            if self.trouble:
                abort(self.trouble)

    def detach(self, abort: Callable[[str], None]) -> None:
        """Undo `attach`. Waits for a call of it that is under way."""
        with self._lock:
            self._attached = [other for other in self._attached if other != abort]

    @property
    def trouble(self) -> str:
        """Why what waits for all members does not end, or ""."""
        return self._final or self._trouble

    def check(self) -> None:
        """Raise NotAMemberError where this process cannot go on with the others."""
        if self._final:
            raise (LeftBehindError if self._behind else NotAMemberError)(self._final)

    def lost(self) -> set[int]:
        """Return the processes that have left or have been silent for too long."""
        with self._lock:
            return self._silence.silent() | self._left

    def present(self) -> list[int]:
        """Return the processes that show life, ascending; a former member is none of them."""
        with self._lock:
            gone = self.lost() | set(self._generation.departed if self._generation is not None else ())
            return [number for number in sorted(self.tickets) if number not in gone]

    def known(self, number: int) -> bool:
        """Return True for a process that the other members have seen as well, since this one has for some looks."""
        return self._looks - self._first_look.get(number, self._looks) >= KNOWN

    def named(self, numbers: Collection[int]) -> str:
        """Describe processes for a message: "member 3 (host b)"."""
        hosts = {number: self.tickets.get(number, {}).get("hostname", "unknown") for number in sorted(numbers)}
        return ", ".join(f"member {number} (host {host})" for number, host in hosts.items())

    def close(self, *, leave: bool = False) -> None:
        """End the thread.

        Args:
            leave: Show the others that this process leaves, so that they need not wait for its silence.
        """
        self._closed.set()
        if leave and self._number >= 0 and not self._final:
            with contextlib.suppress(RuntimeError, TimeoutError):  # the store has ended
                within(self.bound_s, lambda: self._store.set(f"{BEAT}{self._number}", LEFT), self._slices)
        close_clone(self._store)

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                within(self.bound_s, self._look, self._slices)
            except (RuntimeError, TimeoutError) as error:
                if not self._closed.is_set():
                    self._note(final=unreachable(error))
                return
            except (ValueError, KeyError, TypeError) as error:
                self._note(final=unreadable(error))
                return
            self._closed.wait(self._pause_s)

    def _look(self) -> None:
        if self._looks % LOOKS == 0:
            self._store.set(f"{BEAT}{self._number}", str(self._looks))
        self._looks += 1
        numbers = [n for n in range(1, self._store.add(TICKETS, 0) + 1) if n not in self._away()]
        for number in [number for number in numbers if number not in self.tickets]:
            if self._store.check([f"{TICKET}{number}"]):
                self.tickets[number] = parsed(self._store.get(f"{TICKET}{number}").decode())
                self._first_look[number] = self._looks
        shown = _values(self._store, {n: f"{BEAT}{n}" for n in numbers if n in self.tickets and n != self._number})
        self._door.meet({n: self.tickets[n].get("door", {}) for n in shown})
        with self._lock:
            self._left |= {number for number, beat in shown.items() if beat == LEFT}
            self._silence.look({number: beat for number, beat in shown.items() if beat != LEFT})
        self._judge()

    def _away(self) -> set[int]:
        return self._left | set(self._generation.departed if self._generation is not None else ())

    def _judge(self) -> None:
        """Note what is the matter with this generation."""
        generation = self._generation
        if generation is None:
            return
        following = generation.number + 1
        if self._store.check([f"{GENERATION}{following}"]) and not self._regrouping:
            text = self._store.get(f"{GENERATION}{following}").decode()
            if generation is self._generation and self._number not in Generation.from_text(text).members:
                self._behind = True
                self._note(final=left_behind(following, self.bound_s))
                return
        self._called = self._called + 1 if self._store.check([f"{CALL}{following}"]) else 0
        if silent := self.lost() & set(generation.members):
            self._note(f"{self.named(silent)}: no sign of life for {self.bound_s:g} s, or has left", generation)
        elif self._called > GRACE:
            self._note("another member has lost contact, and wants a new generation", generation)

    def _note(self, trouble: str = "", generation: Generation | None = None, *, final: str = "") -> None:
        with self._lock:
            if self._regrouping and not final:
                return
            if not final and generation is not self._generation:  # it is about an earlier one
                return
            before = self.trouble
            self._trouble, self._final = self._trouble or trouble, self._final or final
            for abort in self._attached if not before else ():
                abort(self.trouble)


def unreachable(error: Exception) -> str:
    """Return the message for a store that fails, or does not answer."""
    return (
        f"the store at which the members agree cannot be reached ({first_line(error)}), and nobody goes on without it; "
        "check that it still runs, start it again if not, and go on from the last checkpoint"
    )


def unreadable(error: Exception) -> str:
    """Return the message for an entry of the store that another program, or another version, has written."""
    return f"the store holds an entry that this version cannot read ({first_line(error)}); give the run another name"


def left_behind(number: int, bound_s: float) -> str:
    """Return the message for a process that a generation goes on without."""
    return (
        f"the others have gone on without this process (generation {number}): it was silent for more than "
        f"{bound_s:g} s, or did not come to agree in time; start it again to come back"
    )


def _values(store: Any, keys: Mapping[int, str]) -> dict[int, str]:
    if not keys:
        return {}
    if store.has_extended_api():
        return {n: v.decode() for n, v in zip(keys, store.multi_get([*keys.values()]), strict=True)}
    return {number: store.get(key).decode() for number, key in keys.items()}
