"""The section of docs/results.md on members that come and go. Used by tables.py."""

import statistics
from typing import Any

from page_parts import Record, fill, provenance, reached, rows

NAMES = {"resist": "ResIST, `Membership`", "torchft": "torchft, `LocalSGD`"}
KINDS = ("SIGKILL", "SIGSTOP", "exception", "connections cut")
MAX_PAUSE_S = 1.0  # after SIGKILL; after SIGSTOP beyond the bound of silence


def section(records: list[Record]) -> str:
    """Return the section as Markdown.

    Args:
        records: Lines of elastic.jsonl, one for each setting.
    """
    return fill("elastic", results="\n\n".join(map(_setting, records)))


def accuracy(records: list[Record]) -> str:
    """Return the section on the accuracy of runs whose processes are killed, as Markdown.

    Args:
        records: Lines of elastic_accuracy.jsonl, one for each setting and seed.
    """
    settings: dict[tuple[float, float], list[Record]] = {}
    for record in records:
        settings.setdefault((record["epochs"], record["every"]), []).append(record)
    return fill("elastic-accuracy", results="\n\n".join(map(_pairs, settings.values())))


def _pairs(records: list[Record]) -> str:
    """The pairs of runs of one setting."""
    pairs = [(record["undisturbed"], record["disturbed"]) for record in records]
    differences = [disturbed["percent"] - quiet["percent"] for quiet, disturbed in pairs]
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    spread = "" if error is None else f" ± {error:.2f}"
    noise = statistics.stdev(quiet["percent"] for quiet, _ in pairs) if len(pairs) > 1 else None
    within = "not known from one seed" if noise is None else reached(abs(mean) <= noise)
    cells = [
        [
            record["seed"], f"{quiet['percent']:.2f}", f"{disturbed['percent']:.2f}",
            f"{disturbed['percent'] - quiet['percent']:+.2f}", disturbed["kills"], disturbed["generations"],
            disturbed["repeated"], f"{100 * (disturbed['images'] / quiet['images'] - 1):+.2f}",
        ]
        for record, (quiet, disturbed) in zip(records, pairs, strict=True)
    ]  # fmt: skip
    return fill(
        "elastic-accuracy-setting", **records[0], rows=rows(cells), difference=f"{mean:+.2f}{spread}", within=within,
        noise="" if noise is None else f" ({noise:.2f} points)", 
        provenance=provenance(*(record | {"count": len(records)} for record in records), n="n-elastic-accuracy"),
    )  # fmt: skip


def _setting(record: Record) -> str:
    methods = {row["method"]: row for row in record["methods"]}
    cells = [
        [
            NAMES[name], f"{row['goodput_percent']:.1f}", f"{row['absent_percent']:.1f}", row["replacements"],
            row["repeated"], f"{row['round_s']:.2f}", "?" if row["round_mb"] is None else f"{row['round_mb']:.1f}",
            f"{row['peak_mb']:.0f}",
        ]
        for name, row in methods.items()
    ]  # fmt: skip
    pauses = [
        [NAMES[name], *(_times(row, kind, "pause_s") for kind in KINDS), _median(row, "join_pause_s"),
         _times(row, None, "back_s")]
        for name, row in methods.items()
    ]  # fmt: skip
    verdicts = [*_targets(record, methods), *_defects(methods)]
    values = record | {"number": len(record["methods"][0]["faults"]), "beat_s": record["bound_s"] / record["missed"]}
    encoded = (record["wire"], record["fragments"]) != ("fp32", 0)
    values |= {"encoded": f" {fill('elastic-encoded', **record)}" if encoded else ""}
    values |= {"late": max(row["late_percent"] for row in record["methods"])}
    return fill(
        "elastic-setting", **values, rows=rows(cells), pauses=rows(pauses),
        verdicts="\n".join(f"- {line}" for line in verdicts), provenance=provenance(record, n="n-elastic"),
    )  # fmt: skip


def _seconds(row: dict[str, Any], kind: str | None, key: str) -> list[float]:
    return [f[key] for f in row["faults"] if kind in (None, f["kind"]) and f[key] is not None]


def _times(row: dict[str, Any], kind: str | None, key: str) -> str:
    """Median and maximum of one kind of fault, or of all."""
    seconds = _seconds(row, kind, key)
    return f"{statistics.median(seconds):.2f} (max {max(seconds):.2f})" if seconds else ""


def _median(row: dict[str, Any], key: str) -> str:
    """Median over all faults."""
    return f"{statistics.median(_seconds(row, None, key)):.2f}"


def _targets(record: Record, methods: dict[str, dict[str, Any]]) -> list[str]:
    ours, lines = methods.get("resist"), []
    if ours and (theirs := methods.get("torchft")):
        good, other = ours["goodput_percent"], theirs["goodput_percent"]
        lines.append(fill("elastic-goodput", good=good, other=other, reached=reached(good >= other)))
    for kind, bound in (("SIGKILL", MAX_PAUSE_S), ("SIGSTOP", record["bound_s"] + MAX_PAUSE_S)):
        if ours and (seconds := _seconds(ours, kind, "pause_s")):
            most = max(seconds)
            lines.append(fill("elastic-pause", kind=kind, bound=bound, most=most, reached=reached(most < bound)))
    return lines


def _defects(methods: dict[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, row in methods.items():
        found = "; ".join(row["defects"])
        verdict = fill("elastic-defects", found=found) if found else fill("elastic-whole")
        woken = sorted({f["ended"].partition(" (")[0] for f in row["faults"] if f["kind"] == "SIGSTOP"})
        cut = sorted({f["ended"].partition(" (")[0] for f in row["faults"] if f["kind"] == "connections cut"})
        lines.append(
            fill("elastic-outcome", name=NAMES[name], verdict=verdict, woken=", ".join(woken), cut=", ".join(cut))
        )
    return lines
