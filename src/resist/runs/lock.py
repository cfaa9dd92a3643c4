"""Lock of a run directory: one process writes into it, and the file RUN/lock says which.

Two means are used together, because file systems differ:

- A lock of the operating system (flock). It ends with its process, however that ended, so a lock whose process is gone
  is free at once. NFS carries it between machines (Linux turns it into a lock of the whole file), unless it is mounted
  with local locks; other network file systems do so, or refuse it, or keep it on one machine.
- A heartbeat: the process writes into the file every `BEAT_S` seconds. It decides where the lock of the system cannot:
  where there is none, and where the holder is on another machine, which may have lost its power. A lock without a
  heartbeat for `STALE_S` seconds is free. Clocks of different machines are never compared: the age of a heartbeat is
  measured by the clock of the file system, or by waiting for the next one.

A process that was asleep for longer than that may find its lock taken over; `RunLock.check` raises then, and the
process ends. A copy of a run directory is not locked: the file has the number (inode) that it was made with.
"""

import contextlib
import errno
import os
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from resist.errors import UserError
from resist.runs.holder import STALE_S, Holder, ended_here, lives, put, read, this_process

try:
    import fcntl
except ImportError:  # not on Unix: the heartbeat has to do
    fcntl = None

FILE = "lock"
BEAT_S = 10.0
SETTLE_S = 1.0  # after which of two processes that take over a stale lock at the same time the last one has it
TRIES = 20  # looks at a lock that another process is taking or giving back at this moment
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """Lock of a run directory. A context manager.

    Args:
        path: The run directory, which has to exist when the lock is taken.
        use: The command that takes it, for the message to others.
        beat: Whether to give a heartbeat, in a thread. A process that forks cannot have one.
    """

    def __init__(self, path: Path, use: str, *, beat: bool = True) -> None:
        self.path, self._file, self._use, self._beat = path, path / FILE, use, beat
        self._fd: int | None = None
        self._me: Holder | None = None
        self._lost: Holder | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RunLock":
        self.acquire()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def acquire(self, *, replacing: bool = False) -> None:
        """Take the lock, where this object does not have it.

        Waits up to `STALE_S` for a heartbeat, where the last holder is on another machine and may have ended.

        Args:
            replacing: Take it over from a process that lives, but must not write any more. `check` raises there then.

        Raises:
            UserError: Another process has it, or the directory cannot be written to.
        """
        if self._me is not None:
            return
        try:
            self._take(replacing)
        except OSError as error:
            raise UserError(
                f"{self._file} cannot be written: {error.strerror}; make {self.path} a directory that you may write to"
            ) from error
        if self._beat:
            self._thread = threading.Thread(target=self._keep_beating, daemon=True)
            self._thread.start()

    def check(self) -> None:
        """Raise UserError where another process has taken the lock over, or do nothing."""
        if self._me is not None and self._lost is None and (holder := read(self._file)) is not None:
            self._lost = holder if holder.token != self._me.token else None
        if self._lost is not None:
            raise UserError(
                f"{self.path} was taken over by {self._lost}, because this process gave no sign of life for "
                f"{STALE_S:g} s; it ends here, and writes nothing more"
            )

    def release(self) -> None:
        """Give the lock back, and remove its file. Does nothing without the lock."""
        if self._me is None:
            return
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            if (holder := read(self._file)) is not None and holder.token == self._me.token:
                self._file.unlink()
        self._close()
        self._me = None

    def _take(self, replacing: bool) -> None:
        taken_over = False
        for _ in range(TRIES):
            fd = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locked, holder = _lock(fd), read(self._file)
                if locked is not False and not _is_file(fd, self._file):  # its holder has removed it at this moment
                    continue
                if locked is False and (holder is None or ended_here(holder)):  # the new holder has not written yet
                    time.sleep(SETTLE_S / TRIES)
                    continue
                if holder is not None and not replacing and lives(holder, self._file, locked):
                    raise self._in_use(holder)
                if locked is False:  # a machine that is gone has it
                    self._file.unlink(missing_ok=True)
                    taken_over = True
                    continue
                settle = not replacing and (taken_over or (holder is not None and not locked))
                self._write(fd, settle=settle)
                fd = -1
                return
            finally:
                if fd >= 0:
                    os.close(fd)
        raise UserError(f"{self.path} is in use by another process, which is beginning or ending; try again")

    def _write(self, fd: int, *, settle: bool) -> None:
        """Write into the file that this process has it.

        Args:
            fd: The open file, which this object keeps.
            settle: Wait for others that take over the same lock, and that no lock of the system keeps away.
        """
        me = this_process(self._use, fd)
        put(fd, me)
        if settle:
            time.sleep(SETTLE_S)
            if (holder := read(self._file)) is not None and holder.token != me.token:
                raise self._in_use(holder)
        self._fd, self._me = fd, me
        _OPEN.add(self)

    def _in_use(self, holder: Holder) -> UserError:
        watch = f"; resist watch {self.path} shows it" if holder.use == "train" else ""
        return UserError(f"{self.path} is in use by {holder}; wait until it has ended, or stop it there{watch}")

    def _keep_beating(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_S):
            assert self._me is not None
            beat += 1
            with contextlib.suppress(OSError, UserError):  # of a server that does not answer at this moment
                self.check()
                if self._fd is not None:
                    put(self._fd, replace(self._me, beat=beat))

    def _close(self) -> None:
        _OPEN.discard(self)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


_OPEN: "weakref.WeakSet[RunLock]" = weakref.WeakSet()


def _forget() -> None:
    """In a fork of the process that has a lock: a lock lasts as long as any process has its file open."""
    for lock in list(_OPEN):
        lock._close()
        lock._me = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _lock(fd: int) -> bool | None:
    """Try to lock a file. None: its file system has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _is_file(fd: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), file.stat())
    except FileNotFoundError:
        return False
