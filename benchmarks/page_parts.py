"""Markdown of the generated pages: text from benchmarks/pages/, and tables and values that the code fills in."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sources import changed

Record = dict[str, Any]
PAGES = Path(__file__).parent / "pages"
MARK = " **Code changed since: {}.**"


class Parts:
    """The parts of a page, by name.

    A part begins after a line `<!-- part: NAME -->`, and ends before the next one. Text before the first part explains
    the file, and is not part of the page.

    Args:
        file: Markdown with parts.
    """

    def __init__(self, file: Path) -> None:
        _, *pieces = re.split(r"^<!-- part: ([\w-]+) -->$", file.read_text(encoding="utf-8"), flags=re.M)
        self.texts = {name: text.strip() for name, text in zip(pieces[::2], pieces[1::2], strict=True)}

    def fill(self, part: str, /, **values: object) -> str:
        """Return a part with its values. An empty value in a paragraph of its own leaves no gap."""
        return re.sub(r" *\n{3,}| +\n\n", "\n\n", self.texts[part].format(**values)).strip()


fill = Parts(PAGES / "results.md").fill


def rows(cells: Iterable[Sequence[object]]) -> str:
    """Return the rows of a Markdown table."""
    lines = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(head: Sequence[str], cells: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table; all columns but the first are aligned to the right."""
    return rows([head, ["---"] + ["---:"] * (len(head) - 1), *cells])


def provenance(*records: Record, n: str) -> str:
    """Describe machine, versions and number of measurements, one line for each distinct description.

    Each line ends with a mark if the code that was measured is not the one that is here.

    Args:
        records: The records with the figures.
        n: The part of the page that describes the number of measurements of a record.
    """
    lines = {
        fill("provenance", **{**record, "gpu": record["gpu"] or "no GPU", "n": fill(n, **record)}) + mark(record)
        for record in records
    }
    return "  \n".join(sorted(lines))


def mark(record: Record) -> str:
    """Name the source files of a record that have changed since; empty if none has."""
    paths = changed(record)
    if paths is None:
        return MARK.format("unknown, its line names no source files")
    short = [path.removeprefix("src/resist/").removeprefix("benchmarks/") for path in paths]
    return MARK.format(", ".join(f"`{path}`" for path in short)) if paths else ""


def without_marks(page: str) -> str:
    """Return a page without the marks, which depend on other files than the figures."""
    return re.sub(re.escape(MARK).replace(r"\{\}", "[^*]*"), "", page)


def reached(yes: bool) -> str:
    return "reached" if yes else "**missed**"


def signed(percent: float) -> str:
    return f"{round(percent, 1) + 0.0:+.1f} %"  # + 0.0 turns -0.0 into 0.0


def spread(values: Sequence[float]) -> float:
    return max(values) - min(values)
