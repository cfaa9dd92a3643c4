"""Python imports this at the start of every process that has this folder on PYTHONPATH. Where RESIST_FAULT describes a
fault of this process, the function at which it happens is wrapped; the product itself knows nothing of it.

    RESIST_FAULT='{"kind": "kill", "point": "exchange", "rank": 2, "nth": 3, "seconds": 0, "mark": "/a/file"}'

The fault happens once: whoever comes first makes the file `mark`, and a process that is started again finds it there.
"""

import json
import os


def fire(fault):
    try:
        os.close(os.open(fault["mark"], os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    import signal
    import time

    if fault["kind"] == "raise":
        raise ArithmeticError(f"injected at {fault['point']}")
    if fault["kind"] == "delay":
        time.sleep(fault["seconds"])
    else:
        os.kill(os.getpid(), signal.SIGKILL if fault["kind"] == "kill" else signal.SIGSTOP)


def wrap(owner, name, fault, *, after=False, when=lambda *arguments: True):
    """Make `owner.name` count its calls (those for which `when` holds) and fault at the nth: before or after it."""
    original, calls = getattr(owner, name), 0

    def wrapper(*arguments, **named):
        nonlocal calls
        counts = when(*arguments)
        calls += counts
        if counts and calls == fault["nth"] and not after:
            fire(fault)
        result = original(*arguments, **named)
        if counts and calls == fault["nth"] and after:
            fire(fault)
        return result

    setattr(owner, name, wrapper)


def install(fault):
    import pathlib

    import resist.job
    from resist.runs.checkpoint import _Save
    from resist.sync import distributed, pending

    def saved(path, *_):
        return path.name.endswith(".partial") and path.parent.name == "checkpoints"

    def written(path, *_):
        return path.name == f".process-{fault['rank']}.safetensors.partial" and path.parent.parent.name == "checkpoints"

    points = {
        "start": lambda: wrap(distributed, "rendezvous", fault),
        "joined": lambda: wrap(distributed.Distributed, "__init__", fault, after=True),
        "before exchange": lambda: wrap(resist.job.Job, "synchronize", fault),
        "shared part begun": lambda: wrap(distributed.Distributed, "mean", fault, after=True),
        "sending blocks": lambda: wrap(distributed.Distributed, "transfer", fault),
        "awaiting blocks": lambda: wrap(pending.PendingMoves, "finish", fault),
        "awaiting shared part": lambda: wrap(pending.PendingMean, "finish", fault),
        "save begun": lambda: wrap(_Save, "_write", fault),
        "writing": lambda: wrap(pathlib.Path, "replace", fault, when=written),
        "completing": lambda: wrap(_Save, "_complete", fault),
        "before rename": lambda: wrap(pathlib.Path, "rename", fault, when=saved),
        "after rename": lambda: wrap(pathlib.Path, "rename", fault, after=True, when=saved),
        "assembling": lambda: wrap(resist.job.Job, "full_model", fault),
        "evaluating": lambda: wrap(resist.job, "recalibrate", fault),
    }
    points[fault["point"]]()


if "RESIST_FAULT" in os.environ and "RANK" in os.environ:
    description = json.loads(os.environ["RESIST_FAULT"])
    if int(os.environ["RANK"]) == description["rank"] and not os.path.exists(description["mark"]):
        install(description)
