"""Differences between methods, paired by seed, with their uncertainty."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from page_parts import table

Run = Mapping[str, Any]
OF_THE_ROUNDS = "% of the rounds"  # ends the name of a row with a shorter schedule


class Difference(NamedTuple):
    """Differences between two methods on the same seeds.

    Attributes:
        mean: Their mean; NaN without a seed.
        error: Standard error of the mean; infinite with fewer than two seeds.
        low: Lower end of the 95 % interval of the mean, by Student's t.
        seeds: Number of seeds.
    """

    mean: float
    error: float
    low: float
    seeds: int

    def cells(self, of: int = 0) -> list[str]:
        """Return mean with standard error, and the lower end, as text. With fewer than `of` seeds, their number too."""
        if not self.seeds:
            return ["", ""]
        fewer = f" ({self.seeds})" if self.seeds < of else ""
        if self.seeds == 1:
            return [f"{self.mean:+.2f}{fewer}", ""]
        return [f"{self.mean:+.2f} ± {self.error:.2f}{fewer}", f"{self.low:+.2f}"]


def difference(values: Mapping[int, float], base: Mapping[int, float]) -> Difference:
    """Compare two methods on the seeds that both have.

    Args:
        values: Seed -> result of a method.
        base: Seed -> result of the method that it is compared with.
    """
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if len(differences) < 2:
        return Difference(differences[0] if differences else math.nan, math.inf, -math.inf, len(differences))
    from scipy.special import stdtrit  # here: the import takes a second

    mean, error = fmean(differences), stdev(differences) / math.sqrt(len(differences))
    return Difference(mean, error, mean - error * float(stdtrit(len(differences) - 1, 0.975)), len(differences))


def at_cost(curve: Mapping[float, Mapping[int, float]], share: float) -> dict[int, float]:
    """Interpolate what the base reaches when it may cost a share of its whole.

    Args:
        curve: Share of the base's rounds -> seed -> result of a run with a schedule of that length.
        share: The share.

    Returns:
        Seed -> result, from the points of the curve that were run with this seed. Without a seed that has points on
        both sides of the share: nothing is extrapolated.
    """
    found: dict[int, float] = {}
    for seed in sorted(set[int]().union(*curve.values())):
        shares = sorted(at for at, results in curve.items() if seed in results)
        if len(shares) > 1 and shares[0] <= share <= shares[-1]:
            found[seed] = float(np.interp(share, shares, [curve[at][seed] for at in shares]))
    return found


def summary(runs: Sequence[Run], base: str, reading: str = "averaged") -> str:
    """Return the table of all rows: accuracy, differences, and cost.

    Args:
        runs: Recorded runs of one setting.
        base: Name of the row that all others are compared with, and the beginning of the names of its shorter runs.
            Rows that are compressed are also compared with the same row in fp32.
        reading: Source of BatchNorm statistics whose accuracy is compared; a row without it shows its own first one.
    """
    rows = by_row(runs)
    results = {name: {run["seed"]: score(run, reading) for run in some} for name, some in rows.items()}
    costs = rows.get(base, [])
    curve = {some[0]["rounds"] / costs[0]["rounds"]: results[name] for name, some in rows.items() if is_of(name, base)}
    cells: list[list[object]] = []
    for name, some in sorted(rows.items(), key=lambda item: -fmean(results[item[0]].values())):
        own, others = results[name], ({}, {})
        if not is_of(name, base) and costs:
            others = (results[base], at_cost(curve, share(some, costs, "train_cpu_s")))
        others += (results.get(some[0].get("plain", ""), {}),)
        cells.append(
            [
                name,
                f"{fmean(own.values()):.2f}",
                len(own),
                *(cell for other in others for cell in difference(own, other).cells(of=len(own))),
                *(
                    f"{share(some, costs, key):.2f}" if costs and all(key in run for run in (*some, *costs)) else ""
                    for key in ("gmac", "train_cpu_s", "bytes", "peak_bytes")
                ),
            ]
        )
    head = ["row", "accuracy, %", "seeds", f"to {base}", "95 % from", "at equal time", "95 % from", "to fp32",
            "95 % from", "compute", "processor time", "bytes", "peak memory"]  # fmt: skip
    return table(head, cells)


def is_of(name: str, base: str) -> bool:
    """Return whether a row is the base, or the base with fewer rounds."""
    return name == base or (name.startswith(f"{base}, ") and name.endswith(OF_THE_ROUNDS))


def by_row(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Group runs by the name of their row."""
    rows: defaultdict[str, list[Run]] = defaultdict(list)
    for run in runs:
        rows[run["row"]].append(run)
    return dict(rows)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; 0 with one value."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def score(run: Run, reading: str) -> float:
    percent = run["percent"]
    return percent.get(reading, next(iter(percent.values())))


def share(runs: Iterable[Run], base: Iterable[Run], key: str) -> float:
    """Return the mean cost of `runs` as a share of that of `base`."""
    return fmean(cost(run[key]) for run in runs) / fmean(cost(run[key]) for run in base)


def cost(value: Any) -> float:
    """Return a cost; of bytes by kind the sum, without those that only the tests of this benchmark sent."""
    return sum(number for kind, number in value.items() if kind != "evaluate") if isinstance(value, Mapping) else value
