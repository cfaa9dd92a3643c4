"""Circumstances of a measurement: machine, versions, commit, date, and what the processors do."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch

from resist.runs.directory import processor
from sources import SOURCES, hashes, here


@cache
def commit() -> str:
    """Return the commit of this directory; empty if there is none."""
    if known := os.environ.get("RESIST_COMMIT"):
        return known
    describe = ["git", "describe", "--always", "--dirty"]
    if not shutil.which("git"):
        return ""
    return subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


# Commit and files as they are when a benchmark begins; it may take hours.
commit()
here()


def provenance(benchmark: str | None = None) -> dict[str, object]:
    """Return date, commit, hardware and versions, ready for JSON.

    Args:
        benchmark: A key of `SOURCES`, to note the hashes of its source files as they are now.
    """
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": processor(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **({"sources": hashes(SOURCES[benchmark])} if benchmark else {}),
    }


def busy_seconds() -> float:
    """Return the busy seconds of all processors, with time stolen by a hypervisor; 0 if unknown."""
    try:
        user, nice, system, _idle, _wait, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
