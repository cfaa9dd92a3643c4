"""Differences between methods, paired by seed, with their uncertainty."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from page_parts import table


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

    def cells(self) -> list[str]:
        """Return mean with standard error, and the lower end, as text."""
        if not self.seeds:
            return ["", ""]
        if self.seeds == 1:
            return [f"{self.mean:+.2f}", ""]
        return [f"{self.mean:+.2f} ± {self.error:.2f}", f"{self.low:+.2f}"]


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


def summary(runs: Sequence[Mapping[str, Any]], base: str, reading: str = "averaged") -> str:
    """Return the table of all rows: accuracy, differences, and cost.

    Args:
        runs: Recorded runs of one setting.
        base: Name of the row that all others are compared with. Rows that are compressed are also compared with the
            same row in fp32.
        reading: Source of BatchNorm statistics whose accuracy is compared; a row without it shows its own first one.
    """
    by_row: defaultdict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        by_row[run["row"]].append(run)
    results = {name: {run["seed"]: score(run, reading) for run in some} for name, some in by_row.items()}
    costs = by_row.get(base, [])
    cells: list[list[object]] = []
    for name, some in sorted(by_row.items(), key=lambda item: -fmean(results[item[0]].values())):
        others = ("" if name == base else base, some[0].get("plain", ""))
        cells.append(
            [
                name,
                f"{fmean(results[name].values()):.2f}",
                len(results[name]),
                *(cell for other in others for cell in difference(results[name], results.get(other, {})).cells()),
                *(share(some, costs, key) for key in ("gmac", "bytes", "weights_held", "train_cpu_s")),
            ]
        )
    head = ["row", "accuracy, %", "seeds", f"to {base}", "95 % from", "to fp32", "95 % from", "compute", "bytes",
            "weights of a worker", "processor"]  # fmt: skip
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
