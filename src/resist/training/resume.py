"""Where a run goes on: which checkpoint, at which round and step."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from resist.errors import UserError
from resist.job import Job
from resist.runs.checkpoint import JOB, newest, restore
from resist.runs.config import TrainConfig
from resist.runs.rescue import newest_replica_round, restore_replicas
from resist.sync.agreement import run_everywhere
from resist.sync.transport import Transport


@dataclass(frozen=True)
class ResumePoint:
    """round, step: those that are done. restore: fills a job that was made for them."""

    round: int = 0
    step: int = 0
    restore: Callable[[Job, tuple[Optimizer, ...]], None] = lambda job, optimizers: None


def find_resume_point(config: TrainConfig, transport: Transport, is_main: bool) -> ResumePoint:
    """Where to begin: anew, or at the newest sound checkpoint, or at safe copies that survivors left after it.

    The first process looks, and says what it found damaged. With another number of workers the step is the one at
    which all of them together have seen as many images.
    """
    if config.run.resume is None:
        return ResumePoint()
    folder, rescue = config.run.resume / "checkpoints", config.run.resume / "replicas"
    found = json.loads(
        transport.all_gather_text(run_everywhere(transport, lambda: _look(folder, rescue) if is_main else ""))[0]
    )
    if not found:
        if is_main:
            print(f"resist: no checkpoint in {folder} yet; the run begins anew")
        return ResumePoint()
    before, now, path = found["workers"], config.method.workers, folder / found.get("checkpoint", "")
    if path != folder:
        run_everywhere(transport, lambda: read_facts(path))
    step = found["step"] * before // now
    if is_main and before != now:
        print(
            f"resist: going on with {now} workers instead of {before}: other plans, step {found['step']} "
            f"becomes {step} (as many images seen), momentum starts anew"
        )
    if path == folder:
        if is_main:
            print(f"resist: going on from the safe copies of round {found['round']}; momentum starts anew")
        return ResumePoint(found["round"], step, lambda job, _: restore_replicas(job, rescue, found["round"]))
    return ResumePoint(
        found["round"], step, lambda job, optimizers: restore(job, optimizers, path, same_workers=before == now)
    )


def _look(folder: Path, rescue: Path) -> str:
    """What to go on from, as JSON: round, step, workers, and the checkpoint's name if it is one; {} for nothing."""
    path, skipped = newest(folder)
    for line in skipped:
        print(f"resist: {line}", file=sys.stderr)
    safe = newest_replica_round(rescue)
    facts = {} if path is None else {**read_facts(path), "checkpoint": path.name}
    if safe is not None and safe["round"] > facts.get("round", 0):
        facts = safe
    if not facts and skipped:
        raise UserError(f"no sound checkpoint in {folder}; train anew, or copy one there")
    return json.dumps({key: facts[key] for key in ("round", "step", "workers", "checkpoint") if key in facts})


def read_facts(path: Path) -> dict[str, Any]:
    """The job.json of a checkpoint that process 0 has checked. Raises UserError where this process does not see it."""
    try:
        return json.loads((path / JOB).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path / JOB}: {error.strerror}; all processes have to see the same run directory") from error
