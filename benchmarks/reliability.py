"""The section of docs/results.md on faults and on the cost of checkpoints. Called by tables.py."""

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
Table = Callable[..., str]
Provenance = Callable[..., str]

MAX_CHECKPOINT = 3.0  # percent of the round time, at a checkpoint every 10 rounds
EARLIER_FORMAT = (
    "Checkpoints have had another format since 2026-11-25. The tests inject some of these faults into runs of the present "
    "code (`tests/faults/test_faults.py`); the hundred have not been repeated."
)
FAULTS = {"kill": "SIGKILL", "stop": "SIGSTOP", "delay": "delayed, below the timeout", "raise": "an exception"}


def section(faults: list[Record], saves: list[Record], table: Table, provenance: Provenance) -> str:
    """Return the section as Markdown.

    Args:
        faults: Lines of faults.jsonl, one for each setting.
        saves: Lines of checkpoints.jsonl, one for each setting.
        table: `tables.table`.
        provenance: `tables.provenance`.
    """
    parts = ["## Interruptions and losses"]
    for record in faults:
        parts += _faults(record, table, provenance)
    for record in saves:
        parts += _saves(record, table, provenance)
    return "\n\n".join(parts)


def _faults(record: Record, table: Table, provenance: Provenance) -> list[str]:
    number, problems = record["number"], record["problems"]
    rows = []
    for fault, name in FAULTS.items():
        seconds = record["to_end_s"].get(fault)
        times = ["", ""] if seconds is None else [f"{seconds['median']:.1f}", f"{seconds['max']:.1f}"]
        rows.append([name, record["kinds"][fault], *times])
    started = "forked from one that has imported torch" if record["forked"] else "new Python processes"
    hung = sum(any(p.startswith(("did not end", "left process")) for p in run["problems"]) for run in problems)
    failures = "; ".join(
        f"{run['kind']} at `{run['point']}` in process {run['rank']}: {', '.join(run['problems'])}" for run in problems
    )
    return [
        f"`resist train` on the digits, a small network, S = 4 in 4 processes, a checkpoint every 2 of 6 rounds, `--timeout-s "
        f"{record['timeout_s']:g}`: {number} runs, each with one fault drawn at random (seed {record['seed']}) in one process, at one of "
        f"{len(record['points'])} points: {', '.join(record['points'])}. Then `--resume`, or the same command again if the fault "
        "came before the run directory existed.",
        f"{'All' if not hung else number - hung} {number if not hung else f'of {number}'} ended without help and left no process behind; **{record['same_weights']} of {number} ended with the weights of the "
        "run without faults, bit for bit**." + (f" Failures: {failures}." if problems else
        " Each interrupted run printed which worker was lost, or which file could not be written, and the remedy."),
        table(["fault", "runs", "median s from the fault to the end of the command", "max"], rows),
        "A suspended process is noticed after the timeout; the launcher then waits 15 s for the messages of the others, and kills it. "
        f"{record['lanes']} runs at a time on {record['cores']} busy cores; processes were {started}.",
        *([EARLIER_FORMAT] if str(record["date"]) < "2026-11-25" else []),
        provenance(record, n=lambda r: f"n = {r['number']} runs"),
    ]  # fmt: skip


def _saves(record: Record, table: Table, provenance: Provenance) -> list[str]:
    rounds, cpu = record["checkpoint_rounds"], record["percent_cpu"]
    alone, round_s = record["save_cpu_s"]["median"], record["round_cpu_s"]["median"]
    computed = 100 * alone / (rounds * round_s)
    reached = "reached" if max(cpu["median"], computed) <= MAX_CHECKPOINT else "**missed**"
    rows = [
        [name, *(f"{record[key][of]:{form}}" for of in ("median", "min", "max"))]
        for name, key, form in (
            (
                f"{rounds} rounds with one checkpoint compared with {rounds} rounds without: processor time, %",
                "percent_cpu",
                "+.1f",
            ),
            ("the same, wall time, %", "percent_wall", "+.1f"),
            ("a round without checkpoint, processor s", "round_cpu_s", ".2f"),
            ("a checkpoint without training, processor s", "save_cpu_s", ".2f"),
            ("training waits while the state is copied, wall s", "stood_s", ".3f"),
        )
    ]
    return [
        f"The cost of a checkpoint: {record['model']} of width {record['width']} ({record['parameters']:,} parameters), S = "
        f"{record['workers']} in one process, l = {record['local_steps']}, batch {record['batch_size']}; a checkpoint has "
        f"{record['checkpoint_bytes'] / 1e6:.1f} MB. Rounds with and without a checkpoint alternated in one run.",
        table(["", "median", "min", "max"], rows),
        f"Target at K = {rounds}: at most {MAX_CHECKPOINT:.0f} %: {reached} in processor time, {cpu['median']:+.1f} % in the median of "
        f"{record['n']} pairs, {computed:.2f} % from the cost of a checkpoint alone. The background thread shares "
        f"{record['cores']} cores and Python's lock with training, so all of its time counts here; other programs took "
        f"{record['others_share']['median']:.0%} of the processors in the median"
        + (", so the wall time is not informative." if record["others_share"]["median"] > 0.1 else "."),
        provenance(record, n=lambda r: f"n = {r['n']} pairs, {r['n']} checkpoints alone"),
    ]  # fmt: skip
