"""`resist compare`: train by several strategies with the same data, seeds and budget, one after another."""

import contextlib
import json
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.table import Table

from resist.cli.train import MAY_CHANGE, resumed, start
from resist.errors import UserError, first_line, quoted
from resist.planning.methods import BASELINE, DEFAULT, METHODS
from resist.report.compare import compare
from resist.report.conclusion import conclusion
from resist.runs.atomic import write_atomically
from resist.runs.config import (
    MachineConfig,
    MethodConfig,
    NetworkConfig,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
)
from resist.runs.config_file import from_json, read_config
from resist.runs.directory import check_free
from resist.runs.history import read_history, read_table
from resist.runs.lock import FILE, RunLock

# In the directory of a comparison: its strategies, seeds and options.
SETTINGS = "settings.json"
# What may change when a comparison goes on.
CHANGEABLE = MAY_CHANGE["network"] | MAY_CHANGE["machine"]


@dataclass(frozen=True)
class CompareConfig:
    """Train a network on the same data by several strategies, one after another; a table and a picture."""

    NOT_OPTIONS: ClassVar[dict[str, str]] = {
        "strategy": "is for one run; compare takes --strategies",
        "seed": "is for one run; compare takes --seeds",
        "resume": "has another meaning than for one run",
        "elastic": "is for one run",
    }

    strategies: tuple[str, ...] = (DEFAULT, BASELINE)
    """Strategies to compare. resist: a sub-network for each worker. local_sgd, diloco, ddp: the full network for each
    worker."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each strategy is trained once with each."""
    resume: Path | None = None
    """Directory of a comparison to go on with: finished runs are kept, interrupted ones are resumed, missing ones are
    trained. Only machine options, `data_dir` and `data_workers` may change; all others are those of the comparison."""
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
                run = replace(self.run, out=out / f"{name}-seed{seed}", seed=seed, resume=None)
                runs.append(TrainConfig(self.network, method, self.optimization, self.machine, run))
        return runs


