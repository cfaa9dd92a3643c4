"""Members: which processes make up a generation. Decided from what a process has seen in the store, without clocks."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Generation:
    """A period with the same members.

    Attributes:
        number: 0 for the first one.
        members: The numbers of the members, in the order of their processes.
        facts: What each member had to say when it was agreed on: JSON data.
        about: What all members have in common, such as versions and digests; newcomers are compared with it.
        departed: The numbers of former members, which do not come back under these.
        failure: Why no member goes on, or "".
    """

    number: int
    members: tuple[int, ...]
    facts: tuple[Mapping[str, Any], ...]
    about: Mapping[str, str]
    departed: tuple[int, ...] = ()
    failure: str = ""

    def to_text(self) -> str:
        """Return this generation as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Generation":
        """Read what `to_text` has written."""
        content = cast(dict[str, Any], json.loads(text))
        lists: dict[str, Any] = {name: tuple(content[name]) for name in ("members", "facts", "departed")}
        return cls(number=content["number"], about=content["about"], failure=content["failure"], **lists)


@dataclass(frozen=True)
class Bounds:
    """How many members a generation may have.

    Attributes:
        least: With fewer, nobody goes on.
        most: Others wait outside. None: no bound.
    """

    least: int = 1
    most: int | None = None


def first_members(waiting: Sequence[int], expected: int, bounds: Bounds, *, patient: bool) -> tuple[int, ...] | None:
    """Choose the members of the first generation.

    Args:
        waiting: Processes that have come and can take part, in their order.
        expected: The number of processes that are waited for.
        bounds: How many there may be.
        patient: True while more than `bounds.least` are waited for.

    Returns:
        The members, or None if more have to come.
    """
    if len(waiting) < (expected if patient else bounds.least):
        return None
    return tuple(waiting[: bounds.most])


def next_members(
    members: Sequence[int], arrived: Collection[int], lost: Collection[int], waiting: Sequence[int], bounds: Bounds
) -> tuple[int, ...] | None:
    """Choose the members of the next generation.

    Args:
        members: The members of the present one.
        arrived: Members that have come to agree.
        lost: Members that show no life any more, also those that have arrived before.
        waiting: Newcomers that can take part, in their order.
        bounds: How many there may be. The result may have fewer: then nobody can go on.

    Returns:
        The members: those that go on in their order, and the newcomers after them. None if a member that lives has not
        come yet.
    """
    if any(member not in arrived and member not in lost for member in members):
        return None
    going_on = [member for member in members if member not in lost]
    return tuple([*going_on, *(one for one in waiting if one not in lost)][: bounds.most])


def too_few(members: Sequence[int], bounds: Bounds) -> str:
    """Return why these members cannot go on, or ""."""
    if len(members) >= bounds.least:
        return ""
    left = "1 member is" if len(members) == 1 else f"{len(members)} members are"
    return f"{left} left, fewer than `least={bounds.least}`; start more processes, and go on from the last checkpoint"


def difference(run: Mapping[str, str], own: Mapping[str, str]) -> str:
    """Return how a process differs from the run that it wants to join, or "".

    Args:
        run: Name -> value of the run.
        own: Name -> value of the process.
    """
    for name in {**run, **own}:
        here, there = own.get(name, "none"), run.get(name, "none")
        if here != there:
            return f"{name} is {_shortened(here)} here and {_shortened(there)} in the run"
    return ""


def _shortened(value: str) -> str:
    return value if len(value) <= SHOWN else f"{value[: SHOWN - 3]}..."


@dataclass
class Silence:
    """Processes that show nothing new, counted in looks: a pause of the one that looks makes nobody silent.

    Args:
        looks: Looks without anything new after which a process is silent.
    """

    looks: int
    _last: dict[int, tuple[str, int]] = field(default_factory=dict[int, tuple[str, int]])

    def look(self, shown: Mapping[int, str]) -> None:
        """Take in what processes show at this moment; those that are not in it are forgotten.

        Args:
            shown: Process -> what it shows, which changes as long as it lives.
        """
        last = {number: self._last.get(number, ("", 0)) for number in shown}
        self._last = {n: (beat, last[n][1] + 1 if beat == last[n][0] else 0) for n, beat in shown.items()}

    def silent(self) -> set[int]:
        """Return the processes that have shown nothing new for so many looks."""
        return {number for number, (_, times) in self._last.items() if times >= self.looks}
