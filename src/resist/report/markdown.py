"""The report as Markdown: tables, and links to the pictures beside it."""

import re
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from resist.report.compare import compare
from resist.report.tables import (
    COMPARISON_NOTE,
    ENDS,
    READINGS_NOTE,
    WORKERS_NOTE,
    comparison_rows,
    environment,
    headline,
    names_of,
    notes,
    options,
    reading_rows,
    repeat,
    seconds_by_kind,
    sentence,
    worker_rows,
)
from resist.runs.history import History


def markdown(histories: Sequence[History], curves: str, pictures: Sequence[str]) -> str:
    """curves: file name of the curves; pictures: of each run's other figures."""
    names = names_of(histories)
    parts = [f"# {_text(names[0]) if len(names) == 1 else f'{len(names)} runs compared'}"]
    if len(histories) > 1:
        parts += [_table(*comparison_rows(compare(histories))), COMPARISON_NOTE]
    parts.append(f"![Accuracy and loss against steps, time and bytes]({quote(curves)})")
    for history, name, picture in zip(histories, names, pictures, strict=True):
        parts += [f"## {_text(name)}"] if len(histories) > 1 else []
        parts += _one(history, picture)
    return "\n\n".join(parts) + "\n"


def _one(history: History, picture: str) -> list[str]:
    readings = ["### How the full network is read", _table(("", ""), reading_rows(history)), READINGS_NOTE]
    commands = "\n".join("    " + " ".join(line.splitlines()) for line in repeat(history))
    return [
        f"{_text(sentence(history))} ({ENDS[history.ended]})",
        *(f"> {_text(note)}" for note in notes(history)),
        _table(("", ""), headline(history)),
        f"![Who held which block, who sent how much to whom, seconds of a round]({quote(picture)})",
        "### The workers",
        _table(*worker_rows(history)),
        WORKERS_NOTE,
        "### Seconds by kind",
        _table(("", ""), seconds_by_kind(history)),
        *(readings if history.readings else []),
        "### To do it again",
        commands,
        _table(("option", "value"), options(history)),
        _table(("where it ran", ""), environment(history)),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_text(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] + ["---:" if len(head) > 2 else "---"] * (len(head) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(text: str) -> str:
    """`text` as Markdown shows it: no markup of its own, in one line."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(" ".join(text.split()), quote=False))
