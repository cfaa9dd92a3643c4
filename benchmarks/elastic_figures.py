"""Figures of benchmarks/elastic.py from the events that the processes wrote. Imports no torch.

An event is a dictionary: its name, the process, the time, and values; see `elastic_members.emit`.
"""

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]


def named(events: Iterable[Event], *names: str) -> list[Event]:
    """Return the events with one of these names."""
    return [event for event in events if event["event"] in names]


def kept_images(events: Sequence[Event], batch: int) -> list[tuple[float, int]]:
    """Return the images that were trained and kept so far, at the end of each round.

    Args:
        events: All events of a run, by time.
        batch: Images of a step.

    Returns:
        (time, images), by time. A round that is repeated counts once.
    """
    rounds = named(events, "round", "regroup")
    if not any("images" in event for event in rounds):
        # The step of a job is that at which its present workers have seen as many images: it returns where a round
        # is repeated.
        return [(e["at"], e["step"] * e["workers"] * batch) for e in rounds if e["worker"] == 0]
    total, found = 0, dict[int, tuple[float, int]]()
    for event in rounds:  # every process adds the images that its weights had when they were averaged
        total += event["images"]
        found[event["round"]] = event["at"], total
    return sorted(found.values())


def between(kept: Sequence[tuple[float, int]], start: float, end: float) -> tuple[float, float]:
    """Return seconds and images from the first round that ends after `start` to the last one before `end`."""
    inside = [entry for entry in kept if start <= entry[0] <= end]
    if len(inside) < 2:
        return end - start, 0.0
    return inside[-1][0] - inside[0][0], inside[-1][1] - inside[0][1]


def goodput(
    kept: Sequence[tuple[float, int]], quiet: Sequence[tuple[float, float]], faulty: tuple[float, float]
) -> float:
    """Return percent of the images that would have been kept without faults.

    Args:
        kept: See `kept_images`.
        quiet: Begin and end of each time without faults.
        faulty: Begin and end of the time with faults.
    """
    seconds, images = map(sum, zip(*(between(kept, *period) for period in quiet), strict=True))
    faulty_seconds, faulty_images = between(kept, *faulty)
    return 100 * (faulty_images / faulty_seconds) / (images / seconds)


def gaps(events: Sequence[Event], pids: Iterable[int], start: float, end: float) -> list[tuple[float, float]]:
    """Return (begin, seconds) of the time between two steps of a process, where it ends in an interval."""
    found: list[tuple[float, float]] = []
    steps: dict[int, list[float]] = defaultdict(list)
    for event in named(events, "step"):
        steps[event["pid"]].append(event["at"])
    for pid in pids:
        found += [(a, b - a) for a, b in itertools.pairwise(steps[pid]) if b >= start and b < end]
    return found


def usual_gap(events: Sequence[Event], quiet: tuple[float, float]) -> float:
    """Return the seconds from the last step of a round to the first one of the next, without faults; the median."""
    found = []
    for pid in {event["pid"] for event in named(events, "round")}:
        inside = [e for e in events if e["pid"] == pid and quiet[0] <= e["at"] <= quiet[1]]
        steps = [event["at"] for event in named(inside, "step")]
        for end in (event["at"] for event in named(inside, "round")):
            before, after = [at for at in steps if at <= end], [at for at in steps if at > end]
            found += [after[0] - before[-1]] if before and after else []
    return statistics.median(found)


def judged(fault: Mapping[str, Any], events: Sequence[Event], usual_s: float, until: float) -> dict[str, Any]:
    """Return what one fault has cost.

    Args:
        fault: Its kind, the time `at`, the `pid` of the victim, the `survivors`, and the processes that were started
            in its place (`replaced`).
        events: All events of the run.
        usual_s: See `usual_gap`.
        until: The time of the next fault, or of the end.

    Returns:
        `pause_s`: the longest time that a survivor was without a step, beyond the usual, until survivors have gone on
        without the victim; `join_pause_s`: the same after that; `back_s`: seconds until all members were there again.
    """
    start = fault["at"]
    later = [event for event in events if start <= event["at"] < until]
    before = max(event["generation"] for event in events if "generation" in event and event["at"] < start)
    own = [event for event in named(later, "round", "regroup") if event["pid"] in fault["survivors"]]
    without = min((event["at"] for event in own if event["generation"] > before), default=until)
    found = gaps(events, fault["survivors"], start, until)
    pause = max((seconds for begin, seconds in found if begin < without), default=0.0)
    joining = max((seconds for begin, seconds in found if begin >= without), default=0.0)
    back = [event["at"] for event in named(later, "member") if event["pid"] in fault["replaced"]]
    again = [e["at"] for e in named(later, "round") if e["pid"] == fault["pid"] and e["generation"] > before]
    complete = min(back if fault["replaced"] else again, default=None)
    return {
        "kind": fault["kind"], "at_s": fault["at_s"], "ended": fault["ended"],
        "pause_s": round(max(0.0, pause - usual_s), 3), "join_pause_s": round(max(0.0, joining - usual_s), 3),
        "back_s": None if complete is None else round(complete - start, 2),
        "repeated": len(repeats(later)),
    }  # fmt: skip


def repeats(events: Sequence[Event]) -> set[tuple[Any, ...]]:
    """Return the rounds whose exchange was repeated: of a job, and of torchft's where a commit failed."""
    rolled = {(e["generation"], e["round"]) for e in named(events, "regroup") if e["repeated"]}
    return rolled | {(e["round"], "failed") for e in named(events, "failed")}


def defects(events: Sequence[Event]) -> list[str]:
    """Return what must never be: members that disagree, two runs, a network that is not whole."""
    found: list[str] = []
    points: dict[tuple[Any, ...], list[Event]] = defaultdict(list)
    groups: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    for event in named(events, "round", "regroup"):
        points[event["event"], event["generation"], event["round"]].append(event)
        if "members" in event:
            groups[event["generation"]].add(tuple(event["members"]))
    for point, there in points.items():
        if len({event["digest"] for event in there}) > 1:
            found.append(f"members disagree at {point}")
        if len({event["worker"] for event in there}) < len(there):
            found.append(f"two processes are one worker at {point}")
    found += [f"generation {number} has two lists of members" for number, lists in groups.items() if len(lists) > 1]
    ends: dict[int, int] = {}
    for event in named(events, "round"):
        generation = ends.setdefault(event["round"], event["generation"])
        if "members" in event and generation != event["generation"]:
            found.append(f"round {event['round']} has ended in generations {generation} and {event['generation']}")
    whole = named(events, "whole")
    found += [] if whole else ["no network at the end"]
    for event in whole:
        found += [f"the network at the end is not {k}" for k in ("complete", "finite", "trained") if not event[k]]
    return found
