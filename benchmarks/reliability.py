"""The section of docs/results.md on faults and on the cost of checkpoints. Used by tables.py."""

from page_parts import Record, fill, provenance, reached, rows

MAX_CHECKPOINT = 3.0  # percent of the round time, at a checkpoint every 10 rounds
BUSY = 0.1  # share of the processors that other programs take; above it, wall time is not informative
FAULTS = {"kill": "SIGKILL", "stop": "SIGSTOP", "delay": "delayed, below the timeout", "raise": "an exception"}


def section(faults: list[Record], saves: list[Record]) -> str:
    """Return the section as Markdown.

    Args:
        faults: Lines of faults.jsonl, one for each setting.
        saves: Lines of checkpoints.jsonl, one for each setting.
    """
    parts = {"faults": "\n\n".join(map(_faults, faults)), "checkpoints": "\n\n".join(map(_checkpoints, saves))}
    return fill("reliability", **parts)


def _faults(record: Record) -> str:
    number, problems, cells = record["number"], record["problems"], []
    for fault, name in FAULTS.items():
        seconds = record["to_end_s"].get(fault)
        times = ["", ""] if seconds is None else [f"{seconds['median']:.1f}", f"{seconds['max']:.1f}"]
        cells.append([name, record["kinds"][fault], *times])
    hung = sum(any(p.startswith(("did not end", "left process")) for p in run["problems"]) for run in problems)
    failures = [
        fill(
            "faults-failure",
            fault=run["kind"],
            point=run["point"],
            rank=run["rank"],
            problems=", ".join(run["problems"]),
        )
        for run in problems
    ]
    values = record | {
        "points": ", ".join(record["points"]),
        "num_points": len(record["points"]),
        "ended": fill("faults-some", ended=number - hung, number=number) if hung else fill("faults-all", number=number),
        "failures": fill("faults-failed", failures="; ".join(failures)) if failures else fill("faults-none-failed"),
        "started": fill("faults-forked" if record["forked"] else "faults-started"),
    }
    return fill("faults", **values, rows=rows(cells), provenance=provenance(record, n="n-faults"))


def _checkpoints(record: Record) -> str:
    alone = 100 * record["save_cpu_s"]["median"] / (record["checkpoint_rounds"] * record["round_cpu_s"]["median"])
    return fill(
        "checkpoints", **record, checkpoint_mb=record["checkpoint_bytes"] / 1e6, alone_percent=alone,
        max_percent=MAX_CHECKPOINT, reached=reached(max(record["percent_cpu"]["median"], alone) <= MAX_CHECKPOINT),
        busy=fill("checkpoints-busy") if record["others_share"]["median"] > BUSY else "",
        provenance=provenance(record, n="n-checkpoints"),
    )  # fmt: skip
