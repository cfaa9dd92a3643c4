"""The report as one HTML page without external files."""

from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import Any

import resist
from resist.report import provenance, tables
from resist.report.compare import compare, labels
from resist.report.conclusion import caveats, conclusion
from resist.report.curves import curves_of
from resist.report.figures import holdings_figures, matrix, seconds_figure, step_bars, wall_bar
from resist.report.svg import line_legend, line_plot, scroll
from resist.runs.history import History


def page(histories: Sequence[History]) -> str:
    """The HTML of a report on one run, or of a comparison of several."""
    names = tables.names_of(histories)
    title = names[0] if len(names) == 1 else f"{len(names)} runs compared"
    body = _several(histories, names) if len(histories) > 1 else _alone(histories[0], names[0])
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


def _alone(history: History, name: str) -> str:
    """The page of one run."""
    maps, rest = _figures(history)
    commands = _commands(provenance.repeat(history))
    parts = [
        f"<header><h1>{escape(name)}{_badge(history)}</h1>{_sentences(history)}</header>\n<main>",
        _tiles(history),
        curves([history], ["full network"]),
        maps,
        f'<div class="columns">{rest}<section><h2>Reproduce</h2>{commands}</section>'
        f"<section><h2>Environment</h2>{pairs(provenance.environment(history), 'Environment')}</section>"
        f"<section><h2>Options</h2><details><summary>All options</summary>"
        f"{pairs(provenance.options(history), 'Options')}</details></section></div>\n</main>",
    ]
    return "\n".join(parts)


def _several(histories: Sequence[History], names: Sequence[str]) -> str:
    """The page of a comparison: its conclusion, the numbers, the curves, each run, and where they come from."""
    comparison, of_run = compare(histories), labels(histories)
    head, rows = tables.comparison_rows(comparison)
    links = "".join(f'<li><a href="#run-{i}">{escape(name)}</a></li>' for i, name in enumerate(names, start=1))
    lead = "".join(map(_paragraph, conclusion(comparison)))
    numbers = f'{table(head, rows, "Comparison")}<p class="note">{escape(tables.COMPARISON_NOTE)}</p>'
    warnings = "".join(f'<p class="warning">{escape(text)}</p>' for text in caveats(comparison, histories))
    parts = [
        f'<header><h1>{len(names)} runs compared</h1><div class="lead">{lead}</div>{warnings}</header>\n<main>',
        f'<section id="comparison" class="beside"><div>{numbers}</div>'
        f"<div>{''.join(step_bars(comparison))}</div></section>",
        curves(histories, of_run),
        f'<nav aria-label="Runs"><h2>The runs</h2><ul>{links}</ul></nav><div class="tiled runs">',
    ]
    first = {of_run.index(label) for label in of_run}  # further seeds look alike: they come last, and folded
    for i in sorted(range(len(histories)), key=lambda number: number not in first):
        history, name, state = histories[i], names[i], " open" if i in first else ""
        maps, rest = _figures(history)
        parts.append(
            f'<details class="run"{state}><summary><h2>{escape(name)}{_badge(history)}</h2></summary>'
            f'<article id="run-{i + 1}">{_sentences(history)}{_tiles(history)}{maps}'
            f'<div class="columns">{rest}</div></article></details>'
        )
    return "\n".join([*parts, "</div>", _provenance(histories, names), "</main>"])


def _provenance(histories: Sequence[History], names: Sequence[str]) -> str:
    """Commands, options and environment of several runs: what is equal once, and what differs for each run."""
    environment, options = provenance.environment, provenance.options
    differing = [*provenance.differing(histories, options), *provenance.differing(histories, environment)]
    return (
        '<section id="provenance"><h2>Where these numbers come from</h2><div class="tiled">'
        f"<div><h3>Reproduce</h3>{_commands(provenance.repeat_all(histories))}</div>"
        f"<div><h3>What differs between the runs</h3>{table(['', *names], differing, 'What differs')}</div>"
        f"<div><h3>The same for all runs</h3>{pairs(provenance.common(histories, environment), 'Environment of all')}"
        f"<details><summary>All options</summary>{pairs(provenance.common(histories, options), 'Options of all')}"
        "</details></div></div></section>"
    )


