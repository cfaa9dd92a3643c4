"""Holder of a lock: the process that a lock file names, and whether it still lives."""

import json
import logging
import os
import secrets
import socket
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

log = logging.getLogger(__name__)

STALE_S = 60.0  # without a heartbeat for so long, a lock is free
POLL_S = 0.25  # between two looks for the heartbeat of another machine
SIZE = 1024  # bytes of the file: with a fixed size it is overwritten in one piece


@dataclass(frozen=True)
class Holder:
    """The process that has a lock, as the file says.

    Attributes:
        host: Name of its machine.
        process: Its number.
        since: The time at which it took the lock, by its clock, as text.
        use: The command that it runs.
        machine: Identity of the running system, which a reboot changes.
        namespace: Identity of the table of processes that its number belongs to.
        started: When the process started, by the clock of its system; "" where that is unknown.
        inode: Number of the file in its file system, which a copy does not have.
        token: A random text.
        beat: Number of heartbeats so far.
    """

    host: str
    process: int
    since: str
    use: str
    machine: str
    namespace: str
    started: str
    inode: int
    token: str
    beat: int = 0

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} since {self.since} (resist {self.use})"


def this_process(use: str, fd: int) -> Holder:
    """Describe this process as the holder of a lock.

    Args:
        use: The command that it runs.
        fd: The open lock file.
    """
    process, since = os.getpid(), datetime.now().astimezone().isoformat(" ", "seconds")
    inode, token = os.fstat(fd).st_ino, secrets.token_hex(8)
    host, started = socket.gethostname(), _started(process) or ""
    return Holder(host, process, since, use, _machine(), _namespace(), started, inode, token)


def lives(holder: Holder, file: Path, locked: bool | None) -> bool:
    """Find out whether the process in a lock file still has the lock.

    Args:
        holder: The content of the file.
        file: The file.
        locked: What `_lock` returned for it.
    """
    try:
        state = file.stat()
    except OSError:
        return False
    if locked is not False and state.st_ino != holder.inode:
        return False  # of another directory, from which this one was copied
    if holder.machine == _machine() and locked is not None:
        return not locked
    if (ended := ended_here(holder)) is not None:
        return not ended
    return _beats(holder, file, STALE_S - (_now(file.parent) - state.st_mtime))


def ended_here(holder: Holder) -> bool | None:
    """Find out whether a process of this system has ended; None where it is of another one, or cannot be seen."""
    if holder.machine != _machine() or holder.namespace != _namespace():
        return None
    started = _started(holder.process)
    return None if started is None else started != holder.started


def _beats(holder: Holder, file: Path, patience_s: float) -> bool:
    """Wait for a heartbeat, as long as it may take."""
    if patience_s <= 0:
        return False
    log.info(f"resist: {file.parent} was in use by {holder}; waiting up to {patience_s:.0f} s for a sign of life")
    end = time.monotonic() + min(patience_s, STALE_S)  # less than 0 s old: the clock of the file system was set back
    while time.monotonic() < end:
        time.sleep(POLL_S)
        now = read(file)
        if now is None:
            return False
        if now != holder:
            return True
    return False


def _now(folder: Path) -> float:
    """The time by the clock of a file system, in seconds."""
    fd, name = tempfile.mkstemp(prefix=".lock-", dir=folder)
    try:
        return os.fstat(fd).st_mtime
    finally:
        os.close(fd)
        os.unlink(name)


def put(fd: int, holder: Holder) -> None:
    text = json.dumps(asdict(holder)).encode()
    os.lseek(fd, 0, os.SEEK_SET)
    os.write(fd, text.ljust(SIZE - 1) + b"\n")


def read(file: Path) -> Holder | None:
    """The content of a lock file; None where it is missing, empty or not of this form."""
    try:
        content = json.loads(file.read_bytes())
        holder = Holder(**content)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return holder if all(type(getattr(holder, f.name)) is f.type for f in fields(Holder)) else None


def _machine() -> str:
    """Identity of the running system, equal in its containers; the host's name where it has no other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(process: int) -> str | None:
    """The time at which a process of this system started; "" where there is none, None where it is unknown."""
    if sys.platform == "linux":
        try:
            state, *values = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return ""
        except OSError:
            return None
        return "" if state in "ZX" else values[18]  # not of one that has ended, and that its parent waits for later
    return None
