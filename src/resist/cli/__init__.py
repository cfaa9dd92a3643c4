"""The command line: one module for each command.

A module has the options of its command as a record, and a function that runs it.
Every error ends with one line on stderr and an exit status (`resist.cli.guard`). The modules import torch and the rooms
that need it inside those functions, so that help and messages come at once.
"""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import resist
from resist.cli.compare import CompareConfig, run_compare
from resist.cli.cost import CostConfig, run_cost
from resist.cli.environment import check_environment
from resist.cli.evaluate import EvaluateConfig, run_evaluate
from resist.cli.export import ExportConfig, run_export
from resist.cli.guard import guarded, keep_errors_in
from resist.cli.options import as_typed
from resist.cli.parse import parse, written
from resist.cli.plan import PlanConfig, run_plan
from resist.cli.printing import open_streams, print_error
from resist.cli.probe import ProbeConfig, run_probe
from resist.cli.rendezvous import RendezvousConfig, run_rendezvous
from resist.cli.report import ReportConfig, run_report
from resist.cli.train import run_train
from resist.cli.watch import WatchConfig, run_watch
from resist.errors import shown
from resist.runs.config import TrainConfig

__all__ = ["main"]

COMMANDS: dict[str, tuple[type, Callable[..., int]]] = {
    "train": (TrainConfig, run_train),
    "plan": (PlanConfig, run_plan),
    "cost": (CostConfig, run_cost),
    "probe": (ProbeConfig, run_probe),
    "compare": (CompareConfig, run_compare),
    "evaluate": (EvaluateConfig, run_evaluate),
    "export": (ExportConfig, run_export),
    "watch": (WatchConfig, run_watch),
    "report": (ReportConfig, run_report),
    "rendezvous": (RendezvousConfig, run_rendezvous),
}
# Those that go on without standard output: what they make is in a run directory.
LASTING = (TrainConfig, CompareConfig)


def main(arguments: list[str] | None = None) -> None:
    """Run `resist` with `arguments` (default: those of this process) and end the process with its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    record = COMMANDS[given[0]][0] if given and given[0] in COMMANDS else TrainConfig
    open_streams(lasting=False)
    _show_log(record)
    keep_errors_in(None)
    sys.exit(guarded(lambda: _run(given), record, written(given)))


class _Printer(logging.Handler):
    """Print what the other rooms report: on stdout, warnings on stderr."""

    def __init__(self, record: type) -> None:
        super().__init__()
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        text = str(record.msg)
        if isinstance(record.args, tuple) and record.args:  # a name must not break the line
            text %= tuple(shown(value) if isinstance(value, str | Path) else value for value in record.args)
        text = as_typed(text, self._record)
        if record.levelno >= logging.WARNING:
            print_error(text)
        else:
            print(text, flush=True)


def _show_log(record: type) -> None:
    """Print the log of this package, in place of an earlier command of this process."""
    log = logging.getLogger("resist")
    for handler in [handler for handler in log.handlers if isinstance(handler, _Printer)]:
        log.removeHandler(handler)
    log.addHandler(_Printer(record))
    log.setLevel(logging.INFO)


def _run(arguments: list[str]) -> int:
    if arguments == ["--version"]:
        print(f"resist {resist.__version__}")
        return 0
    config, given = parse({name: record for name, (record, _) in COMMANDS.items()}, arguments)
    _, action = COMMANDS[arguments[0]]
    open_streams(lasting=isinstance(config, LASTING))
    in_job = isinstance(config, (*LASTING, ProbeConfig))
    check_environment(training=in_job, drawing=isinstance(config, CompareConfig | ReportConfig))
    return action(config, given)
