"""Predictions of `resist cost` next to measurements, for docs/results.md. Used by tables.py."""

from collections.abc import Iterable
from typing import Any

from namespaces import parse_rate
from page_parts import Record, fill, provenance, rows, signed, spread
from paper_tables import ROUNDS, builder, short, strategy_of
from resist.cost import Link, Speed, predict
from resist.planning.methods import build_strategy

MAX_TIME_ERROR, MAX_MEMORY_ERROR = 15.0, 10.0  # percent


def predictions(wire: list[Record], memory: list[Record]) -> str:
    """Write the section; either list may be empty."""
    slept = [record for record in wire if record["compute_s"]]
    times = [row for record in slept for row in _time_errors(record)]
    peaks = [row for record in memory for row in _memory_errors(record)]
    parts = {"times": "", "memory": ""}
    if times:
        cells = [[r[0], f"{r[2]:.2f}", f"{r[3]:.2f}", f"{r[4]:.2f}", signed(r[1]), f"{r[5]:.2f}", f"{r[6]:.2f}",
                  signed(100 * (r[5] / r[6] - 1))] for r in times]  # fmt: skip
        parts["times"] = fill(
            "predictions-times", max_error=MAX_TIME_ERROR, verdict=_verdict(times, MAX_TIME_ERROR), rounds=ROUNDS,
            rows=rows(cells), provenance=provenance(*slept, n="n-wire"),
        )  # fmt: skip
    if peaks:
        cells = [[r[0], *(f"{value / 1e6:.1f}" for value in r[2:]), signed(r[1])] for r in peaks]
        parts["memory"] = fill(
            "predictions-memory", max_error=MAX_MEMORY_ERROR, verdict=_verdict(peaks, MAX_MEMORY_ERROR),
            rows=rows(cells), provenance=provenance(*memory, n="n-memory"),
        )  # fmt: skip
    return fill("predictions", **parts)


def _verdict(cells: list[tuple[Any, ...]], bound: float) -> str:
    """Name the rows (name, error in percent, ...) whose error exceeds `bound`."""
    missed = [f"{row[0]} ({signed(row[1])})" for row in cells if abs(row[1]) > bound]
    if missed:
        return fill("predictions-missed", rows=", ".join(missed))
    return fill("predictions-reached", error=max(abs(row[1]) for row in cells))


def _time_errors(record: Record) -> Iterable[tuple[Any, ...]]:
    """Yield name, error in percent, round s predicted, measured, spread, exchange s predicted, measured."""
    for m in record["methods"]:
        name, _, state = m["method"].partition(",optimizer_state=")
        if name not in ("resist", "local_sgd", "ddp") or "," in state:
            continue
        report = predict(
            builder(record),
            [build_strategy(name, record["workers"], record["local_steps"], optimizer_state=state or "reset")],
            batchnorm="batch", batch_size=2, rounds=ROUNDS,
            link=Link(parse_rate(record["rate"]) / 1e9), speed=Speed(2 / record["compute_s"][1]),
        )  # fmt: skip
        seconds = report.rows[0].seconds
        assert seconds is not None
        measured = m["round_s"]["median"]
        yield (
            f"{record['rate']}, {short(m['method'])}", 100 * (seconds.round / measured - 1), seconds.round, measured,
            spread(m["round_s"]["all"]), seconds.exchange, m["exchange_s"]["median"],
        )  # fmt: skip


def _memory_errors(record: Record) -> Iterable[tuple[Any, ...]]:
    """Yield name, error in percent, peak bytes predicted, measured, spread."""
    for row in record["training"]:
        strategy = strategy_of(row["strategy"], record["workers"], "travel")
        report = predict(builder(record), [strategy], rounds=1, batch_size=row["batch"])
        peak, measured = max(n.memory.peak for n in report.rows[0].networks), row["training_peak_bytes"]
        held = "sub-network" if row["strategy"] == "resist" else "full network"
        yield f"{held}, batch {row['batch']}", 100 * (peak / measured - 1), peak, measured, row["spread_bytes"]
