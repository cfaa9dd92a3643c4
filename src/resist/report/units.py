"""Ticks, units and reduced series of points, for all figures."""

import math
from collections.abc import Sequence


def ticks(low: float, high: float, num: int = 5) -> list[float]:
    """About `num` round numbers from `low` to `high`, which are included where they are round."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, num)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def whole_ticks(low: int, high: int, num: int = 6) -> list[int]:
    """At most `num` + 1 whole ticks from `low` to `high`: multiples of 1, 2, 5, 10, 20, 50 and so on."""
    steps = (factor * 10**power for power in range(18) for factor in (1, 2, 5))
    step = next(size for size in steps if (high - low) / size <= num)
    return list(range(-(-low // step) * step, high + 1, step))


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, or 1, 2 and 5 times those where the range has few, within [low, high]; both above 0."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        values = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
        if len(values) >= 3:
            break
    return values


def short(value: float) -> str:
    """A number with few digits: 0.25, 12, 1,500, 2e+07."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    if abs(value) >= 1e7 or abs(value) < 1e-4:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    text = f"{value:.4g}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def bytes_unit(most: float) -> tuple[float, str]:
    """Divisor and unit for amounts of data up to `most` bytes."""
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
    return next(((size, name) for size, name in units if most >= size), (1.0, "bytes"))


def seconds_unit(most: float) -> tuple[float, str]:
    """Divisor and unit for durations up to `most` seconds."""
    return (3600.0, "hours") if most >= 3 * 3600 else (60.0, "minutes") if most >= 300 else (1.0, "s")


def amount(num_bytes: float) -> str:
    """Format an amount of data, such as 228.0 MB."""
    divisor, unit = bytes_unit(abs(num_bytes))
    return f"{num_bytes / divisor:,.0f} {unit}" if divisor == 1 else f"{num_bytes / divisor:,.1f} {unit}"


def duration(seconds: float) -> str:
    """Format a duration, such as 31 ms or 12 min 5 s."""
    if 0 < seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.2g} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


def means(values: Sequence[float], num: int) -> list[float]:
    """Means of at most `num` groups of consecutive values.

    Args:
        values: The values. NaN and inf are left out of the means; the mean of a group without numbers is NaN.
        num: The largest number of groups. They have equal length; the last one may be shorter.
    """
    width = max(1, math.ceil(len(values) / num))
    group_means: list[float] = []
    for start in range(0, len(values), width):
        part = [value for value in values[start : start + width] if math.isfinite(value)]
        group_means.append(sum(part) / len(part) if part else math.nan)
    return group_means


def ends(values: Sequence[float], num: int) -> list[float]:
    """The last value of each group of `means`: the place of the mean on an axis."""
    width = max(1, math.ceil(len(values) / num))
    return [values[min(start + width, len(values)) - 1] for start in range(0, len(values), width)]


def sample(num: int, most: int) -> list[int]:
    """At most `most` of the positions 0..num-1, evenly spaced, including the first."""
    step = max(1, math.ceil(num / most))
    return list(range(0, num, step))


def thin(num: int, most: int) -> list[int]:
    """The positions of `sample`, and the last one."""
    kept = sample(num, most)
    return kept if not kept or kept[-1] == num - 1 else [*kept, num - 1]
