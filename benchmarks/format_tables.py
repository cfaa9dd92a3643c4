"""Wire formats on emulated hosts: bytes, stall and round time, for docs/results.md. Used by tables.py."""

from collections.abc import Callable

from page_parts import Record, fill, provenance, rows, spread
from paper_tables import short

MAX_GB, GB_WORKERS = 0.10, 4  # of a round, on the interfaces of so many hosts
MAX_STALL = {"1gbit": 5.0, "100mbit": 20.0}  # percent of a round, by rate
MAX_SLOWED = 5.0  # percent
SETTING = ("rate", "workers", "model", "width", "num_classes", "local_steps", "full_step_s")
MAX_ERROR = 1.0  # percent, between interfaces and formula
TARGETED = "resist,optimizer_state=travel,wire="  # the targets are those of these rows


def formats(records: list[Record]) -> str:
    """Write the section; a part for each setting."""
    settings = "\n\n".join(_setting(record) for record in _joined(records))
    return fill("formats", settings=settings, provenance=provenance(*records, n="n-wire"))


def _joined(records: list[Record]) -> list[Record]:
    """Join the records of a setting that was measured in several calls; of equal methods the last counts."""
    settings: dict[tuple[object, ...], Record] = {}
    for record in records:
        setting = tuple(record[key] for key in SETTING)
        methods = {m["method"]: m for m in [*settings.get(setting, {}).get("methods", ()), *record["methods"]]}
        settings[setting] = {**record, **settings.get(setting, {}), "methods": list(methods.values())}
    return list(settings.values())


def _setting(record: Record) -> str:
    cells = []
    for m in record["methods"]:
        seconds, slowed = m["round_s"]["median"], m["slowed_percent"]
        cells.append([
            short(m["method"]), f"{_gb(m):.4f}", f"{1 + _error(m) / 100:.4f}", f"{seconds:.2f}",
            f"{spread(m['round_s']['all']):.2f}", f"{m['stall_s']['median']:.2f}", f"{_stall(m):.1f}",
            "" if slowed is None else f"{slowed:+.1f}", f"{m['cpu_s']['median']:.2f}",
        ])  # fmt: skip
    return fill("formats-setting", **record, rows=rows(cells), verdicts="\n".join(verdicts(record)))


def verdicts(record: Record) -> list[str]:
    """Say which rows reach each target and which miss it, each with its figure."""
    ours = [m for m in record["methods"] if m["method"].startswith(TARGETED)]
    targets: list[tuple[str, float, Callable[[Record], float | None], list[Record], str]] = [
        ("formats-bytes", MAX_GB, _gb, ours if record["workers"] == GB_WORKERS else [], ".4f"),
        ("formats-slowed", MAX_SLOWED, lambda m: m["slowed_percent"], ours, ".1f"),
        ("formats-error", MAX_ERROR, lambda m: abs(_error(m)), record["methods"], ".2f"),
    ]
    if record["rate"] in MAX_STALL:
        targets.insert(1, ("formats-stall", MAX_STALL[record["rate"]], _stall, ours, ".1f"))
    lines = []
    for part, most, figure, methods, digits in targets:
        known = [(short(m["method"]), value) for m in methods if (value := figure(m)) is not None]
        for reached in (True, False):
            named = [f"{name} ({value:{digits}})" for name, value in known if (value <= most) == reached]
            if named:
                word = "formats-reached" if reached else "formats-missed"
                lines.append(fill(word, target=fill(part, most=most), rows="; ".join(named)))
    return lines


def _gb(m: Record) -> float:
    return sum(m["wire_bytes"]) / m["n"] / 1e9


def _error(m: Record) -> float:
    """Percent by which the interfaces sent more than the formula says."""
    return 100 * (sum(m["wire_bytes"]) / sum(m["formula_bytes"]) - 1)


def _stall(m: Record) -> float:
    """Percent of a round."""
    return 100 * m["stall_s"]["median"] / m["round_s"]["median"]
