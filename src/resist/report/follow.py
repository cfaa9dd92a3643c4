"""Following a run that goes on elsewhere: new lines of its metrics.jsonl, and whether more are to come."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from resist.report.history import clean


class Follower:
    """Reads a run directory again and again.

    restarted: whether the last `read` found the file replaced, so that its records are those of the whole run anew.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.restarted = path, False
        self._file, self._offset, self._inode = path / "metrics.jsonl", 0, -1

    def read(self) -> list[dict[str, Any]]:
        """The records that have come since. A line that is not complete yet is left for the next time; a damaged one is
        left out."""
        self.restarted = False
        try:
            with self._file.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_ino != self._inode or facts.st_size < self._offset:
                    self.restarted, self._offset, self._inode = self._inode != -1, 0, facts.st_ino
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        records: list[dict[str, Any]] = []
        for line in whole.splitlines():
            try:
                records.append(clean(json.loads(line)))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
                continue
        return records

    def age_s(self) -> float:
        """Seconds since the run wrote a record, or since it began; by this host's clock."""
        for name in ("metrics.jsonl", "state.json", "config.json"):
            try:
                facts = (self.path / name).stat()
            except OSError:
                continue
            if facts.st_size:
                return time.time() - facts.st_mtime
        return 0.0

    def state(self) -> dict[str, Any]:
        """state.json; of an older run what its files say."""
        try:
            found = json.loads((self.path / "state.json").read_text(encoding="utf-8", errors="replace"))
            if isinstance(found, dict):
                return found
        except (OSError, ValueError, RecursionError):
            pass
        return {"state": "finished"} if (self.path / "model.safetensors").exists() else {}


def rounds_of(state: dict[str, Any]) -> int | None:
    """The number of rounds that a run will have, where it says so."""
    rounds = state.get("rounds")
    return rounds if isinstance(rounds, int) and rounds > 0 else None


def gone(state: dict[str, Any]) -> bool:
    """Whether the process that wrote a "running" state ran on this host and is there no more."""
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
