"""A group of NCCL that is waited for with a limit, and let go where a process is lost.

NCCL waits on the GPU, without end, for a process that is gone, and the host waits for the GPU. So here the host looks
at an operation until it is complete, and only then makes a stream wait for it: no stream ever depends on an operation
that may not end, and what is copied from the GPU after a loss (replicas) does not queue behind it. torch's own watchdog
would end the process; it is made to leave errors to this.

Gradients (ddp) are the exception: torch makes the streams wait for them. A thread looks at them, and aborts the group
if one does not come to an end. The streams then go on with numbers that mean nothing, and every later call fails.
"""

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, cast

import torch

from resist.sync.liveness import LOOK_S
from resist.sync.meeting import within

# What torch does about errors of NCCL; the second name is an older one.
HANDLING = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")
NONE, ENDING = "0", ("1", "3")  # its values: nothing, and those that end the process
SHORTEST_S, LONGEST_S = 5e-5, 2e-3  # seconds between two looks at an operation
WATCH_S = 0.1  # seconds between two looks at an operation that nobody waits for
LEAVE_S = 5.0  # seconds that aborting or destroying a group may take
MARGIN_S = 60.0  # seconds by which torch's own limit is later


@contextlib.contextmanager
def errors_left_to_us() -> Generator[None]:
    """Make torch leave the errors of groups made here to this package, unless the user has chosen otherwise."""
    if any(name in os.environ for name in HANDLING):
        yield
        return
    os.environ[HANDLING[0]] = NONE
    try:
        yield
    finally:
        del os.environ[HANDLING[0]]  # groups of the user stay as they are


def handling_failure() -> str:
    """Return why the variables for errors of NCCL cannot be used, or ""."""
    for name in HANDLING:
        if os.environ.get(name, NONE) not in ("0", "1", "2", "3"):
            return f"{name}={os.environ[name]} in the environment; give {NONE}, or unset it"
    return ""


def handling_note() -> str:
    """Return a note for the user whose choice ends processes that could still report a loss; or ""."""
    name = next((name for name in HANDLING if os.environ.get(name) in ENDING), "")
    return name and (
        f"{name}={os.environ[name]}: torch may end the processes before they report the loss of one and write "
        "replicas; unset it"
    )


class StuckError(RuntimeError):
    """An operation that does not end."""


class NcclGroup:
    """A group of NCCL, from its opening to its end.

    Args:
        group: The group.
        abort: Aborts the group and forgets it.
        destroy: Destroys the group.
        timeout_s: Seconds that an operation may take.
        has_loss: Looks whether a process is lost; called every LOOK_S seconds of a wait.
        device: Device of the tensors.

    Attributes:
        aborted: True from the moment on that the group is not to be used any more.
        failure: Why a thread has aborted it.
        hangs: True if aborting it has not come to an end.
    """

    def __init__(
        self,
        group: Any,
        *,
        abort: Callable[[Any], None],
        destroy: Callable[[Any], None],
        timeout_s: float,
        has_loss: Callable[[], bool],
        device: torch.device,
    ) -> None:
        self._group, self._abort, self._destroy = group, abort, destroy
        self._timeout_s, self._has_loss, self._device = timeout_s, has_loss, device
        # A stream of its own for `Work.wait`, which makes the current stream wait even for an operation that failed.
        self._aside: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._begun: list[Any] = []
        self._lock = threading.Lock()
        self._watched: queue.SimpleQueue[Any] | None = None
        self.aborted, self.hangs, self.failure = False, False, ""

    def open(self, action: Callable[[], Any]) -> None:
        """Open the communicator by a first operation. Waits for all processes.

        Args:
            action: The operation, which waits for its end.

        Raises:
            RuntimeError: It has failed.
            TimeoutError: It has not come to an end in time.
        """

        def in_thread() -> None:  # the current device is one of the thread
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            action()

        within(self._timeout_s, in_thread)

    def begin(self, action: Callable[[], Any]) -> Any:
        """Begin operations, which have to be waited for; see `limited`.

        The first message between two processes connects them, for which NCCL waits on the host.

        Args:
            action: Returns one operation, or a list of them.
        """
        result = self.limited(action)
        self._begun += cast("list[Any]", result) if isinstance(result, list) else [result]
        return cast(Any, result)

    def limited(self, action: Callable[[], Any]) -> Any:
        """Run an action that may wait on the host, without a limit of its own.

        Args:
            action: Function without arguments.

        Returns:
            The result of `action`.

        Raises:
            RuntimeError: It has failed, or has not come to an end in time.
        """
        limit = threading.Timer(self._timeout_s, self.abort)  # the call then fails
        limit.daemon = True
        limit.start()
        try:
            result = action()
        finally:
            limit.cancel()
        self._check()
        return result

    def wait(self, work: Any) -> None:
        """Wait on the host until an operation is complete.

        Args:
            work: The operation, from `begin`.

        Raises:
            RuntimeError: It has failed, has not come to an end in time, or a process is lost.
        """
        self._poll(work, SHORTEST_S, LONGEST_S)
        self._check()  # an operation that was aborted is complete, too
        with torch.cuda.stream(self._aside):
            work.wait()  # frees its tensors, and raises its error
        self._begun = [begun for begun in self._begun if begun is not work]

    def watch(self, work: Any) -> None:
        """Abort the group if an operation does not come to an end, for which nobody waits on the host.

        Args:
            work: The operation.
        """
        if self._watched is None:
            self._watched = queue.SimpleQueue[Any]()
            threading.Thread(target=self._watch, args=(self._watched,), daemon=True).start()
        self._watched.put(work)

    def _watch(self, works: "queue.SimpleQueue[Any]") -> None:
        while (work := works.get()) is not None:
            try:
                self._poll(work, WATCH_S, WATCH_S)
            except RuntimeError as error:
                self.failure = str(error)
                self.abort()
                return

    def _poll(self, work: Any, pause: float, longest: float) -> None:
        start = time.monotonic()
        look = start + LOOK_S
        while not work.is_completed():
            now = time.monotonic()
            if now - start > self._timeout_s:
                raise StuckError(f"not complete within {self._timeout_s:.0f} s")
            if now > look:
                if self._has_loss():
                    raise StuckError("a process shows no life any more, or has lost contact itself")
                look = time.monotonic() + LOOK_S
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _check(self) -> None:
        if self.aborted:
            raise StuckError(f"aborted, since it was not complete within {self._timeout_s:.0f} s")

    def abort(self) -> None:
        """Let go of the group, with all that is under way in it. At most LEAVE_S seconds."""
        with self._lock:
            if self.aborted:
                return
            self.aborted = True
            try:
                within(LEAVE_S, lambda: self._abort(self._group))
            except TimeoutError:
                self.hangs = True
            except (RuntimeError, ValueError, LookupError, AssertionError):  # the caller has destroyed all groups
                return

    def close(self) -> None:
        """Destroy the group if nothing is under way, else abort it: destroying waits for what is."""
        if self._watched is not None:
            self._watched.put(None)
        if self._begun:
            self.abort()
        if self.aborted:
            return
        try:
            within(LEAVE_S, lambda: self._destroy(self._group))
        except (RuntimeError, TimeoutError):  # also where another process has gone without a sign
            self.abort()
        except (ValueError, AssertionError):  # the caller has destroyed all groups
            return
