"""The report as one HTML page without external files."""

from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Any

import resist
from resist.report import tables
from resist.report.compare import colors, compare, labels
from resist.report.figures import curves_of, holdings_figures, matrix, seconds_figure
from resist.report.svg import legend, line_plot
from resist.runs.history import History


def page(histories: Sequence[History]) -> str:
    """The HTML of a report on one run, or of a comparison of several."""
    names = tables.names_of(histories)
    title = names[0] if len(names) == 1 else f"{len(names)} runs compared"
    body = _several(histories, names) if len(histories) > 1 else _one(histories[0], names[0], "h1")
    here = files("resist.report")
    css, script = ((here / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    now = f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}".strip()
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} – resist</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"{body}\n<footer>Written by resist {escape(resist.__version__)} on {escape(now)} from "
        f"{'its run directory' if len(histories) == 1 else 'their run directories'}.</footer>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _several(histories: Sequence[History], names: Sequence[str]) -> str:
    head, rows = tables.comparison_rows(compare(histories))
    links = "".join(f'<li><a href="#run-{i}">{escape(name)}</a></li>' for i, name in enumerate(names, start=1))
    parts = [
        f"<header><h1>{len(names)} runs compared</h1><nav><ul>{links}</ul></nav></header>",
        f'<section id="comparison">{table(head, rows)}<p class="note">{escape(tables.COMPARISON_NOTE)}</p></section>',
        curves(histories, labels(histories)),
    ]
    for number, (history, name) in enumerate(zip(histories, names, strict=True), start=1):
        parts.append(f'<article id="run-{number}">{_one(history, name, "h2")}</article>')
    return "\n".join(parts)


def _one(history: History, name: str, heading: str) -> str:
    alone = heading == "h1"
    badge = f'<span class="badge">{escape(tables.ENDS[history.ended])}</span>'
    tiles = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in tables.headline(history))
    parts = [
        f"<header><{heading}>{escape(name)}{badge}</{heading}><p>{escape(tables.sentence(history))}</p></header>",
        *(f'<p class="warning">{escape(note)}</p>' for note in tables.notes(history)),
        f'<dl class="tiles">{tiles}</dl>',
        curves([history], ["full network"]) if alone else "",
    ]
    parts += [
        f"<section><h3>Blocks of each worker, by round</h3>{figures}</section>" for figures in holdings_figures(history)
    ]
    head, rows = tables.worker_rows(history)
    parts += [
        f'<section><h3>Traffic and time</h3><div class="pair">{matrix(history)}'
        f"{seconds_figure(history)}</div></section>",
        f'<section><h3>The workers</h3>{table(head, rows)}<p class="note">{tables.WORKERS_NOTE}</p></section>',
        f"<section><h3>Seconds by phase</h3>{pairs(tables.seconds_by_phase(history))}</section>",
    ]
    if history.readings:
        parts.append(
            f"<section><h3>BatchNorm statistics and scale of the full network</h3>{pairs(tables.reading_rows(history))}"
            f'<p class="note">{tables.READINGS_NOTE}</p></section>'
        )
    parts.append(
        f"<section><h3>Reproduce</h3><pre>{escape(chr(10).join(tables.repeat(history)))}</pre>"
        f"<details><summary>All options</summary>{pairs(tables.options(history))}</details>"
        f"<details open><summary>Environment</summary>{pairs(tables.environment(history))}</details></section>"
    )
    return "\n".join(part for part in parts if part)


def curves(histories: Sequence[History], names: Sequence[str]) -> str:
    """Six figures: accuracy and loss against steps, time and bytes."""
    figures = [line_plot(c.title, c.x_label, c.y_label, c.series, log_x=c.log_x) for c in curves_of(histories, names)]
    of_name = colors(names)
    key = legend([(name, of_name[name]) for name in dict.fromkeys(names)]) if len(set(names)) > 1 else ""
    return f'<section id="curves"><div class="figures">{"".join(figures)}</div>{key}</section>'


def pairs(rows: tables.Rows) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="pairs">{cells}</table></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table with a head."""
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    cells = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{first}</tr></thead><tbody>{cells}</tbody></table></div>'
