"""The command line. Bad input ends in one line on stderr and exit status 2, a lost worker in one line and status 1."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from torch import nn

from resist.checkpoint import newest
from resist.config import MachineConfig, MethodConfig, NetworkConfig, OptimisationConfig, RunConfig, TrainConfig
from resist.cost import STRATEGIES, Link, Speed, calibrate, predict, print_table
from resist.data import image_size_of, load, num_classes_of
from resist.draw import partition_svg
from resist.errors import AgreedError, UserError, WorkerLostError
from resist.evaluate import evaluate_run
from resist.launch import launch, launched, num_processes
from resist.models import build
from resist.report.compare import compare, draw_comparison, print_comparison
from resist.report.history import History, read_history
from resist.runs import check_free, default_out, read_config
from resist.show import describe, print_plan
from resist.train import INTERRUPTED, pick_device, train


@dataclass(frozen=True)
class PlanConfig:
    """Show what would be trained: parameters, chains, who holds which block. Trains nothing."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    num_classes: int | None = None
    """Classes of the head. Default: those of --data."""
    seed: int = 0
    """Seed of the plans."""
    rounds: int = 3
    """Rounds to show."""
    json: bool = False
    """Print JSON."""
    svg: Path | None = None
    """Draw the rounds into this file too, which must not exist yet."""


@dataclass(frozen=True)
class CostConfig:
    """Predict bytes, memory, FLOPs and, for given links and devices, seconds of each strategy. Trains nothing."""

    network: NetworkConfig = field(default_factory=NetworkConfig)
    num_classes: int | None = None
    """Classes of the head. Default: those of --data."""
    image_size: int | None = None
    """Height and width of an image. Default: those of --data."""
    workers: tuple[int, ...] = (2, 4, 8)
    """Numbers of workers to look at."""
    strategies: tuple[str, ...] = STRATEGIES
    """Strategies to look at."""
    local_steps: int = 50
    """Optimizer steps from one synchronisation to the next."""
    batch_size: int = 128
    """Images of a worker in one step."""
    min_depth: int | None = None
    """As in resist train."""
    capacities: tuple[int, ...] = ()
    """As in resist train; for one number of workers."""
    optimizer_state: Literal["reset", "keep", "travel", "average"] = "travel"
    """As in resist train."""
    link_gbit_s: float | None = None
    """Rate of each worker's link, each way. With a speed of the devices, seconds are predicted."""
    latency_ms: float = 0.0
    """One-way latency of a link."""
    images_s: tuple[float, ...] = ()
    """Images per second that a device trains of the full network: one number, or one for each worker."""
    calibrate: bool = False
    """Measure --images-s here, on --device."""
    device: str = "auto"
    """What to calibrate: cpu, cuda, or auto."""
    json: bool = False
    """Print JSON."""


@dataclass(frozen=True)
class CompareConfig:
    """Train the same network on the same data by several strategies, one after another; a table and a picture."""

    strategies: tuple[str, ...] = ("resist", "local_sgd")
    """Strategies to compare: resist, local_sgd, diloco, ddp."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each strategy is trained once with each."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimisation: OptimisationConfig = field(default_factory=OptimisationConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def runs(self, out: Path) -> list[TrainConfig]:
        """What to train. Options that only ResIST has are left out for the others."""
        made: list[TrainConfig] = []
        for name in self.strategies:
            method = replace(self.method, strategy=name)  # type: ignore[arg-type]  # checked with the rest
            if name != "resist":
                method = replace(method, capacities=(), min_depth=None, warmup_rounds=0)
            if name == "ddp":
                method = replace(method, outer=None)
            for seed in self.seeds:
                run = replace(self.run, out=out / f"{name}-seed{seed}", seed=seed)
                made.append(TrainConfig(self.network, method, self.optimisation, self.machine, run))
        return made


@dataclass(frozen=True)
class EvaluateConfig:
    """Test the network that a run left behind, read from its directory."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    data_dir: Path | None = None
    """Where the data set lies. Default: as when it was trained."""
    device: str = "auto"
    """cpu, cuda, or auto."""


