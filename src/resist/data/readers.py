"""Number of the processes that read data: by the cores of this host, which its workers share, and bounded by them."""

import os
from collections.abc import Mapping

from resist.errors import UserError

# Processes for a worker where there are cores enough.
USUAL = 4
# Most processes on a host: more than its cores, since they may wait for a disk, but not without end.
PER_CORE, ALWAYS = 8, 16


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    count = getattr(os, "process_cpu_count", None)  # Python 3.13
    if count is not None:
        return count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_here(workers: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return how many workers of a job this host trains.

    Args:
        workers: Workers of the job.
        environment: Environment of a process of the job, in which torchrun says how many processes there are.
    """
    local, world = (environment.get(name, "") for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    if not (local.isdecimal() and world.isdecimal() and 0 < int(local) <= int(world)):
        return workers
    return -(-workers * int(local) // int(world))


def num_readers(given: int | None, workers: int = 1, cores: int | None = None) -> int:
    """Return the number of processes that read data for each worker.

    Args:
        given: The number in the options; None: the default, the cores divided by the workers, at most `USUAL`.
        workers: Workers on this host.
        cores: Cores that they share; default: those of this process.

    Raises:
        UserError: It is below 0, or would be more than `PER_CORE` processes for a core (but `ALWAYS` are allowed).
    """
    cores = num_cores() if cores is None else cores
    if given is None:
        return min(USUAL, cores // workers)
    most = _most(workers, cores)
    if not 0 <= given <= most:
        total = f", {given * workers} processes for {workers} workers" if workers > 1 and given > 0 else ""
        raise UserError(f"`data_workers={given}`{total} on {cores} cores; give 0 to {most}")
    return given


def allowed_readers(given: int | None) -> int:
    """Return the number of processes that read for one worker: `given`, or the largest number that is allowed.

    It is for the options of a run that may have been made on a machine with more cores.
    """
    return num_readers(given if given is None else min(given, _most(1, num_cores())))


def _most(workers: int, cores: int) -> int:
    return max(ALWAYS, PER_CORE * cores) // workers
