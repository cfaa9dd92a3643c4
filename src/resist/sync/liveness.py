"""Who is still there, and who waits? Asked when contact is lost, so that the message can name who was.

Every process answers from a thread of its own, whatever it is doing, through the store at which all have met. Who was
killed or stopped, or is cut off, does not answer. Who answers that it is at work keeps the others waiting.
"""

import threading
import time
import weakref
from typing import Any

CALL, ANSWER = "resist/roll-call", "resist/here/"  # keys in the store
WORKS, WAITS = "works", "waits"
LOOK_S = 0.5  # between two looks for a call
ANSWER_S = 5.0  # an answer may take this long, on a busy host


class Liveness:
    """store: one of torch.distributed, shared by all `size` processes; this is number `rank`."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._doing = [WORKS]
        closed = threading.Event()
        threading.Thread(target=_answer, args=(store, rank, self._doing, closed), daemon=True).start()
        self.close = weakref.finalize(self, closed.set)  # the thread does not outlive what it answers for

    def is_doing(self, what: str) -> None:
        """what: WORKS or WAITS."""
        self._doing[0] = what

    def call(self) -> tuple[list[int], list[int]] | None:
        """The processes that do not answer, and those that are at work; None where the store itself does not answer.

        Takes ANSWER_S seconds at most, less where only one is missing: somebody is lost, or it would not be asked.
        """
        self.is_doing(WAITS)  # it would not ask otherwise
        missing = [rank for rank in range(self._size) if rank != self._rank]
        end = time.monotonic() + ANSWER_S
        try:
            self._store.set(CALL, "")
            self._store.set(f"{ANSWER}{self._rank}", WAITS)
            while len(missing) > 1 and time.monotonic() < end:
                time.sleep(0.1)
                missing = [rank for rank in missing if not self._store.check([f"{ANSWER}{rank}"])]
            time.sleep(LOOK_S)  # the last one may be about to answer, too
            missing = [rank for rank in missing if not self._store.check([f"{ANSWER}{rank}"])]
            answers = {r: self._store.get(f"{ANSWER}{r}").decode() for r in range(self._size) if r not in missing}
        except RuntimeError:
            return None
        return missing, [rank for rank, doing in answers.items() if doing == WORKS]


def _answer(store: Any, rank: int, doing: list[str], closed: threading.Event) -> None:
    try:
        while not closed.wait(LOOK_S):
            if store.check([CALL]):
                store.set(f"{ANSWER}{rank}", doing[0])
                return
    except RuntimeError:  # the store is gone: the job is over, one way or the other
        return
