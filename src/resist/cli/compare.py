"""`resist compare`: several strategies under the same data, seeds and budget, one after another."""

import json
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from rich.console import Console

from resist.cli.train import run_train
from resist.errors import UserError
from resist.report.compare import compare, draw_comparison, print_comparison
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
    """Train the same network on the same data by several strategies, one after another; a table and a picture."""

    strategies: tuple[str, ...] = ("resist", "local_sgd")
    """Strategies to compare: resist, local_sgd, diloco, ddp."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each strategy is trained once with each."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def runs(self, out: Path) -> list[TrainConfig]:
        """What to train. Options that only ResIST has are left out for the others."""
        made: list[TrainConfig] = []
        for name in self.strategies:
            method = replace(self.method, strategy=name)  # type: ignore[arg-type]  # checked with the rest
            if name != "resist":
                method = replace(method, capacities=(), min_depth=None, warmup_rounds=0, warmup_epochs=0.0)
            if name == "ddp":
                method = replace(method, outer=None)
            for seed in self.seeds:
                run = replace(self.run, out=out / f"{name}-seed{seed}", seed=seed)
                made.append(TrainConfig(self.network, method, self.optimization, self.machine, run))
        return made


def run_compare(config: CompareConfig, arguments: list[str]) -> int:
    for wrong, right in (("--strategy", "--strategies"), ("--seed", "--seeds")):
        if wrong in arguments:
            raise UserError(f"{wrong} is for one run; compare takes {right}")
    if len(set(config.strategies)) < len(config.strategies) or len(set(config.seeds)) < len(config.seeds):
        raise UserError("--strategies and --seeds have to name each strategy and seed once")
    out = config.run.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.network.data}-compare"
    check_free(out)
    runs = config.runs(out)
    for one in runs:
        one.check()
    histories: list[History] = []
    for number, one in enumerate(runs, start=1):
        assert one.run.out is not None
        print(f"[{number}/{len(runs)}] {one.run.out}", flush=True)
        status = run_train(one, ["train", *one.arguments()])
        if status != 0:
            return status
        histories.append(read_history(one.run.out))
    facts = compare(histories)
    (out / "compare.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    draw_comparison(histories, [out / "compare.png", out / "compare.svg"])
    print()
    print_comparison(facts, Console(highlight=False, soft_wrap=True))
    print(f"kept in {out}: compare.json, compare.png, compare.svg")
    return 0
