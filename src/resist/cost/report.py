"""Report of a prediction: records, a plain dict, sentences and tables."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from resist.cost.footprint import Network
from resist.cost.gpu import GPU_ASSUMPTIONS, GpuMemory
from resist.cost.links import Links
from resist.cost.timing import ASSUMPTIONS, Seconds, Speed
from resist.cost.traffic import Traffic


@dataclass(frozen=True)
class Row:
    """Prediction for one strategy and one number of workers.

    Attributes:
        strategy: Name of the strategy, with the rounds before where its capacities change: "resist after 10 rounds".
        workers: Number of workers.
        networks: Footprint of each worker's network.
        traffic: Messages of a mean round.
        seconds: Time of a mean round; None without link and speed.
        gpu: Memory of the GPU that needs most; None if the device is the CPU.
    """

    strategy: str
    workers: int
    networks: tuple[Network, ...]
    traffic: Traffic
    seconds: Seconds | None
    gpu: GpuMemory | None = None


@dataclass(frozen=True)
class Report:
    """Prediction for several strategies and numbers of workers.

    Attributes:
        full: Footprint of the full network, trained on one machine.
        rows: Predictions, in the order of the strategies given.
        batch_size: Images in a worker's step.
        local_steps: Optimizer steps in a round.
        rounds: Number of rounds that the traffic is averaged over.
        links: Connections of the workers, if given.
        speeds: Speeds of the devices: none, one for all workers, or one for each.
    """

    full: Network
    rows: tuple[Row, ...]
    batch_size: int
    local_steps: int
    rounds: int
    links: Links | None
    speeds: tuple[Speed, ...]

    def speedups(self, row: Row) -> dict[str, float]:
        """Compare a row's images per second with the others'.

        Args:
            row: A row with seconds. It is compared with rows of the same number of workers.

        Returns:
            Ratios by the name of the other strategy; "one machine" is the fastest device alone.
        """
        assert row.seconds is not None, "called only for rows with seconds"
        images_s = row.seconds.images_s
        ratios = {
            other.strategy: images_s / other.seconds.images_s
            for other in self.rows
            if other.workers == row.workers and other is not row and other.seconds is not None
        }
        return {**ratios, "one machine": images_s / max(speed.images_s for speed in self.speeds)}

    def verdict(self) -> list[str]:
        """Return sentences on the fastest strategy per image.

        The list is empty without seconds.
        """
        timed = [(row, row.seconds) for row in self.rows if row.seconds is not None]
        sentences: list[str] = []
        for workers in dict.fromkeys(row.workers for row, _ in timed):
            same = [pair for pair in timed if pair[0].workers == workers]
            row, seconds = max(same, key=lambda pair: pair[1].images_s)
            ratios = ", ".join(_compared(name, ratio) for name, ratio in self.speedups(row).items())
            sentences.append(
                f"{workers} worker{'s' * (workers > 1)}: {row.strategy} is fastest per image, "
                f"{_amount(seconds.images_s)} images/s ({ratios}); "
                f"{seconds.stall:.0%} of its time is exchange."
            )
        if timed:
            best = max(timed, key=lambda pair: pair[1].images_s)[0]
            if self.speedups(best)["one machine"] <= 1:
                sentences.append("None of them is faster than one machine; use more local steps, or a faster link.")
            elif len(sentences) > 1:
                sentences.append(f"Of all these, {best.strategy} with {best.workers} workers is fastest per image.")
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Return a dict for JSON; bytes and seconds of a mean round."""
        return {
            "batch_size": self.batch_size,
            "local_steps": self.local_steps,
            "rounds": self.rounds,
            "links": None if self.links is None else self.links.to_json(),
            "speeds": [asdict(speed) for speed in self.speeds],
            "full": _network_json(self.full),
            "strategies": [self._row_json(row) for row in self.rows],
            "verdict": self.verdict(),
            "assumptions": [*(GPU_ASSUMPTIONS if self._on_gpus else ()), *(ASSUMPTIONS if self._timed else ())],
        }

    @property
    def _timed(self) -> bool:
        return any(row.seconds is not None for row in self.rows)

    @property
    def _on_gpus(self) -> bool:
        return any(row.gpu is not None for row in self.rows)

    def _row_json(self, row: Row) -> dict[str, Any]:
        traffic, seconds = row.traffic, row.seconds
        # Workers with equal networks share an entry.
        workers = {network: [w for w, held in enumerate(row.networks) if held == network] for network in row.networks}
        times = None
        if seconds is not None:
            times = {
                "compute": seconds.compute,
                "exchange": seconds.exchange,
                "hidden_exchange": seconds.hidden,
                "round": seconds.round,
                "stall": seconds.stall,
                "images_s": seconds.images_s,
                "speedup_over": self.speedups(row),
            }
        return {
            "strategy": row.strategy,
            "workers": row.workers,
            "networks": [{"workers": numbers, **_network_json(network)} for network, numbers in workers.items()],
            "paper_bytes": traffic.paper_bytes,
            "paper_gb": round(traffic.paper_bytes / 1e9, 4),
            "bytes": {**traffic.bytes, "total": traffic.total_bytes},
            "link_bytes": {
                "mean": traffic.link_bytes,
                "worst": traffic.worst_link_bytes,
                "run_worst_over_mean": traffic.link_ratio,
            },
            "seconds": times,
            "gpu_bytes": None if row.gpu is None else {**asdict(row.gpu), "total": row.gpu.total},
        }


