"""Differences between methods, paired by seed, with their uncertainty."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from scipy import stats

from page_parts import table


def difference(values: Mapping[int, float], base: Mapping[int, float]) -> tuple[float, float, int]:
    """Compare two methods on the seeds that both have.

    Args:
        values: Seed -> result of a method.
        base: Seed -> result of the method that it is compared with.

    Returns:
        Mean of the differences, half the width of its 95 % interval (Student's t; infinite for a single seed), and the
        number of seeds.
    """
    differences = [values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())]
    if len(differences) < 2:
        return (differences[0] if differences else math.nan), math.inf, len(differences)
    error = stdev(differences) / math.sqrt(len(differences))
    return fmean(differences), error * float(stats.t.ppf(0.975, len(differences) - 1)), len(differences)


def summary(runs: Sequence[Mapping[str, Any]], base: str, reading: str = "averaged") -> str:
    """Return the table of all rows: accuracy, difference to `base`, and cost.

    Args:
        runs: Recorded runs of one setting.
        base: Name of the row that all others are compared with.
        reading: Source of BatchNorm statistics whose accuracy is compared; a row without it shows its own first one.
    """
    by_row: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        by_row[run["row"]].append(run)
    results = {name: {run["seed"]: score(run, reading) for run in some} for name, some in by_row.items()}
    costs = by_row.get(base, [])
    cells = []
    for name, some in sorted(by_row.items(), key=lambda item: -fmean(results[item[0]].values())):
        mean, half, seeds = difference(results[name], results.get(base, {}))
        cells.append(
            [
                name,
                f"{fmean(results[name].values()):.2f}",
                "" if name == base else f"{mean:+.2f}" + (f" +- {half:.2f}" if math.isfinite(half) else ""),
                "" if name == base else seeds,
                *(share(some, costs, key) for key in ("gmac", "bytes", "weights_held", "train_cpu_s")),
            ]
        )
    head = ["row", "accuracy, %", f"to {base}, 95 %", "seeds", "compute", "bytes", "weights of a worker", "processor"]
    return table(head, cells)


def score(run: Mapping[str, Any], reading: str) -> float:
    percent = run["percent"]
    return percent.get(reading, next(iter(percent.values())))


def share(runs: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]], key: str) -> str:
    """Return the mean cost of `runs` as a share of that of `base`."""
    whole = [cost(run[key]) for run in base]
    return f"{fmean(cost(run[key]) for run in runs) / fmean(whole):.2f}" if whole else ""


def cost(value: Any) -> float:
    """Return a cost; of bytes by kind the sum, without those that only the tests of this benchmark sent."""
    return sum(number for kind, number in value.items() if kind != "evaluate") if isinstance(value, Mapping) else value
