"""`resist train`: complete and check the options, then train here or start the processes of this machine."""

import os
import sys
from dataclasses import fields, replace

from resist.cli.plan import PlanConfig, describe_plan
from resist.errors import UserError
from resist.runs.config import MachineConfig, TrainConfig
from resist.training.launcher import INTERRUPTED, launch, launched, num_processes, prepare_fork, watch_launcher


def resumed(config: TrainConfig, arguments: list[str]) -> TrainConfig:
    """Return the configuration of the run to resume, changed by the options that may change.

    Args:
        config: The options of this command line.
        arguments: The command line itself, which shows the options that were given.

    Returns:
        `config`, where it resumes no run.

    Raises:
        UserError: For options that cannot change, and for a directory that is not that of a run.
    """
    from resist.runs.history import read_config

    path = config.run.resume
    if path is None:
        return config
    before = read_config(path)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in arguments if word.startswith("--")}
    machine = {f.name for f in fields(MachineConfig)}
    may = machine | {"resume", "workers", "data_dir", "data_workers", "lr", "on_nonfinite", "replicate"}
    for name in sorted(given - may):
        raise UserError(f"--{name.replace('_', '-')} cannot change in a resumed run; remove it")
    workers = config.method.workers if "workers" in given else before.method.workers
    epochs = before.optimization.epochs * before.method.workers / workers  # the same number of images in all
    lr = config.optimization.lr if "lr" in given else before.optimization.lr
    method = {name: getattr(config.method, name) for name in {"on_nonfinite", "replicate"} & given}
    network = {name: getattr(config.network, name) for name in {"data_dir", "data_workers"} & given}
    return TrainConfig(
        network=replace(before.network, **network),
        method=replace(before.method, workers=workers, **method),
        optimization=replace(before.optimization, epochs=epochs, lr=lr),
        machine=replace(before.machine, **{name: getattr(config.machine, name) for name in machine & given}),
        run=replace(before.run, resume=path),
    )


def run_train(config: TrainConfig, arguments: list[str]) -> int:
    """Train in this process, or start the processes that train. Returns the exit status."""
    if config.run.resume is None:  # else most of it comes from the run
        config.check()
    restarted, out = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0, config.run.out
    if restarted and out is not None and (out / "config.json").exists():
        # torchrun has started this process again after a worker died: resume from the last checkpoint
        config, arguments = replace(config, run=replace(config.run, resume=out)), []
    if launched():
        config = resumed(config, arguments)
        config.check()
        watch_launcher()
        from resist.training.train import train

        return train(config)
    forkable = prepare_fork()
    config = resumed(config, arguments)
    config.check()
    return _launch(config, arguments, forkable)


def _launch(config: TrainConfig, arguments: list[str], forkable: bool) -> int:
    """Check the options without the workers, then start the workers and restart them where `restarts` says so."""
    from resist.runs.directory import check_free, default_out
    from resist.training.loggers import check_loggers

    check_loggers(config)
    out = config.run.resume or config.run.out or default_out(config)
    if config.run.resume is None:
        check_free(out)

    import torch  # as late as possible: it takes seconds

    from resist.runs.checkpoint import newest
    from resist.tasks import open_task
    from resist.training.device import pick_device
    from resist.training.train import train  # before the forks, which then have it

    threads = torch.get_num_threads()
    if forkable:
        torch.set_num_threads(1)  # OpenMP keeps the threads that it has started, and then the process cannot be forked
    method = replace(config.method, warmup_epochs=0.0)
    describe_plan(PlanConfig(network=config.network, method=method, seed=config.run.seed))
    device = pick_device(config.machine.device)
    processes = num_processes(config)
    if processes == 1:
        torch.set_num_threads(threads)
        return train(config)
    from resist.cli import main

    fork = main if forkable and device.type == "cpu" else None
    if fork is not None:
        import torch._dynamo  # once for all forks: every optimizer imports it
    open_task(config.network)
    if config.run.resume is None:
        arguments = ["train", *replace(config, run=replace(config.run, out=out)).arguments()]
    timeout_s, workers = config.machine.timeout_s, config.method.workers
    status = launch(arguments, processes, timeout_s, workers, fork=fork)
    saved, machine = newest(out / "checkpoints")[0] is not None, TrainConfig(machine=config.machine).arguments()
    if status > 128:  # a signal to this process: the workers have saved what they could
        return INTERRUPTED if saved else status
    for attempt in range(1, config.machine.restarts + 1):
        if status in (0, 2, INTERRUPTED) or not (out / "config.json").exists():
            break
        print(f"resist: restart {attempt} of {config.machine.restarts}, from the last checkpoint", file=sys.stderr)
        status = launch(["train", "--resume", str(out), *machine], processes, timeout_s, workers, fork=fork)
    return status
