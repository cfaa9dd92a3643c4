"""`resist train`: complete and check the options, then train here or start the processes of this machine."""

import json
import os
import shutil
import sys
import tempfile
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resist.cli.guard import guarded, keep_errors_in
from resist.errors import UserError
from resist.runs.config import MachineConfig, TrainConfig
from resist.runs.directory import check_free, check_resumable, default_out
from resist.runs.elastic import at_size, bounds_of
from resist.runs.lock import RunLock
from resist.training.launcher import INTERRUPTED, launch, launched, num_processes, prepare_fork, watch_launcher
from resist.training.wall import begin_run, end_run

if TYPE_CHECKING:
    from resist.tasks import Task

# What may change when a run resumes, by part of the configuration.
MAY_CHANGE = {
    "network": {"data_dir", "data_workers"},
    "method": {"workers", "on_nonfinite", "replicate"},
    "optimization": {"lr"},
    "machine": {f.name for f in fields(MachineConfig)},
    "run": {"resume"},
}


def resumed(config: TrainConfig, given: frozenset[str]) -> TrainConfig:
    """Return the configuration of the run to resume, changed by the options that may change.

    Args:
        config: The options of this command line, or of its configuration file.
        given: The names of those that were given.

    Returns:
        `config`, where it resumes no run.

    Raises:
        UserError: For options that cannot change, and for a directory that is not that of a run.
    """
    from resist.runs.config_file import read_config

    if config.run.resume is None:
        return config
    before = read_config(config.run.resume)
    values, values_before = (
        {name: value for f in fields(c) for name, value in vars(getattr(c, f.name)).items()} for c in (config, before)
    )
    for name in sorted(given.difference(*MAY_CHANGE.values())):
        if values[name] == values_before[name]:
            continue
        raise UserError(f"`{name}` cannot change in a resumed run; remove it")
    parts: dict[str, Any] = {}
    for part, names in MAY_CHANGE.items():
        changed = {name: getattr(getattr(config, part), name) for name in names & given}
        parts[part] = replace(getattr(before, part), **changed)
    after = TrainConfig(**parts)
    # The same number of images in all.
    epochs = before.optimization.epochs * before.method.workers / max(1, after.method.workers)
    return replace(after, optimization=replace(after.optimization, epochs=epochs))


def run_train(config: TrainConfig, given: frozenset[str]) -> int:
    """Train in this process, or start the processes that train. Returns the exit status."""
    restarted, out = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0, config.run.out
    if restarted and out is not None and (out / "config.json").exists():
        # torchrun has started this process again after a worker died: resume from the last checkpoint
        config, given = replace(config, run=replace(config.run, resume=out)), frozenset({"resume"})
    config = resumed(config, given)
    if config.machine.elastic is not None:
        config = _elastic(config, given)
    config.check()
    return start(config)


def _elastic(config: TrainConfig, given: frozenset[str]) -> TrainConfig:
    """Complete the options of a run whose processes come and go. Raises UserError where it cannot be started so."""
    assert config.machine.elastic is not None
    bounds = bounds_of(config.machine.elastic)
    if launched():
        raise UserError(
            "`elastic`: RANK and WORLD_SIZE are set, as by torchrun, whose processes have fixed numbers; start resist "
            "without them, with the address of a `resist rendezvous` in MASTER_ADDR and MASTER_PORT"
        )
    if joins() and config.run.out is None and config.run.resume is None:
        raise UserError("`elastic` with MASTER_ADDR: give `out`, the same directory in all processes")
    if "workers" in given or config.run.resume is not None:
        return config
    return replace(config, method=replace(config.method, workers=bounds.most or config.method.workers))


def joins() -> bool:
    """Return True in a process that joins an elastic run: it has the address of the store."""
    return bool(os.environ.get("MASTER_ADDR"))


def start(config: TrainConfig) -> int:
    """Train with options that have been checked. Returns the exit status."""
    out = config.run.resume or config.run.out or default_out(config)
    if config.run.resume is None:
        config = replace(config, run=replace(config.run, out=out))
    keep_errors_in(out)
    if launched() or (config.machine.elastic is not None and joins()):
        return _train(config)
    begin_run()
    try:
        return _launch(config, out, prepare_fork())
    finally:
        end_run()


