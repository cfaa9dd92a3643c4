"""The command line. Bad input ends in one line on stderr and exit status 2, a lost worker in one line and status 1."""

import os
import sys
from collections.abc import Callable

from resist.cli.compare import CompareConfig, run_compare
from resist.cli.cost import CostConfig, run_cost
from resist.cli.evaluate import EvaluateConfig, run_evaluate
from resist.cli.export import ExportConfig, run_export
from resist.cli.parse import parse
from resist.cli.plan import PlanConfig, run_plan
from resist.cli.report import ReportConfig, run_report
from resist.cli.train import run_train
from resist.cli.watch import WatchConfig, run_watch
from resist.errors import AgreedError, UserError, WorkerLostError
from resist.runs.config import TrainConfig

__all__ = ["main"]


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
    """`resist COMMAND ...`. Ends the process with its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    sys.exit(_guarded(lambda: _run(words)))


def _run(arguments: list[str]) -> int:
    config = parse({name: kind for name, (kind, _) in COMMANDS.items()}, arguments)
    action = next(action for kind, action in COMMANDS.values() if isinstance(config, kind))
    return action(config, arguments)


def _guarded(action: Callable[[], int]) -> int:
    """The exit status of `action`, errors turned into one line."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        status = action()
        sys.stdout.flush()
        return status
    except AgreedError as error:  # every process has it; the first one says it
        if rank == 0:
            _say(str(error))
        return 2
    except UserError as error:
        _say(str(error))
        return 2
    except WorkerLostError as error:
        _say(str(error))
        return 1
    except BrokenPipeError:  # whoever read what we print has stopped, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        if rank == 0:
            _say("interrupted")
        return 130


def _say(text: str) -> None:
    """A line on stderr, in one write: several processes may speak at once."""
    print(f"resist: {text}\n", end="", file=sys.stderr, flush=True)