def run_compare(config: CompareConfig, given: frozenset[str]) -> int:
    """Train, compare and print. Returns the exit status: that of the first run that failed. Raises UserError."""
    out = config.resume or config.run.out
    if config.resume is not None:
        config = _going_on(config, config.resume, given)
    for name, values in (("strategies", config.strategies), ("seeds", config.seeds)):
        if not values:
            raise UserError(f"`{name}` names none; give at least one")
        if len(set(values)) < len(values):
            raise UserError(f"`{name}={' '.join(map(str, values))}` names one twice; name each once")
    out = out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{config.network.data}-compare"
    if config.resume is None:
        check_free(out)
    config.check_options()
    runs = config.runs(out)
    for run in runs:
        run.check()
    with contextlib.ExitStack() as after:
        try:
            if config.resume is None:
                out.mkdir(parents=True)
                after.callback(_remove_unused, out)
            lock = after.enter_context(RunLock(out, "compare", beat=False))  # with a thread, no run could be forked
            if config.resume is None:
                write_atomically(out / SETTINGS, json.dumps(_settings(config), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"`out={out}` cannot be written: {error.strerror}; give another directory") from error
        status = _train_all(runs, given & CHANGEABLE, lock)
        if status == 0:
            _compare_all(runs, out)
        elif any((run.run.out or out).exists() for run in runs):
            print(f"to go on with the comparison: resist compare --resume {quoted(out)}", flush=True)
    return status


def _train_all(runs: list[TrainConfig], given: frozenset[str], lock: RunLock) -> int:
    """Train the runs that are not finished. Returns the exit status of the first one that failed, or 0.

    Args:
        runs: The runs.
        given: The options that were given and may change in runs that are resumed.
        lock: The lock of the comparison.
    """
    for number, run in enumerate(runs, start=1):
        out = run.run.out
        assert out is not None
        lock.check()
        begun = (out / "config.json").exists()
        finished = begun and _is_finished(run, out)
        print(f"[{number}/{len(runs)}] {out}{': finished before' * finished}", flush=True)
        if finished:
            continue
        if begun:
            run = resumed(replace(run, run=replace(run.run, resume=out)), given | {"resume"})
            run.check()
        else:
            _remove_unused(out)
        if (status := start(run)) != 0:
            return status
    return 0


def _compare_all(runs: list[TrainConfig], out: Path) -> None:
    """Write the comparison of finished runs, and print it."""
    from resist.report.png import draw_comparison  # needs matplotlib

    histories = [read_history(run.run.out) for run in runs if run.run.out is not None]
    comparison = compare(histories)
    write_atomically(out / "compare.json", json.dumps(comparison, indent=1) + "\n")
    draw_comparison(histories, [out / "compare.png", out / "compare.svg"])
    print()
    print_comparison(comparison, Console(highlight=False, soft_wrap=True))
    print(f"saved to {out}: compare.json, compare.png, compare.svg")


def _is_finished(run: TrainConfig, path: Path) -> bool:
    """Find out whether a run is finished. Raises UserError where it was trained with other options."""
    before = _flat(read_config(path))
    for name, value in _flat(run).items():
        # Where an option is None, a run has the default that belongs to its optimizer.
        if name not in CHANGEABLE | {"out", "resume"} and value is not None and before[name] != value:
            raise UserError(
                f"{path} was trained with `{name}={before[name]}`, the comparison has {value}; move it elsewhere, and "
                "it is trained again"
            )
    return read_table(path / "state.json", []).get("state") == "finished" and (path / "model.safetensors").exists()


def _remove_unused(path: Path) -> None:
    """Remove a directory in which no run has begun. Another one stays as it is."""
    with contextlib.suppress(OSError):
        files = list(path.iterdir())
        made = {FILE, SETTINGS, "environment.json", *(file.name for file in files if file.stat().st_size == 0)}
        if all(file.name in made or file.name.endswith(".partial") for file in files):
            for file in files:
                file.unlink()
            path.rmdir()


def _settings(config: CompareConfig) -> dict[str, Any]:
    parts = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
    options = replace(TrainConfig(**parts), run=replace(config.run, out=None, resume=None)).to_json()
    return {"strategies": config.strategies, "seeds": config.seeds, "options": options}


def _going_on(config: CompareConfig, path: Path, given: frozenset[str]) -> CompareConfig:
    """Return the configuration of a comparison that goes on, changed by the options that may change.

    Args:
        config: The options of this command line.
        path: The directory of the comparison.
        given: The names of the options that were given.

    Raises:
        UserError: For other options that differ, and for a directory that is not that of a comparison.
    """
    if "out" in given:
        raise UserError(f"`out={config.run.out}` and `resume={path}` contradict each other; give one")
    try:
        content = json.loads((path / SETTINGS).read_bytes())
        options = from_json(content["options"])
        strategies, seeds = tuple(map(str, content["strategies"])), tuple(map(int, content["seeds"]))
    except OSError as error:
        raise UserError(f"{path} is not a directory of resist compare: {SETTINGS}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path / SETTINGS} is damaged: {first_line(error)}; restore it, or compare again") from error
    parts = {f.name: getattr(options, f.name) for f in fields(TrainConfig)}
    before = CompareConfig(strategies, seeds, path, **parts)
    if "seed" in given:  # of a configuration file
        given = given - {"seed"} | {"seeds"}
    old, new = _flat(before), _flat(config)
    for name in sorted(given - CHANGEABLE - set(CompareConfig.NOT_OPTIONS)):
        if new[name] != old[name]:
            raise UserError(f"`{name}` cannot change in a comparison that goes on; remove it")
    changed = {name: new[name] for name in given & CHANGEABLE}
    parts = {
        part: replace(value, **{name: changed[name] for name in vars(value) if name in changed})
        for part, value in (("network", before.network), ("machine", before.machine))
    }
    return replace(before, **parts)


def _flat(config: CompareConfig | TrainConfig) -> dict[str, Any]:
    """The values of all options by name."""
    own = {name: value for name, value in vars(config).items() if name not in {f.name for f in fields(TrainConfig)}}
    parts = (getattr(config, f.name) for f in fields(TrainConfig))
    return {name: value for part in parts for name, value in vars(part).items()} | own


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
