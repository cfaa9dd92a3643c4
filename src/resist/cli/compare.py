"""`resist compare`: train by several strategies with the same data, seeds and budget, one after another."""

import json
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from resist.cli.train import start
from resist.errors import UserError
from resist.planning.methods import BASELINE, DEFAULT, METHODS
from resist.report.compare import compare
from resist.report.conclusion import conclusion
from resist.runs.config import (
    MachineConfig,
    MethodConfig,
    NetworkConfig,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
)
from resist.runs.directory import check_free
from resist.runs.history import History, read_history


@dataclass(frozen=True)
class CompareConfig:
    """Train a network on the same data by several strategies, one after another; a table and a picture."""

    NOT_OPTIONS: ClassVar[dict[str, str]] = {
        "strategy": "is for one run; compare takes --strategies",
        "seed": "is for one run; compare takes --seeds",
        "resume": "is for one run; give it to resist train",
    }

    strategies: tuple[str, ...] = (DEFAULT, BASELINE)
    """Strategies to compare. resist: a sub-network for each worker. local_sgd, diloco, ddp: the full network for each
    worker."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each strategy is trained once with each."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def check_options(self) -> None:
        """Raise UserError for an option that has no effect with any of the strategies."""
        methods = [replace(self.method, strategy=name) for name in self.strategies if name in METHODS]  # type: ignore[arg-type]
        without = [set(method.without_effect()) for method in methods]
        for name in sorted(set.intersection(*without)) if without else ():
            raise UserError(f"`{name}` has no effect with `strategies={' '.join(self.strategies)}`; remove it")

    def runs(self, out: Path) -> list[TrainConfig]:
        """The runs to train, in order. Options that have no effect with a strategy are left out of its runs.

        Args:
            out: The directory that the run directories are created in.
        """
        runs: list[TrainConfig] = []
        for name in self.strategies:
            method = replace(self.method, strategy=name)  # type: ignore[arg-type]  # checked with the rest
            if name in METHODS:
                method = replace(method, **method.without_effect())
            for seed in self.seeds:
                run = replace(self.run, out=out / f"{name}-seed{seed}", seed=seed)
                runs.append(TrainConfig(self.network, method, self.optimization, self.machine, run))
        return runs


def run_compare(config: CompareConfig, given: frozenset[str]) -> int:
    """Train, compare and print. Returns the exit status: that of the first run that failed. Raises UserError."""
    if len(set(config.strategies)) < len(config.strategies) or len(set(config.seeds)) < len(config.seeds):
        raise UserError("--strategies and --seeds have to name each strategy and seed once")
    out = config.run.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.network.data}-compare"
    check_free(out)
    config.check_options()
    runs = config.runs(out)
    for run in runs:
        run.check()
    histories: list[History] = []
    for number, run in enumerate(runs, start=1):
        assert run.run.out is not None
        print(f"[{number}/{len(runs)}] {run.run.out}", flush=True)
        status = start(run)
        if status != 0:
            return status
        histories.append(read_history(run.run.out))
    from resist.report.png import draw_comparison  # needs matplotlib

    comparison = compare(histories)
    (out / "compare.json").write_text(json.dumps(comparison, indent=1) + "\n", encoding="utf-8")
    draw_comparison(histories, [out / "compare.png", out / "compare.svg"])
    print()
    print_comparison(comparison, Console(highlight=False, soft_wrap=True))
    print(f"saved to {out}: compare.json, compare.png, compare.svg")
    return 0


def print_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Print a comparison (see `resist.report.compare.compare`) as a table, a row for each strategy."""
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    target = comparison["equal_accuracy"]
    equal = "equal" if target is None else f"to {100 * target:.1f}%"
    names = ("test %", "time s", "comp. s", "exch. s", "sent MB", f"s {equal}", f"MB {equal}", "speed-up")
    rows: list[list[str]] = []
    for row in comparison["rows"]:
        spread = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.2f}"
        accuracy = "-" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}{spread}"
        rows.append([
            row["label"], accuracy, f"{row['time_s']:.1f}", f"{row['compute_s']:.1f}",
            f"{row['exchange_s']:.1f}", f"{row['bytes'] / 1e6:.1f}", _or_dash(row["time_s_to_equal_accuracy"]),
            _or_dash(row["bytes_to_equal_accuracy"], 1e-6), _or_dash(row["speed_up"]["time"], digits=2),
        ])  # fmt: skip
    for name, cells in zip(("strategy", *names), zip(*rows, strict=True), strict=True):
        # Where there is little room, heads are cut into lines, numbers never.
        table.add_column(name, justify="right" if name in names else "left", min_width=max(map(len, cells)))
    for cells in rows:
        table.add_row(*cells)
    console.print(table)
    for text in conclusion(comparison):
        console.print(text)
    console.print(
        f"speed-up: time of a step of {BASELINE} divided by that of the row; times do not include evaluations"
    )


def _or_dash(value: float | None, factor: float = 1.0, digits: int = 1) -> str:
    return "-" if value is None else f"{value * factor:.{digits}f}"