NARROW_ROUNDS = 20  # up to which a partition map fits into a column


def _figures(history: History) -> tuple[str, str]:
    """The figures that need the whole width, and the sections that fill columns, where few rounds fit as well."""
    heading = "<h2>Blocks of each worker, by round</h2>"
    maps = [f"<section>{heading if i == 0 else ''}{each}</section>" for i, each in enumerate(holdings_figures(history))]
    wide = "".join(maps) if len(history.rounds) > NARROW_ROUNDS else ""
    head, rows = tables.worker_rows(history)
    sections = [
        *([] if wide else maps),
        f"<section><h2>Time</h2>{wall_bar(history)}{pairs(tables.seconds_by_phase(history), 'Where the time went')}"
        "</section>",
        f"<section>{seconds_figure(history)}</section>",
        f"<section><h2>Traffic</h2>{matrix(history)}</section>",
        f"<section><h2>The workers</h2>{table(head, rows, 'Workers')}"
        f'<p class="note">{tables.WORKERS_NOTE}</p></section>',
    ]
    if history.generations:
        sections.append(
            f"<section><h2>Members that came and went</h2>{table(*tables.member_rows(history), 'Members')}"
            f'<p class="note">{tables.MEMBERS_NOTE}</p></section>'
        )
    if history.readings:
        sections.append(
            "<section><h2>BatchNorm statistics and scale of the full network</h2>"
            f'{pairs(tables.reading_rows(history), "Readings")}<p class="note">{tables.READINGS_NOTE}</p></section>'
        )
    return wide, "".join(sections)


def _sentences(history: History) -> str:
    texts = [tables.sentence(history), *tables.local_sgd_sentence(history), *tables.members_sentence(history)]
    warnings = "".join(f'<p class="warning">{escape(note)}</p>' for note in tables.notes(history))
    return "".join(map(_paragraph, texts)) + warnings


def _paragraph(text: str) -> str:
    return f"<p>{escape(text).replace(' %', '&nbsp;%')}</p>"


def _badge(history: History) -> str:
    return f' <span class="badge">{escape(tables.ENDS[history.ended])}</span>'


def _tiles(history: History) -> str:
    short = [(name, value.partition(" (")[0]) for name, value in tables.headline(history)]  # the parts are shown below
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in short)
    return f'<dl class="tiles">{tiles}</dl>'


def _commands(lines: Sequence[str]) -> str:
    return f'<pre tabindex="0">{escape(chr(10).join(lines))}</pre>'


def curves(histories: Sequence[History], names: Sequence[str]) -> str:
    """Figures of accuracy and loss against steps, time and bytes, with the legend before them.

    A run that was tested once or never has no curve of its accuracy.
    """
    plots, notes = curves_of(histories, names), list[str]()
    if len(histories) == 1 and len(histories[0].tested) < 2:  # no curve
        plots = plots[len(plots) // 2 :]
        notes.append(tables.tests_sentence(histories[0]))
    figures = [line_plot(c.title, c.x_label, c.y_label, c.series, log_x=c.log_x) for c in plots]
    if any(line.low for plot in plots for line in plot.series):
        notes.append("A line is the mean of runs, the band goes from the lowest to the highest.")
    note = "".join(f'<p class="note">{escape(text)}</p>' for text in notes)
    key = line_legend(plots[0].series) if len(set(names)) > 1 else ""
    kind = "figures" if len(figures) > 3 else "figures three"
    return f'<section id="curves">{key}{note}<div class="{kind}">{"".join(figures)}</div></section>'


def pairs(rows: tables.Rows, name: str) -> str:
    """A table of names and values; `name` is that of the table."""
    cells = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(value)}</td></tr>' for key, value in rows)
    return scroll(f'<table class="pairs">{cells}</table>', name)


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> str:
    """A table with a head, and a name in the first cell of each row; `name` is that of the table."""
    first = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    cells = "".join(
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return scroll(f"<table><thead><tr>{first}</tr></thead><tbody>{cells}</tbody></table>", name)
