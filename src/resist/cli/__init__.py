"""The command line. Bad input ends in one line on stderr and exit status 2, a lost worker in one line and status 1."""

import os
import sys
from collections.abc import Callable

from resist.cli.compare import CompareConfig, run_compare
from resist.cli.cost import CostConfig, run_cost
from resist.cli.evaluate import EvaluateConfig, run_evaluate
from resist.cli.parse import parse
from resist.cli.plan import PlanConfig, run_plan
from resist.cli.report import ReportConfig, run_report
from resist.cli.train import run_train
from resist.cli.watch import WatchConfig, run_watch
from resist.config import TrainConfig
from resist.errors import AgreedError, UserError, WorkerLostError

__all__ = ["main"]


COMMANDS: dict[str, tuple[type, Callable[..., int]]] = {
    "train": (TrainConfig, run_train),
    "plan": (PlanConfig, run_plan),
    "cost": (CostConfig, run_cost),
    "compare": (CompareConfig, run_compare),
    "evaluate": (EvaluateConfig, run_evaluate),
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
