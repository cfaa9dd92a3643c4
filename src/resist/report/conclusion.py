"""The conclusion of a comparison in sentences: how much faster, how many points, how many seeds, what is noise."""

import math
from collections.abc import Sequence
from typing import Any

from resist.planning.methods import METHODS
from resist.report.compare import baseline_of
from resist.report.units import amount, duration
from resist.runs.history import History

Row = dict[str, Any]
# 97.5 % quantiles of Student's t distribution with 1, 2, ... 30 degrees of freedom.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
     2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04)  # fmt: skip
MANY = 4  # rows up to which each has its sentences
SAME_MACHINE = ("processor", "cores", "threads", "gpus", "processes")


def conclusion(comparison: dict[str, Any]) -> list[str]:
    """Sentences on a comparison, see `resist.report.compare.compare`, the most important first."""
    rows = comparison["rows"]
    pairs = [(row, base) for row in rows if (base := baseline_of(row, rows)) is not None and base is not row]
    texts = _best(rows) if len(rows) > MANY else [] if pairs else [_alone(row) for row in rows]
    for row, base in pairs if len(rows) <= MANY else ():
        texts += [_speed(row, base), *_points(row, base)]
    runs = [len(row["runs"]) for row in rows]
    if max(runs) == 1:
        texts.append(
            "There is one run of each, so nothing can be said about noise: repeat them with other seeds before you "
            "rely on a small difference."
        )
    elif min(runs) == 1:
        single = ", ".join(name_of(row) for row in rows if len(row["runs"]) == 1)
        texts.append(f"There is one run only of {single}, so nothing can be said about its noise.")
    return texts


def caveats(comparison: dict[str, Any], histories: Sequence[History]) -> list[str]:
    """Warnings on what makes the runs of a comparison hard to compare."""
    texts: list[str] = []
    unfinished = sum(history.ended != "finished" for history in histories)
    if unfinished:
        texts.append(f"{unfinished} of the {len(histories)} runs did not finish; the numbers are those so far.")
    steps = [history.steps[-1] for history in histories]
    if min(steps) != max(steps):
        texts.append(
            f"The runs are not equally long: {min(steps):,} to {max(steps):,} steps of a worker. Where several runs "
            "are drawn as one line, it ends with the shortest."
        )
    machines = {tuple(str(history.environment.get(name)) for name in SAME_MACHINE) for history in histories}
    if len(machines) > 1:
        texts.append("The runs had different machines, threads or numbers of processes; their times do not compare.")
    rows = comparison["rows"]
    for row, base in ((row, baseline_of(row, rows)) for row in rows):
        if base is not None and row["wire"] is not None and row["wire"] != base["wire"]:
            texts.append(
                f"The wires of {name_of(row)} and {name_of(base)} are not the same ({row['wire']}, {base['wire']}): "
                "that is a part of their difference."
            )
    untested = sum(not history.tested for history in histories)
    if untested:
        texts.append(f"{untested} of the {len(histories)} runs were not tested.")
    return texts


def name_of(row: Row) -> str:
    """The label of a row, with the strategy as it is called in sentences."""
    strategy = row["strategy"]
    return METHODS[strategy].label + row["label"].removeprefix(strategy) if strategy in METHODS else row["label"]


def _best(rows: Sequence[Row]) -> list[str]:
    """The best of many rows; the table has all."""
    texts: list[str] = []
    tested = [row for row in rows if row["accuracy"] is not None]
    if tested:
        best = max(tested, key=lambda row: row["accuracy"])
        texts.append(
            f"Of {len(rows)}, {name_of(best)} has the best test {best['score']}, {100 * best['accuracy']:.2f} %."
        )
    fastest = min(rows, key=lambda row: row["time_s_per_step"])
    least = min(rows, key=lambda row: row["bytes_per_step"])
    speed_up = fastest["speed_up"]["time"]
    times = f", {speed_up:.2f} times as fast as local SGD" if speed_up is not None else ""
    texts.append(f"A step of {name_of(fastest)} is the fastest, {duration(fastest['time_s_per_step'])}{times}.")
    texts.append(f"{name_of(least)} sends least, {amount(least['bytes_per_step'])} a step.")
    return texts


