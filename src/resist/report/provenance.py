"""Where the numbers of a report come from: commands, options, versions and hardware; of several runs said once."""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from resist.runs.history import History

Rows = list[tuple[str, str]]


def repeat(history: History) -> list[str]:
    """The commands that reproduce the run."""
    commit = history.environment.get("commit")
    checkout = [f"git checkout {shlex.quote(str(commit).removesuffix('-dirty'))}"] if commit else []
    return [*checkout, shlex.join(["resist", "train", "--config", str(history.path.absolute() / "config.json")])]


def repeat_all(histories: Sequence[History]) -> list[str]:
    """The commands that reproduce several runs, each line once."""
    return list(dict.fromkeys(line for history in histories for line in repeat(history)))


def options(history: History) -> Rows:
    """Every option of the run, by name."""
    rows: Rows = []
    for part, values in history.given.items():
        for name, value in values.items():
            shown = " ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
            rows.append((f"{part}.{name}", shown))
    return rows


def environment(history: History) -> Rows:
    """Versions, commit and hardware of the run."""
    rows: Rows = []
    for name, value in history.environment.items():
        if name == "resumed" and isinstance(value, dict):
            rows += [(f"resumed: {key}", _shown(key, entry)) for key, entry in value.items()]
        else:
            rows.append((name, _shown(name, value)))
    if str(history.environment.get("commit") or "").endswith("-dirty"):
        rows.append(("remark", "the source had changes that were not committed"))
    return rows


def _shown(name: str, value: Any) -> str:
    if name == "command" and isinstance(value, list) and value:
        first = "resist" if str(value[0]) in ("__main__.py", "-m", "-c") else str(value[0])
        return shlex.join([first, *map(str, value[1:])])
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)


def common(histories: Sequence[History], of: Callable[[History], Rows]) -> Rows:
    """The rows that are the same for all runs.

    Args:
        histories: The runs.
        of: `options` or `environment`.
    """
    tables = [dict(of(history)) for history in histories]
    return [(name, text) for name, text in of(histories[0]) if all(table.get(name) == text for table in tables)]


def differing(histories: Sequence[History], of: Callable[[History], Rows]) -> list[list[str]]:
    """Rows of name and one value for each run, where the runs differ; see `common`."""
    tables = [dict(of(history)) for history in histories]
    names = dict.fromkeys(name for table in tables for name in table)
    same = {name for name, _ in common(histories, of)}
    return [[name, *(table.get(name, "") for table in tables)] for name in names if name not in same]
