"""Where a run goes on: which checkpoint, at which round and step."""

import json
import sys
from pathlib import Path
from typing import Any

from resist.checkpoint import JOB, newest
from resist.comm import Transport, together
from resist.config import TrainConfig
from resist.errors import UserError


def starting_point(
    config: TrainConfig, transport: Transport, speaks: bool
) -> tuple[tuple[Path, bool] | None, tuple[int, int]]:
    """(checkpoint, whether it is of as many workers) or None, and the (round, step) at which to begin.

    The first process looks, and says what it found damaged. With another number of workers the step is the one at
    which all of them together have seen as many images.
    """
    if config.run.resume is None:
        return None, (0, 0)
    folder = config.run.resume / "checkpoints"

    def look() -> str:
        if not speaks:
            return ""
        path, skipped = newest(folder)
        for line in skipped:
            print(f"resist: {line}", file=sys.stderr)
        if path is None and skipped:
            raise UserError(f"no sound checkpoint in {folder}; train anew, or copy one there")
        return "" if path is None else path.name

    name = transport.gather_text(together(transport, look))[0]
    if not name:
        if speaks:
            print(f"resist: no checkpoint in {folder} yet; the run begins anew")
        return None, (0, 0)
    path = folder / name
    facts = together(transport, lambda: read_facts(path))
    before, now = facts["workers"], config.method.workers
    step = facts["step"] * before // now
    if speaks and before != now:
        print(
            f"resist: going on with {now} workers instead of {before}: other plans, step {facts['step']} "
            f"becomes {step} (as many images seen), momentum starts anew"
        )
    return (path, before == now), (facts["round"], step)


def read_facts(path: Path) -> dict[str, Any]:
    """The job.json of a checkpoint that process 0 has checked. Raises UserError where this process does not see it."""
    try:
        return json.loads((path / JOB).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path / JOB}: {error.strerror}; all processes have to see the same run directory") from error
