"""`resist train`: what is given on the command line, or by the run that goes on; the processes of this machine."""

import os
import sys
from dataclasses import fields, replace

from resist.cli.plan import PlanConfig, plan_facts
from resist.errors import UserError
from resist.runs.checkpoint import newest
from resist.runs.config import MachineConfig, TrainConfig
from resist.runs.directory import check_free, default_out
from resist.runs.history import read_config
from resist.tasks import open_task
from resist.training.device import pick_device
from resist.training.launcher import launch, launched, num_processes, watch_launcher
from resist.training.loggers import check_loggers
from resist.training.loop import INTERRUPTED
from resist.training.train import train


def resumed(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    """The configuration of the run that `--resume` names, with the machine and the number of workers given now."""
    path = config.run.resume
    if path is None:
        return config
    before = read_config(path)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    machine = {f.name for f in fields(MachineConfig)}
    may = machine | {"resume", "workers", "data_dir", "data_workers", "lr", "on_nonfinite", "replicate"}
    for name in sorted(given - may):
        raise UserError(f"--{name.replace('_', '-')} cannot change in a run that goes on; leave it out")
    workers = config.method.workers if "workers" in given else before.method.workers
    epochs = before.optimization.epochs * before.method.workers / workers  # as many images for all together
    lr = config.optimization.lr if "lr" in given else before.optimization.lr
    again = {name: getattr(config.method, name) for name in {"on_nonfinite", "replicate"} & given}
    here = {name: getattr(config.network, name) for name in {"data_dir", "data_workers"} & given}
    return TrainConfig(
        network=replace(before.network, **here),
        method=replace(before.method, workers=workers, **again),
        optimization=replace(before.optimization, epochs=epochs, lr=lr),
        machine=replace(before.machine, **{name: getattr(config.machine, name) for name in machine & given}),
        run=replace(before.run, resume=path),
    )


def run_train(config: TrainConfig, arguments: list[str]) -> int:
    if config.run.resume is None:  # else most of it comes from the run
        config.check()
    again, out = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0, config.run.out
    if again and out is not None and (out / "config.json").exists():
        # torchrun has started us again after a process died: go on from the last checkpoint
        config, arguments = replace(config, run=replace(config.run, resume=out)), []
    config = resumed(config, arguments)
    config.check()
    if launched():
        watch_launcher()
        return train(config)
    # Everything that can be found wrong here is found once, before any process is started.
    method = replace(config.method, warmup_epochs=0.0)
    plan_facts(PlanConfig(network=config.network, method=method, seed=config.run.seed))
    pick_device(config.machine.device)
    check_loggers(config)
    out = config.run.resume or config.run.out or default_out(config)
    if config.run.resume is None:
        check_free(out)
    processes = num_processes(config)
    if processes == 1:
        return train(config)
    open_task(config.network)
    if config.run.resume is None:
        arguments = ["train", *replace(config, run=replace(config.run, out=out)).arguments()]
    timeout_s, workers = config.machine.timeout_s, config.method.workers
    status = launch(arguments, processes, timeout_s, workers)
    saved, machine = newest(out / "checkpoints")[0] is not None, TrainConfig(machine=config.machine).arguments()
    if status > 128:  # a signal to this process: the others have saved what they could
        return INTERRUPTED if saved else status
    for attempt in range(1, config.machine.restarts + 1):
        if status in (0, 2, INTERRUPTED) or not (out / "config.json").exists():
            break
        print(f"resist: restart {attempt} of {config.machine.restarts}, from the last checkpoint", file=sys.stderr)
        status = launch(["train", "--resume", str(out), *machine], processes, timeout_s, workers)
    return status
