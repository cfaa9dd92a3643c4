"""Start the processes of one machine, with torch's elastic launcher, where nobody else has started them."""

import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import SignalException  # type: ignore[attr-defined]
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from resist.config import TrainConfig


def launched() -> bool:
    """Whether this process was started by torchrun, or by `launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def num_processes(config: TrainConfig) -> int:
    """Processes for this machine: what was asked for, else one for each GPU, or one for each worker on the CPU."""
    workers = config.method.workers
    if config.machine.processes is not None:
        return config.machine.processes
    if config.machine.device != "cpu" and torch.cuda.is_available():
        return min(workers, torch.cuda.device_count())
    return workers


def launch(arguments: Sequence[str], processes: int, timeout_s: float) -> int:
    """Run `resist` with `arguments` in that many processes of this machine and wait for them. Returns the exit status.

    The processes print for themselves. When one fails, the others are ended.
    """
    for name in ["torch.distributed.elastic", *logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed.elastic"):  # what it logs, our own lines say
            logging.getLogger(name).setLevel(logging.CRITICAL)
    # Processes that share the cores must not each start a thread for all of them.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    # On a signal the processes first end their round and save; without this, torch ends them after 30 s.
    known = {f.name for f in dataclasses.fields(LaunchConfig)}  # torch 2.11 does not have it
    patience: dict[str, Any] = {"shutdown_timeout": int(timeout_s)} if "shutdown_timeout" in known else {}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=f"resist-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        **patience,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "resist", *arguments)
    except ChildFailedError as failed:
        rank, first = failed.get_first_failure()
        if first.exitcode < 0:
            if sys.stdout.isatty():  # it may have died with the cursor hidden by its display
                print("\x1b[?25h", end="", flush=True)
            name = signal.Signals(-first.exitcode).name
            print(f"resist: process {rank} was ended by {name}; the others were stopped", file=sys.stderr)
            return 1
        return first.exitcode
    except SignalException as ended:
        return 128 + ended.sigval
    return 0