def resumed(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    """The configuration of the run that `--resume` names, with the machine and the number of workers given now."""
    path = config.run.resume
    if path is None:
        return config
    before = read_config(path)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    machine = {f.name for f in fields(MachineConfig)}
    for name in sorted(given - machine - {"resume", "workers", "data_dir"}):
        raise UserError(f"--{name.replace('_', '-')} cannot change in a run that goes on; leave it out")
    workers = config.method.workers if "workers" in given else before.method.workers
    epochs = before.optimisation.epochs * before.method.workers / workers  # as many images for all together
    data_dir = config.network.data_dir if "data_dir" in given else before.network.data_dir
    return TrainConfig(
        network=replace(before.network, data_dir=data_dir),
        method=replace(before.method, workers=workers),
        optimisation=replace(before.optimisation, epochs=epochs),
        machine=replace(before.machine, **{name: getattr(config.machine, name) for name in machine & given}),
        run=replace(before.run, resume=path),
    )


def run_train(config: TrainConfig, arguments: list[str]) -> int:
    config.check()
    again, out = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0, config.run.out
    if again and out is not None and (out / "config.json").exists():
        # torchrun has started us again after a process died: go on from the last checkpoint
        config, arguments = replace(config, run=replace(config.run, resume=out)), []
    config = resumed(config, arguments)
    config.check()
    if launched():
        return train(config)
    # Everything that can be found wrong here is found once, before any process is started.
    plan_facts(PlanConfig(network=config.network, method=config.method, seed=config.run.seed))
    pick_device(config.machine.device)
    out = config.run.resume or config.run.out or default_out(config)
    if config.run.resume is None:
        check_free(out)
    processes = num_processes(config)
    if processes == 1:
        return train(config)
    load(config.network.data, config.network.data_dir)
    if config.run.resume is None:
        arguments = ["train", *replace(config, run=replace(config.run, out=out)).arguments()]
    status = launch(arguments, processes, config.machine.timeout_s)
    saved, machine = newest(out / "checkpoints")[0] is not None, TrainConfig(machine=config.machine).arguments()
    if status > 128:  # a signal to this process: the others have saved what they could
        return INTERRUPTED if saved else status
    for attempt in range(1, config.machine.restarts + 1):
        if status in (0, 2, INTERRUPTED) or not (out / "config.json").exists():
            break
        print(f"resist: restart {attempt} of {config.machine.restarts}, from the last checkpoint", file=sys.stderr)
        status = launch(["train", "--resume", str(out), *machine], processes, config.machine.timeout_s)
    return status


def plan_facts(config: PlanConfig) -> dict[str, Any]:
    network = config.network
    if config.rounds < 1:
        raise UserError(f"--rounds {config.rounds} is too small; give at least 1")
    whole = TrainConfig(network=network, method=config.method)
    whole.check()
    with torch.device("meta"):
        model = builder(network, config.num_classes)()
    return describe(model, whole, config.rounds)


def builder(network: NetworkConfig, num_classes: int | None) -> Callable[[], nn.Module]:
    """What builds the full network of these options."""
    classes = num_classes_of(network.data) if num_classes is None else num_classes
    return lambda: build(
        network.model,
        num_classes=classes,
        sections=network.sections,
        width=network.width,
        final_norm=network.final_norm,
    )


def run_plan(config: PlanConfig, arguments: list[str]) -> int:
    facts = plan_facts(config)
    if config.svg is not None:
        try:
            with config.svg.open("x", encoding="utf-8") as file:
                file.write(partition_svg(facts))
        except OSError as error:
            raise UserError(f"--svg {config.svg} cannot be written: {error.strerror}; give another file") from error
    if config.json:
        print(json.dumps(facts))
    else:
        print_plan(facts, Console(highlight=False, soft_wrap=True))
    return 0


def run_cost(config: CostConfig, arguments: list[str]) -> int:
    network, size = config.network, config.image_size or image_size_of(config.network.data)
    build_model = builder(network, config.num_classes)
    if config.calibrate and config.images_s:
        raise UserError("--calibrate measures what --images-s says; give one of the two")
    if config.latency_ms and config.link_gbit_s is None:
        raise UserError(f"--latency-ms {config.latency_ms} says nothing without --link-gbit-s; give both")
    link = None if config.link_gbit_s is None else Link(config.link_gbit_s, config.latency_ms)
    speeds = [Speed(images_s) for images_s in config.images_s]
    if config.calibrate:
        speeds = [
            calibrate(
                build_model,
                batch_size=config.batch_size,
                image_shape=(3, size, size),
                chains=network.chain,
                device=pick_device(config.device),
            )
        ]
    if (link is None) != (not speeds):
        raise UserError("seconds need both --link-gbit-s and a speed (--images-s or --calibrate); give both or none")
    report = predict(
        build_model,
        workers=config.workers,
        strategies=config.strategies,
        chains=network.chain,
        batch_size=config.batch_size,
        image_shape=(3, size, size),
        local_steps=config.local_steps,
        optimizer_state=config.optimizer_state,
        min_depth=config.min_depth,
        capacities=config.capacities or None,
        link=link,
        speed=speeds or None,
    )
    if config.json:
        print(json.dumps(report.to_json()))
    else:
        print_table(report, Console(highlight=False, soft_wrap=True))
    return 0


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


def run_evaluate(config: EvaluateConfig, arguments: list[str]) -> int:
    accuracy = evaluate_run(config.run, data_dir=config.data_dir, device=pick_device(config.device))
    print(f"test accuracy {100 * accuracy:.2f} %")
    return 0


COMMANDS: dict[str, tuple[type, Callable[..., int]]] = {
    "train": (TrainConfig, run_train),
    "plan": (PlanConfig, run_plan),
    "cost": (CostConfig, run_cost),
    "compare": (CompareConfig, run_compare),
    "evaluate": (EvaluateConfig, run_evaluate),
}


def main(arguments: list[str] | None = None) -> None:
    """`resist COMMAND ...`. Ends the process with its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    config = tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in COMMANDS.items()},
        prog="resist",
        description="Train a deep residual network with a different, shallower sub-network on each worker (ResIST).",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )
    action = next(action for kind, action in COMMANDS.values() if isinstance(config, kind))
    sys.exit(_guarded(lambda: action(config, arguments)))


def _guarded(action: Callable[[], int]) -> int:
    """The exit status of `action`, errors turned into one line."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        return action()
    except AgreedError as error:  # every process has it; the first one says it
        if rank == 0:
            print(f"resist: {error}", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"resist: {error}", file=sys.stderr)
        return 2
    except WorkerLostError as error:
        print(f"resist: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if rank == 0:
            print("resist: interrupted", file=sys.stderr)
        return 130
