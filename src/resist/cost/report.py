"""What was predicted, as records, as a plain dict, in sentences, and as tables."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from resist.cost.footprint import Network
from resist.cost.timing import ASSUMPTIONS, Link, Seconds, Speed
from resist.cost.traffic import Traffic


@dataclass(frozen=True)
class Row:
    """One strategy with one number of workers. networks: that of each worker. seconds: None without link and speed."""

    strategy: str
    workers: int
    networks: tuple[Network, ...]
    traffic: Traffic
    seconds: Seconds | None


@dataclass(frozen=True)
class Report:
    """full: the whole network on one machine. rows: by number of workers, then by strategy. speeds: none, one for all
    workers, or one for each."""

    full: Network
    rows: tuple[Row, ...]
    batch_size: int
    local_steps: int
    rounds: int
    link: Link | None
    speeds: tuple[Speed, ...]

    def speedups(self, row: Row) -> dict[str, float]:
        """How many times as many images per second `row` trains as each other strategy with as many workers, and as
        one machine alone, the fastest."""
        assert row.seconds is not None, "asked only where there are seconds"
        own = row.seconds.images_s
        others = {
            other.strategy: own / other.seconds.images_s
            for other in self.rows
            if other.workers == row.workers and other is not row and other.seconds is not None
        }
        return {**others, "one machine": own / max(speed.images_s for speed in self.speeds)}

    def verdict(self) -> list[str]:
        """Sentences: which strategy is quickest per image, for each number of workers and in all. Needs seconds."""
        timed = [(row, row.seconds) for row in self.rows if row.seconds is not None]
        said: list[str] = []
        for workers in dict.fromkeys(row.workers for row, _ in timed):
            same = [pair for pair in timed if pair[0].workers == workers]
            row, seconds = max(same, key=lambda pair: pair[1].images_s)
            ratios = ", ".join(_compared(name, ratio) for name, ratio in self.speedups(row).items())
            said.append(
                f"{workers} worker{'s' * (workers > 1)}: {row.strategy} is quickest per image, "
                f"{_amount(seconds.images_s)} images/s ({ratios}); "
                f"{seconds.exchange / seconds.round:.0%} of its time is exchange."
            )
        if timed:
            best = max(timed, key=lambda pair: pair[1].images_s)[0]
            if self.speedups(best)["one machine"] <= 1:
                said.append("None of them beats one machine alone: take more local steps, or a faster link.")
            elif len(said) > 1:
                said.append(f"Of all these, {best.strategy} with {best.workers} workers is quickest per image.")
        return said

    def to_json(self) -> dict[str, Any]:
        """A plain dict; bytes and seconds are those of a mean round."""
        return {
            "batch_size": self.batch_size,
            "local_steps": self.local_steps,
            "rounds": self.rounds,
            "link": None if self.link is None else {"gbit_s": self.link.gbit_s, "latency_ms": self.link.latency_ms},
            "speeds": [{"images_s": speed.images_s, "fixed": speed.fixed} for speed in self.speeds],
            "full": _network_json(self.full),
            "strategies": [self._row_json(row) for row in self.rows],
            "verdict": self.verdict(),
            "assumptions": list(ASSUMPTIONS) if self._timed else [],
        }

    @property
    def _timed(self) -> bool:
        return any(row.seconds is not None for row in self.rows)

    def _row_json(self, row: Row) -> dict[str, Any]:
        traffic, seconds = row.traffic, row.seconds
        networks = {network: [w for w, own in enumerate(row.networks) if own == network] for network in row.networks}
        times = None
        if seconds is not None:
            times = {
                "compute": seconds.compute,
                "exchange": seconds.exchange,
                "hidden_exchange": seconds.hidden,
                "round": seconds.round,
                "images_s": seconds.images_s,
                "speedup_over": self.speedups(row),
            }
        return {
            "strategy": row.strategy,
            "workers": row.workers,
            "networks": [{"workers": which, **_network_json(network)} for network, which in networks.items()],
            "paper_bytes": traffic.paper_bytes,
            "paper_gb": round(traffic.paper_bytes / 1e9, 4),
            "bytes": {**traffic.bytes, "total": traffic.total_bytes},
            "link_bytes": {
                "mean": traffic.link_bytes, "worst": traffic.worst_link_bytes, "run_worst_over_mean": traffic.link_ratio
            },
            "seconds": times,
        }  # fmt: skip


def print_table(report: Report, console: Console) -> None:
    """The report for people: what workers hold, what a round sends and, where it was asked, how long that takes."""
    console.print(f"What a worker holds and computes (the largest worker; {report.batch_size} images in a step)")
    console.print(_held(report))
    console.print(f"\nWhat a round of {report.local_steps} steps sends, GB (1e9 bytes), mean of {report.rounds} rounds")
    console.print(_sent(report))
    if not report._timed:
        console.print("\nFor seconds and a verdict, give --link-gbit-s, and --images-s or --calibrate.")
        return
    console.print(f"\nHow long a round of {report.local_steps} steps takes, seconds")
    console.print(_timed(report))
    for sentence in report.verdict():
        console.print(sentence)
    console.print("\nAssumed:")
    for sentence in ASSUMPTIONS:
        console.print(f"- {sentence}")


def _held(report: Report) -> Table:
    table = _table("blocks", "parameters", "GMAC/image", "activations GB", "peak GB")

    def add(name: str, workers: str, network: Network) -> None:
        memory = network.memory
        table.add_row(
            name, workers, "+".join(map(str, network.blocks)) or "-", f"{network.parameters:,}",
            f"{network.forward_macs / 1e9:.3f}", f"{memory.activations / 1e9:.3f}", f"{memory.peak / 1e9:.3f}",
        )  # fmt: skip

    add("one machine", "1", report.full)
    for row in report.rows:
        add(row.strategy, str(row.workers), max(row.networks, key=lambda network: network.memory.peak))
    return table


def _sent(report: Report) -> Table:
    table = _table("paper's count", "really", "of it state", "link mean", "link worst", "worst/mean of run")
    for row in report.rows:
        traffic = row.traffic
        cells = (traffic.paper_bytes, traffic.total_bytes, traffic.bytes.get("state", 0.0), traffic.link_bytes,
                 traffic.worst_link_bytes)  # fmt: skip
        amounts = [f"{cell / 1e9:.3f}" for cell in cells]
        table.add_row(row.strategy, str(row.workers), *amounts, f"{traffic.link_ratio:.2f}")
    return table


def _timed(report: Report) -> Table:
    table = _table("compute", "exchange", "(hidden)", "round", "images/s", "over one machine")
    for row in report.rows:
        seconds = row.seconds
        if seconds is not None:
            cells = (seconds.compute, seconds.exchange, seconds.hidden, seconds.round, seconds.images_s)
            amounts = [_amount(cell) for cell in cells]
            table.add_row(row.strategy, str(row.workers), *amounts, f"{report.speedups(row)['one machine']:.2f}x")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("strategy")
    for column in ("S", *columns):
        table.add_column(column, justify="right")
    return table


def _network_json(network: Network) -> dict[str, Any]:
    memory = network.memory
    return {
        "blocks": list(network.blocks),
        "parameters": network.parameters,
        "forward_macs": network.forward_macs,
        "training_flops": network.training_flops,
        "memory_bytes": {
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
            "buckets": memory.buckets,
            "outer": memory.outer,
            "replicas": memory.replicas,
            "activations": memory.activations,
            "peak": memory.peak,
        },
    }


def _amount(value: float) -> str:
    """A few digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _compared(name: str, ratio: float) -> str:
    return f"level with {name}" if ratio < 1.05 else f"{ratio:.3g}x {name}"
