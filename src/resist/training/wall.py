"""Wall clock of a run: when the command began that the user waits for."""

import os
import sys
import time
from pathlib import Path

# Environment variable: when the run began, in seconds of `time.monotonic`, for the processes that the launcher starts.
BEGAN = "RESIST_BEGAN"
_begun = False


def begin_run() -> None:
    """Note that a run begins: the first run of this process began with the process, a later one begins now."""
    global _begun
    os.environ[BEGAN] = str(time.monotonic() if _begun else process_began())
    _begun = True


def end_run() -> None:
    """Forget when the run began: the next one in this process does not inherit it."""
    os.environ.pop(BEGAN, None)


def run_began() -> float:
    """Return when the run began, in seconds of `time.monotonic`.

    It is what `begin_run` has noted here or in the launcher, else the start of this process where torchrun or the like
    has started it, else now.
    """
    now = time.monotonic()
    try:
        return min(now, float(os.environ[BEGAN]))
    except (KeyError, ValueError):
        return process_began() if "RANK" in os.environ else now


def process_began() -> float:
    """Return when this process began, in seconds of `time.monotonic`; without Linux it is a late estimate."""
    now = time.monotonic()
    if sys.platform == "linux":
        try:
            after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
            since_boot_s = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
            age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s
            if age_s >= 0:
                return now - age_s
        except (OSError, ValueError, IndexError):
            pass
    return now - time.process_time()
