"""Follow a run that another process writes: its new records, its state, its age."""

import os
import socket
import time
from pathlib import Path
from typing import Any

from resist.runs.history import check_sequence, read_table
from resist.runs.records import Record, parse_record


class Follower:
    """Read a run directory repeatedly while it grows.

    Args:
        path: the run directory.

    Attributes:
        restarted: the last `read` found metrics.jsonl replaced; its records are those of the whole run.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.restarted = path, False
        self._file, self._offset, self._inode = path / "metrics.jsonl", 0, -1
        self._numbers: list[int] = []  # of the rounds that have been read

    def read(self) -> list[Record]:
        """The records since the last call.

        An incomplete line is left for the next call.

        Raises:
            UserError: A round is not there, also where its line is damaged, or is there twice.
        """
        self.restarted = False
        try:
            with self._file.open("rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._inode or stat.st_size < self._offset:
                    self.restarted, self._offset, self._inode = self._inode != -1, 0, stat.st_ino
                    self._numbers.clear()
                file.seek(self._offset)
                content = file.read()
        except OSError:
            return []
        complete = content[: content.rfind(b"\n") + 1]
        self._offset += len(complete)
        records = [record for record in map(parse_record, complete.splitlines()) if record is not None]
        if records:
            self._numbers += (record["round"] for record in records)
            known = read_table(self.path / "environment.json", []).get("missing_rounds")
            check_sequence(self.path, self._numbers, known)
        return records

    def age_s(self) -> float:
        """Seconds since the run wrote a record, or since it started, by the clock of this machine."""
        for name in ("metrics.jsonl", "state.json", "config.json"):
            try:
                stat = (self.path / name).stat()
            except OSError:
                continue
            if stat.st_size:
                return time.time() - stat.st_mtime
        return 0.0

    def state(self) -> dict[str, Any]:
        """state.json; without it, the state that the other files imply."""
        state = read_table(self.path / "state.json", [])
        if state:
            return state
        return {"state": "finished"} if (self.path / "model.safetensors").exists() else {}


def rounds_of(state: dict[str, Any]) -> int | None:
    """The number of rounds that a run will have, or None where its state does not name it."""
    rounds = state.get("rounds")
    return rounds if isinstance(rounds, int) and rounds > 0 else None


def gone(state: dict[str, Any]) -> bool:
    """True where the process that wrote the state "running" ran on this machine and no longer exists."""
    process = state.get("process")
    if state.get("state") != "running" or state.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
