"""`resist watch`: the display of a run that another process writes, or that has ended."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from resist.cli.options import as_typed
from resist.errors import UserError, quoted, shown
from resist.runs.config_file import read_options
from resist.runs.directory import title_of
from resist.runs.follower import Follower, gone, rounds_of
from resist.runs.history import read_history
from resist.training.progress import Display, Summary

POLL_S = 0.5
GONE_S = 60.0  # how long a run whose process is gone may take to restart


@dataclass(frozen=True)
class WatchConfig:
    """Watch a run of another process, from its directory. Ends when the run ends."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory."""
    no_progress: bool = False
    """Print log lines instead of the live display."""
    patience_s: float | None = None
    """Stop after this many seconds without a new record, with exit status 1. Default: keep watching."""


def run_watch(config: WatchConfig, given: frozenset[str]) -> int:
    """Show the run until it ends. Returns the exit status. Raises UserError for invalid options."""
    if config.patience_s is not None and not config.patience_s > 0:
        raise UserError(f"--patience-s {config.patience_s} must be more than 0")
    try:
        return watch(config)
    except KeyboardInterrupt:
        return 130  # the run continues


def watch(config: WatchConfig) -> int:
    """Show the run until it ends, or until the patience is over. Returns the exit status."""
    options, _ = read_options(config.run, [])
    follower = Follower(config.run)
    state = follower.state()

    def remark() -> str:
        if gone(state):
            return f"process {state['process']} no longer exists; waiting {GONE_S:.0f} s for a restart"
        return ""

    title = f"{config.run.absolute().name}: {title_of(options)}"
    with Display(title, Summary(rounds_of(state)), live=not config.no_progress, remark=remark) as display:
        first = True
        while True:
            state = follower.state()  # before the records, so that the last records of an ended run are read
            records = follower.read()
            if follower.restarted:
                display.restart(rounds_of(state))
            display.summary.rounds = rounds_of(state)
            for record in records:
                display.add(record, fresh=not first and not follower.restarted)
            if first and records and not display.live:
                display.line()
            if first or follower.restarted:
                display.heard(follower.age_s())
            first = False
            ended = end_of(config, state, display)
            if ended is not None:
                break
            display.tick()
            time.sleep(POLL_S)
    status, text = ended
    print(text, file=sys.stderr if status else sys.stdout)
    return status


def end_of(config: WatchConfig, state: dict[str, Any], display: Display) -> tuple[int, str] | None:
    """Exit status and last line where the run has ended or the patience is over, else None."""
    run, done, silent = config.run, display.summary.done, display.silent_s
    match state.get("state"):
        case "finished":
            if not done:  # no run finishes without a round: its records are lost or damaged
                read_history(run)  # raises, and says why
            return 0, f"finished after round {done}; report: resist report {quoted(run)}"
        case "interrupted":
            return 0, f"interrupted after round {done}; to continue: resist train --resume {quoted(run)}"
        case "failed":
            error = as_typed(" ".join(str(state.get("error")).split()))
            return 1, f"resist: the run failed after round {done}: {error}"
    if gone(state) and silent > GONE_S:
        return 1, (
            f"resist: the run stopped after round {done} without a final state "
            f"(process {state['process']} no longer exists)"
        )
    if config.patience_s is not None and silent > config.patience_s:
        return 1, f"resist: no new record in {shown(run)} for {silent:.0f} s after round {done}; stopped watching"
    return None
