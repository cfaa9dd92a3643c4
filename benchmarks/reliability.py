"""The section of docs/results.md on faults and on what checkpoints cost. Called by tables.py."""

from collections.abc import Callable
from typing import Any

Record = dict[str, Any]
Table = Callable[..., str]
Provenance = Callable[..., str]

MAX_CHECKPOINT = 3.0  # percent of the round time, at a checkpoint every 10 rounds
KINDS = {"kill": "SIGKILL", "stop": "SIGSTOP", "delay": "delayed, below the timeout", "raise": "an exception"}


def section(faults: list[Record], saves: list[Record], table: Table, provenance: Provenance) -> str:
    """faults, saves: lines of faults.jsonl and checkpoints.jsonl, a line for each setting."""
    parts = ["## Interruptions and losses"]
    for record in faults:
        parts += _faults(record, table, provenance)
    for record in saves:
        parts += _saves(record, table, provenance)
    return "\n\n".join(parts)


def _faults(record: Record, table: Table, provenance: Provenance) -> list[str]:
    number, problems = record["number"], record["problems"]
    rows = []
    for kind, name in KINDS.items():
        seconds = record["to_end_s"].get(kind)
        times = ["", ""] if seconds is None else [f"{seconds['median']:.1f}", f"{seconds['max']:.1f}"]
        rows.append([name, record["kinds"][kind], *times])
    started = "forked from one that has imported torch" if record["forked"] else "started anew"
    hung = sum(any(p.startswith(("did not end", "left process")) for p in one["problems"]) for one in problems)
    said = "; ".join(
        f"{one['kind']} at `{one['point']}` in process {one['rank']}: {', '.join(one['problems'])}" for one in problems
    )
    return [
        f"`resist train` on the digits, a small network, S = 4 in 4 processes, a checkpoint every 2 of 6 rounds, `--timeout-s "
        f"{record['timeout_s']:g}`: {number} runs, each with one fault drawn at random (seed {record['seed']}) in one process, at one of "
        f"{len(record['points'])} points: {', '.join(record['points'])}. Then `--resume`, or the same command again where the fault came "
        "before there was a run.",
        f"{'All' if not hung else number - hung} {number if not hung else f'of {number}'} ended by themselves and left no process behind; **{record['same_weights']} of {number} ended with the weights of the "
        "undisturbed run, bit for bit**." + (f" What was not as it has to be: {said}." if problems else
        " Each run that broke off said which worker was lost, or what could not be written, and what to do."),
        table(["fault", "runs", "median s from the fault to the end of the command", "max"], rows),
        "A process that is stopped is noticed after the timeout; the launcher then waits 15 s for others to speak, and kills it. "
        f"{record['lanes']} runs at a time on {record['cores']} busy cores; processes were {started}.",
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
                f"spans of {rounds} rounds with one checkpoint, over those without: processor time, %",
                "percent_cpu",
                "+.1f",
            ),
            ("the same, time on the clock, %", "percent_wall", "+.1f"),
            ("a round without, processor s", "round_cpu_s", ".2f"),
            ("a checkpoint with no training beside it, processor s", "save_cpu_s", ".2f"),
            ("training stands still to copy the state, s on the clock", "stood_s", ".3f"),
        )
    ]
    return [
        f"What a checkpoint costs: {record['model']} of width {record['width']} ({record['parameters']:,} parameters), S = "
        f"{record['workers']} in one process, l = {record['local_steps']}, batch {record['batch_size']}; a checkpoint has "
        f"{record['checkpoint_bytes'] / 1e6:.1f} MB. Spans with and without took turns in one run.",
        table(["", "median", "min", "max"], rows),
        f"Target at K = {rounds}: at most {MAX_CHECKPOINT:.0f} %: {reached} in processor time, {cpu['median']:+.1f} % in the median of "
        f"{record['n']} pairs, {computed:.2f} % by the cost of a checkpoint alone. The thread in the background shares "
        f"{record['cores']} cores and Python's lock with training, so here all of it counts; others took "
        f"{record['others_share']['median']:.0%} of the processors in the median, so the time on the clock says little.",
        provenance(record, n=lambda r: f"n = {r['n']} pairs of spans, {r['n']} checkpoints alone"),
    ]  # fmt: skip
