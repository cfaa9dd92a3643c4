"""`resist probe`: measure the links between the processes of a job, for `resist cost`."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resist.cli.guard import guarded
from resist.errors import UserError
from resist.runs.atomic import write_new
from resist.runs.bounds import check_device, check_size
from resist.training.launcher import launch, launched, prepare_fork, watch_launcher

if TYPE_CHECKING:
    from resist.cost.links import Measured

# Seconds of measuring, at most, for many processes.
MOST_S = 60.0
# Processes that are started on one machine, at most: they share its cores, and its loopback interface.
MOST_HERE = 16
# Processes whose pairs are shown one by one.
SHOWN = 8


@dataclass(frozen=True)
class ProbeConfig:
    """Measure latency and rate of the links between processes, started as those of train on several machines."""

    processes: int | None = None
    """Processes to start on this machine, which measure its loopback interface. Default: this process is one of those
    that torchrun has started, or whose number RANK and WORLD_SIZE say."""
    out: Path | None = None
    """File to write, which must not exist yet, for resist cost --link-file. The first process writes it."""
    device: str = "auto"
    """Device that messages come from: cpu, cuda, or auto: cuda where there is a GPU."""
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    """How messages go between processes. auto: NCCL if each process has a GPU of its own, else gloo."""
    timeout_s: float = 120.0
    """Seconds to wait for another process. Measuring takes at most half of them, and at most 60."""


def run_probe(config: ProbeConfig, given: frozenset[str]) -> int:
    """Measure in this process, or start those that do. Returns the exit status."""
    check_device(config.device)
    check_size("timeout_s", config.timeout_s)
    if launched():
        if config.processes is not None:
            raise UserError(
                f"`processes={config.processes}` has no effect where RANK and WORLD_SIZE are in the environment; "
                "remove it, or unset them"
            )
        watch_launcher()
        return _measure(config)
    if config.processes is None:
        raise UserError(
            "links are between processes, and this is the only one; start one on each machine, by torchrun or with "
            "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or give --processes 2 for the loopback interface of this "
            "machine"
        )
    if config.processes > MOST_HERE:
        raise UserError(f"`processes={config.processes}` is too large for one machine; give at most {MOST_HERE}")
    _check_several(config.processes)
    _check_free(config.out)
    forkable = prepare_fork()

    from resist.training.device import pick_device  # imports torch

    if pick_device(config.device).type != "cpu":
        forkable = False
    alone = {"device": config.device, "backend": config.backend, "timeout-s": str(config.timeout_s)}
    arguments = ["probe", *(word for name, value in alone.items() for word in (f"--{name}", value))]
    if config.out is not None:
        arguments += ["--out", str(config.out)]
    child = ProbeConfig(None, config.out, config.device, config.backend, config.timeout_s)

    def fork() -> None:
        sys.exit(guarded(lambda: run_probe(child, given), ProbeConfig))

    processes = config.processes
    return launch(arguments, processes, config.timeout_s, processes, fork=fork if forkable else None)


def _measure(config: ProbeConfig) -> int:
    """Measure as one process of a job. Returns the exit status."""
    import torch

    from resist.cost.probe import measure_links
    from resist.sync.distributed import connect
    from resist.training.device import take_device

    size, first = int(os.environ["WORLD_SIZE"]), os.environ["RANK"].strip() == "0"
    _check_several(size)
    device, failure = torch.device("cpu"), ""
    try:
        device = take_device(config.device)
        if first:
            _check_free(config.out)
    except UserError as error:  # reported to the others, which wait for this process
        failure = str(error)
    transport = connect(size, device, config.timeout_s, failure=failure, backend=config.backend)
    try:
        measured = measure_links(transport, device, min(MOST_S, config.timeout_s / 2))
    finally:
        transport.close()
    if first:
        _print(measured)
        _write(config.out, measured)
    return 0


def _check_several(processes: int) -> None:
    if processes < 2:
        raise UserError(f"links are between processes, and there is {processes}; start at least 2")


def _check_free(out: Path | None) -> None:
    """Raise UserError where the file exists, or its folder does not or is not to be written to."""
    if out is None:
        return
    if out.exists() or out.is_symlink():
        raise UserError(f"`out={out}` exists already; give another file, or remove it")
    folder = out.absolute().parent
    if not folder.is_dir():
        raise UserError(f"`out={out}`: there is no folder {folder}; make it, or give another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"`out={out}`: {folder} is not a folder that you may write to; give another file")


def _write(out: Path | None, measured: "Measured") -> None:
    if out is None:
        print("\n--out FILE writes this for resist cost --link-file FILE.")
        return
    try:
        write_new(out, json.dumps(measured.to_json(), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"`out={out}` cannot be written: {error.strerror}; give another file") from error
    print(f"\nwrote {out}")


def _print(measured: "Measured") -> None:
    """Print the measured links: of each process, and where there are few, of each pair."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    where = "memory of the host" if measured.device == "cpu" else "GPUs"
    console.print(f"{len(measured.hosts)} processes; {measured.backend}, from the {where}; rates are of payload")

    def table(*columns: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for column in columns:
            text = column in ("host", "from", "to")
            made.add_column(column, justify="left" if text else "right", no_wrap=True)
        return made

    each = table("process", "host", "sends Gbit/s", "receives Gbit/s", "in a ring", "to all", "latency ms")
    for process, host in enumerate(measured.hosts):
        rates = (
            measured.best_gbit_s("out", process),
            measured.best_gbit_s("in", process),
            measured.ring_gbit_s[process],
            measured.to_all_gbit_s[process],
        )
        each.add_row(str(process), host, *map(_digits, rates), _digits(measured.latency_of(process)))
    console.print(each)
    console.print()
    if 2 < len(measured.hosts) <= SHOWN:
        console.print("Pairs, one at a time")
        pairs = table("from", "to", "Gbit/s", "latency ms")
        for source, target in sorted(measured.gbit_s):
            latency = measured.latency_ms[min(source, target), max(source, target)]
            names = (f"{process} {measured.hosts[process]}" for process in (source, target))
            pairs.add_row(*names, _digits(measured.gbit_s[source, target]), _digits(latency))
        console.print(pairs)
        console.print()
    for text, rates in (("the next one", measured.ring_gbit_s), ("all others", measured.to_all_gbit_s)):
        console.print(f"While all send to {text}, {measured.remaining(rates):.0%} of the slowest link's rate remain.")


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