def print_table(report: Report, console: Console) -> None:
    """Print tables of memory, FLOPs, traffic and, if predicted, seconds."""
    console.print(f"Network and memory of a worker (the largest worker; {report.batch_size} images in a step)")
    console.print(_held(report))
    console.print(f"\nTraffic of a round of {report.local_steps} steps, GB (1e9 bytes), mean of {report.rounds} rounds")
    console.print(_sent(report))
    if report._on_gpus:
        console.print("\nMemory of the GPU that needs most, GB (training and test: their peaks)")
        console.print(_on_gpus(report))
        _print_assumptions(console, GPU_ASSUMPTIONS)
    if not report._timed:
        return
    console.print(f"\nTime of a round of {report.local_steps} steps, seconds; speedup over one machine")
    console.print(_timed(report))
    for sentence in report.verdict():
        console.print(sentence)
    _print_assumptions(console, ASSUMPTIONS)


def _print_assumptions(console: Console, sentences: Sequence[str]) -> None:
    console.print("\nAssumptions:")
    for sentence in sentences:
        console.print(f"- {sentence}")


def _held(report: Report) -> Table:
    table = _table("blocks", "parameters", "GMAC/image", "activations GB", "peak GB")

    def add(name: str, workers: str, network: Network) -> None:
        memory = network.memory
        table.add_row(
            name,
            workers,
            "+".join(map(str, network.blocks)) or "-",
            f"{network.parameters:,}",
            f"{network.forward_macs / 1e9:.3f}",
            f"{memory.activations / 1e9:.3f}",
            f"{memory.peak / 1e9:.3f}",
        )

    add("one machine", "1", report.full)
    for row in report.rows:
        add(row.strategy, str(row.workers), max(row.networks, key=lambda network: network.memory.peak))
    return table


def _sent(report: Report) -> Table:
    table = _table("paper's count", "sent", "of it state", "link mean", "link worst", "worst/mean of run")
    for row in report.rows:
        traffic = row.traffic
        cells = (
            traffic.paper_bytes,
            traffic.total_bytes,
            traffic.bytes.get("state", 0.0),
            traffic.link_bytes,
            traffic.worst_link_bytes,
        )
        amounts = [f"{cell / 1e9:.3f}" for cell in cells]
        table.add_row(row.strategy, str(row.workers), *amounts, f"{traffic.link_ratio:.2f}")
    return table


def _on_gpus(report: Report) -> Table:
    table = _table("hosted", "training", "test", "CUDA", "NCCL", "data set", "in all")
    for row in report.rows:
        if row.gpu is not None:
            gpu = row.gpu
            cells = (gpu.training, gpu.test, gpu.context, gpu.communicator, gpu.data, gpu.total)
            amounts = [f"{cell / 1e9:.3f}" if cell else "-" for cell in cells]
            table.add_row(row.strategy, str(row.workers), str(gpu.workers), *amounts)
    return table


def _timed(report: Report) -> Table:
    table = _table("compute", "exchange", "(hidden)", "round", "stall", "images/s", "speedup")
    for row in report.rows:
        seconds = row.seconds
        if seconds is not None:
            cells = (seconds.compute, seconds.exchange, seconds.hidden, seconds.round)
            amounts = [*map(_amount, cells), f"{seconds.stall:.1%}", _amount(seconds.images_s)]
            table.add_row(row.strategy, str(row.workers), *amounts, f"{report.speedups(row)['one machine']:.2f}x")
    return table


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("strategy")
    for column in ("S", *columns):
        table.add_column(column, justify="right")
    return table


def _network_json(network: Network) -> dict[str, Any]:
    return {
        "blocks": list(network.blocks),
        "parameters": network.parameters,
        "forward_macs": network.forward_macs,
        "training_flops": network.training_flops,
        "memory_bytes": asdict(network.memory),
    }


def _amount(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _compared(name: str, ratio: float) -> str:
    return f"equal to {name}" if ratio < 1.05 else f"{ratio:.3g}x {name}"
