"""The report as Markdown: tables, and links to the pictures next to it."""

import re
from collections.abc import Sequence
from html import escape
from urllib.parse import quote

from resist.report import provenance, tables
from resist.report.compare import compare
from resist.report.conclusion import caveats, conclusion
from resist.runs.history import History


def markdown(histories: Sequence[History], curves: str, pictures: Sequence[str]) -> str:
    """The Markdown of a report on one run, or of a comparison of several.

    Args:
        histories: The runs.
        curves: File name of the picture of the curves.
        pictures: File name of the picture of each run.
    """
    names = tables.names_of(histories)
    parts = [f"# {_text(names[0]) if len(names) == 1 else f'{len(names)} runs compared'}"]
    if len(histories) > 1:
        comparison = compare(histories)
        parts += [_text(text) for text in conclusion(comparison)]
        parts += [f"> {_text(text)}" for text in caveats(comparison, histories)]
        parts += [_table(*tables.comparison_rows(comparison)), tables.COMPARISON_NOTE]
    parts.append(f"![Accuracy and loss against steps, time and bytes]({_link(curves)})")
    for history, name, picture in zip(histories, names, pictures, strict=True):
        parts += [f"## {_text(name)}"] if len(histories) > 1 else []
        parts += _one(history, picture)
    parts += ["### Reproduce", _code(provenance.repeat_all(histories))]
    for title, of in (("option", provenance.options), ("environment", provenance.environment)):
        if rows := provenance.differing(histories, of):
            parts.append(_table((f"{title} that differs", *names), rows))
        parts.append(
            _table((title, "value" if len(histories) == 1 else "of all runs"), provenance.common(histories, of))
        )
    return "\n\n".join(parts) + "\n"


def _one(history: History, picture: str) -> list[str]:
    readings = [
        "### BatchNorm statistics and scale of the full network",
        _table(("", ""), tables.reading_rows(history)),
        tables.READINGS_NOTE,
    ]
    members = ["### Members that came and went", _table(*tables.member_rows(history)), tables.MEMBERS_NOTE]
    return [
        f"{_text(tables.sentence(history))} ({tables.ENDS[history.ended]})",
        *map(_text, [*tables.local_sgd_sentence(history), *tables.members_sentence(history)]),
        *(f"> {_text(note)}" for note in tables.notes(history)),
        _table(("", ""), tables.headline(history)),
        f"![Which worker held which block, bytes from worker to worker, seconds of a round]({_link(picture)})",
        "### The workers",
        _table(*tables.worker_rows(history)),
        tables.WORKERS_NOTE,
        *(members if history.generations else []),
        "### Where the time went",
        _table(("", ""), tables.seconds_by_phase(history)),
        *map(_text, tables.tester_sentence(history)),
        *(readings if history.readings else []),
    ]


def _code(lines: Sequence[str]) -> str:
    return "\n".join("    " + " ".join(line.splitlines()) for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[_text(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---"] + ["---:" if len(head) > 2 else "---"] * (len(head) - 1))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _link(name: str) -> str:
    """Return the name of a file as in a link."""
    return quote(name, errors="surrogateescape")


def _text(text: str) -> str:
    """`text` in one line, with Markdown's markup escaped."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape(" ".join(text.split()), quote=False))
