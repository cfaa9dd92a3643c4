"""The command line: one module for each command.

A module has the options of its command as a record, and a function that runs it.
Invalid input ends with one line on stderr and exit status 2, a lost worker with one line and status 1. The modules
import torch and the rooms that need it inside those functions, so that help and messages come at once.
"""

import logging
import os
import sys
from collections.abc import Callable

import resist
from resist.cli.compare import CompareConfig, run_compare
from resist.cli.cost import CostConfig, run_cost
from resist.cli.evaluate import EvaluateConfig, run_evaluate
from resist.cli.export import ExportConfig, run_export
from resist.cli.options import as_typed
from resist.cli.parse import parse
from resist.cli.plan import PlanConfig, run_plan
from resist.cli.report import ReportConfig, run_report
from resist.cli.train import run_train
from resist.cli.watch import WatchConfig, run_watch
from resist.errors import AgreedError, UserError, WorkerLostError
from resist.runs.config import TrainConfig

__all__ = ["guarded", "main"]


COMMANDS: dict[str, tuple[type, Callable[..., int]]] = {
    "train": (TrainConfig, run_train),
    "plan": (PlanConfig, run_plan),
    "cost": (CostConfig, run_cost),
    "compare": (CompareConfig, run_compare),
    "evaluate": (EvaluateConfig, run_evaluate),
    "export": (ExportConfig, run_export),
    "watch": (WatchConfig, run_watch),
    "report": (ReportConfig, run_report),
}


def main(arguments: list[str] | None = None) -> None:
    """Run `resist` with `arguments` (default: those of this process) and end the process with its exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    record = COMMANDS[given[0]][0] if given and given[0] in COMMANDS else TrainConfig
    _show_log(record)
    sys.exit(guarded(lambda: _run(given), record))


class _Printer(logging.Handler):
    """Print what the other rooms report: on stdout, warnings on stderr."""

    def __init__(self, record: type) -> None:
        super().__init__()
        self._record = record

    def emit(self, record: logging.LogRecord) -> None:
        text = as_typed(record.getMessage(), self._record)
        if record.levelno >= logging.WARNING:
            _print_error(text)
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
    return action(config, given)


def guarded(action: Callable[[], int], record: type = TrainConfig) -> int:
    """Run a command, print its error as one line, and return the exit status.

    Args:
        action: The command.
        record: The record class of the command, whose options messages are written for.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        status = action()
        sys.stdout.flush()
        return status
    except AgreedError as error:  # every process raises it; the first one prints it
        if rank == 0:
            _print_error(as_typed(str(error), record))
        return 2
    except UserError as error:
        _print_error(as_typed(str(error), record))
        return 2
    except WorkerLostError as error:
        _print_error(as_typed(str(error), record))
        return 1
    except BrokenPipeError:  # the reader of stdout has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if rank == 0:
            _print_error("interrupted")
        return 130


def _print_error(text: str) -> None:
    """Print a line on stderr in one write, because several processes may print at the same time.

    Line breaks and control characters, which a value or a path may contain, are written as in `\\n`.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    print(f"resist: {line}\n", end="", file=sys.stderr, flush=True)