def _train(config: TrainConfig, task: "Task | None" = None) -> int:
    """Train as one process of a job that torchrun or the launcher has started; a fork of the latter has `task`."""
    from resist.training.compiler import check_compiler
    from resist.training.device import pick_device
    from resist.training.train import train

    checked = watch_launcher()
    if config.machine.elastic is not None:
        from resist.training.elastic import train_elastic

        return train_elastic(config, task, checked=checked)
    if config.machine.compile and task is None:  # forks have the compiler that the launcher has tried
        check_compiler(pick_device(config.machine.device))
    return train(config, task, checked=checked)


def _launch(config: TrainConfig, out: Path, forkable: bool) -> int:
    """Check the options without the workers, then start the workers and restart them where `restarts` says so."""
    from resist.training.loggers import check_loggers

    check_loggers(config)
    if config.run.resume is None:
        check_free(out)
    else:
        check_resumable(out, config)
        with RunLock(out, "train", beat=False):  # it is refused here, before the process that writes takes the lock
            pass

    import torch  # as late as possible: it takes seconds

    from resist.runs.saved import newest
    from resist.training.compiler import check_compiler
    from resist.training.device import pick_device
    from resist.training.optimizers import resolve
    from resist.training.preflight import check_options, check_task
    from resist.training.resume import all_done
    from resist.training.train import open_data, train  # before the forks, which then have it

    threads = torch.get_num_threads()
    if forkable:
        torch.set_num_threads(1)  # OpenMP keeps the threads that it has started, and then the process cannot be forked
    config = replace(config, optimization=resolve(config.optimization))
    device = pick_device(config.machine.device)
    if config.machine.compile:
        check_compiler(device)
    bounds = None if config.machine.elastic is None else bounds_of(config.machine.elastic)
    processes = num_processes(config) if bounds is None else config.method.workers
    check_options(config, device, processes, range(config.method.workers if device.type == "cpu" else 1))
    if processes == 1 and bounds is None:
        torch.set_num_threads(threads)
        return train(config)
    forkable = forkable and device.type == "cpu"
    if forkable:
        import torch._dynamo  # once for all forks: every optimizer imports it
    task = open_data(config)  # a check for all processes, and for forks the data, whose memory they share
    if all_done(config, task.num_images):
        return 0
    check_task(config if bounds is None else at_size(config, bounds.most or processes), task)
    if not forkable:
        task = None
    status = _start_processes(config, processes, task)
    saved = newest(out / "checkpoints")[0] is not None
    if status > 128:  # a signal to this process: the workers have saved what they could
        return INTERRUPTED if saved else status
    config = replace(config, run=replace(config.run, resume=out))
    for attempt in range(1, config.machine.restarts + 1):
        if status in (0, 2, INTERRUPTED) or not (out / "config.json").exists():
            break
        print(f"resist: restart {attempt} of {config.machine.restarts}, from the last checkpoint", file=sys.stderr)
        begin_run()
        status = _start_processes(config, processes, task)
    return status


def _start_processes(config: TrainConfig, processes: int, task: "Task | None") -> int:
    """Start the processes and wait for them. Returns the exit status.

    Where there is a `task`, they are forks, which get it and `config`. Others get a file with the options.
    """

    def train_fork() -> None:
        sys.exit(guarded(lambda: _train(config, task)))

    timeout_s, workers = config.machine.timeout_s, config.method.workers
    fork = None if task is None else train_fork
    folder = Path(tempfile.mkdtemp(prefix="resist-"))  # a TemporaryDirectory would end with the first fork that ends
    try:
        arguments = _arguments(config, folder / "config.json")
        if config.machine.elastic is None:
            return launch(arguments, processes, timeout_s, workers, fork=fork)
        from resist.training.elastic import ended_key
        from resist.training.supervisor import supervise

        out = config.run.resume or config.run.out
        assert out is not None
        return supervise(arguments, processes, timeout_s, out, ended_key(out), fork=fork)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _arguments(config: TrainConfig, file: Path) -> list[str]:
    """Write the configuration into a file, and return the command line of a process that trains with it.

    A process that resumes reads the configuration of the run itself, so it gets what may change alone.
    """
    content = config.to_json()
    where = ["--out", str(config.run.out)]
    if config.run.resume is not None:
        content = {part: {n: v for n, v in content[part].items() if n in names} for part, names in MAY_CHANGE.items()}
        where = ["--resume", str(config.run.resume)]
    file.write_text(json.dumps(content), encoding="utf-8")
    return ["train", "--config", str(file), *where]