def _speed(row: Row, base: Row) -> str:
    faster = row["speed_up"]["time"]
    if faster is None:
        return f"{name_of(row)}: no time was recorded."
    by_seed = _ratios(row, base)
    spread = f" ({min(by_seed):.2f} to {max(by_seed):.2f} times by seed)" if len(by_seed) > 1 else ""
    times = f"{duration(row['time_s_per_step'])} against {duration(base['time_s_per_step'])}"
    text = f"A step of {name_of(row)} was {faster:.2f} times as fast as one of {name_of(base)}{spread}: {times}."
    if base["bytes_per_step"] > 0:
        text = f"{text[:-1]}, and {row['bytes_per_step'] / base['bytes_per_step']:.0%} of the bytes were sent."
    return text


def _ratios(row: Row, base: Row) -> list[float]:
    """Speed-up for each seed that both have once."""
    if len(set(row["seeds"])) < len(row["seeds"]) or set(row["seeds"]) != set(base["seeds"]):
        return []
    of_base = dict(zip(base["seeds"], base["time_s_per_step_by_run"], strict=True))
    pairs = zip(row["seeds"], row["time_s_per_step_by_run"], strict=True)
    return [of_base[seed] / seconds for seed, seconds in pairs if seconds > 0]


def _points(row: Row, base: Row) -> list[str]:
    if row["accuracy"] is None or base["accuracy"] is None:
        return []
    points = 100 * (row["accuracy"] - base["accuracy"])
    word = "higher" if points > 0 else "lower"
    apart = f"{abs(points):.2f} points {word} than" if abs(points) >= 0.005 else "the same as"
    text = (
        f"The test {row['score']} of {name_of(row)}, {100 * row['accuracy']:.2f} %, is {apart} that of "
        f"{name_of(base)}, {100 * base['accuracy']:.2f} %."
    )
    noise = noise_points(row, base)
    if noise is None:
        return [text]
    if noise == 0:
        return [text, "The runs that differ in their seeds have equal scores, which says nothing about noise."]
    numbers = dict.fromkeys(len(one["runs"]) for one in (row, base))
    seeds = " and ".join(map(str, numbers)) + f" seeds{' each' if len(numbers) == 1 else ''}"
    if abs(points) > noise:
        return [text, f"That is more than noise: with {seeds}, chance explains up to {noise:.1f} points (95 %)."]
    return [text, f"That may be noise: with {seeds}, chance alone explains up to {noise:.1f} points (95 %)."]


def noise_points(row: Row, base: Row) -> float | None:
    """Half of the 95 % interval of the difference of two accuracies, in points, by Welch's t test.

    None where a row has less than two tested runs; 0 where the runs of each row have equal accuracies.
    """
    variances: list[tuple[float, int]] = []
    for one in (row, base):
        num = sum(value is not None for value in one["accuracy_by_run"])
        if num < 2:
            return None
        variances.append((one["accuracy_sd"] ** 2 / num, num - 1))
    total = sum(variance for variance, _ in variances)
    if total == 0:
        return 0.0
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in variances)
    return 100 * _quantile(freedom) * math.sqrt(total)


def _quantile(freedom: float) -> float:
    """Quantile of `T` for any number of degrees of freedom from 1 on, interpolated in their inverse."""
    below = min(len(T), math.floor(freedom + 1e-9))
    above = min(len(T), below + 1)
    if above == below:
        return T[-1]
    share = (1 / below - 1 / freedom) / (1 / below - 1 / above)
    return T[below - 1] + share * (T[above - 1] - T[below - 1])


def _alone(row: Row) -> str:
    """A row that local SGD with as many workers is not there to be compared with."""
    num = len(row["runs"])
    name = f"{num} runs of {name_of(row)} that differ in their seeds" if num > 1 else name_of(row)
    parts: list[str] = []
    found = [100 * value for value in row["accuracy_by_run"] if value is not None]
    if found:
        spread = f" ± {100 * row['accuracy_sd']:.2f} ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
        parts.append(f"test {row['score']} {100 * row['accuracy']:.2f} %{spread}")
    times = row["time_s_by_run"]
    between = f" ({duration(min(times))} to {duration(max(times))})" if num > 1 else ""
    parts += [f"{duration(row['time_s'])} of training{between}", f"{amount(row['bytes'])} sent"]
    return f"{name}: {', '.join(parts)}."
