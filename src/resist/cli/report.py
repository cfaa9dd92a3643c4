"""`resist report`: run directories as an HTML page, as Markdown with pictures, or as pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resist.cli.options import as_typed
from resist.errors import UserError
from resist.planning.methods import METHODS
from resist.report.compare import labels
from resist.report.markdown import markdown
from resist.report.page import page
from resist.runs.atomic import write_atomically
from resist.runs.history import History, read_history

FORMATS = {".html": "html", ".htm": "html", ".md": "md", ".png": "png"}


@dataclass(frozen=True)
class ReportConfig:
    """Write a report on one run, or on several and how they compare, from their directories."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Run directories, or directories of runs as resist compare makes them."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File to write. Default: report.html in the directory of the run, or here for several."""
    format: Literal["html", "md", "png"] | None = None
    """html: one self-contained page. md: tables, and pictures in files next to it. png: the pictures alone,
    the curves in --out and those of each run next to it. Default: by the ending of --out."""
    force: bool = False
    """Replace existing files."""


def run_report(config: ReportConfig, given: frozenset[str]) -> int:
    """Write the report and print the names of its files. Returns the exit status. Raises UserError."""
    runs = run_directories(config.runs)
    format = config.format or (None if config.out is None else FORMATS.get(config.out.suffix.lower()))
    if format is None and config.out is not None:
        raise UserError(f"--out {config.out} does not end in .html, .md or .png; give --format")
    format = format or "html"
    out = config.out or (runs[0] if len(runs) == 1 else Path()) / f"report.{format}"
    order = list(METHODS)
    histories = sorted((_read(run) for run in runs), key=lambda history: order.index(history.config.method.strategy))
    written = write(histories, out, format, config.force)
    print("wrote " + ", ".join(map(str, written)))
    return 0


def _read(run: Path) -> History:
    """Read a run, with the options that its error names as the user types them."""
    history = read_history(run)
    error = history.state.get("error")
    return replace(history, state={**history.state, "error": as_typed(str(error))}) if error else history


def run_directories(paths: Sequence[Path]) -> list[Path]:
    """The run directories of `paths`: a directory that is not one stands for the runs in it.

    Raises:
        UserError: There is none, or one is given twice.
    """
    runs: list[Path] = []
    for path in paths:
        inside = sorted(file.parent for file in path.glob("*/config.json")) if path.is_dir() else []
        runs += inside if inside and not (path / "config.json").exists() else [path]
    if not runs:
        raise UserError("no run directory is given; name at least one, as in resist report runs/a")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run directory is given twice; name each once")
    return runs


def write(histories: Sequence[History], out: Path, format: str, force: bool) -> list[Path]:
    """Write the files of a report.

    Args:
        histories: The runs.
        out: The main file; pictures get names that begin with its stem.
        format: One of html, md and png.
        force: Replace existing files.

    Returns:
        The files.

    Raises:
        UserError: A file exists and `force` is false (then none is written), or cannot be written.
    """
    curves = out.with_suffix(".png")
    pictures = [out.with_name(f"{out.stem}-{number}.png") for number in range(1, len(histories) + 1)]
    for file in [out] if format == "html" else [out, curves, *pictures]:
        if file.exists() and not force:
            raise UserError(f"{file} exists already; give --force to replace it, or another --out")
    files: dict[Path, str | bytes] = {}
    if format == "html":
        files[out] = page(histories)
    else:
        from resist.report.png import curves_png, run_png  # needs matplotlib

        if format == "md":
            files[out] = markdown(histories, curves.name, [picture.name for picture in pictures])
        names = ["full network"] if len(histories) == 1 else labels(histories)
        files[out if format == "png" else curves] = curves_png(histories, names)
        files |= {picture: run_png(history) for picture, history in zip(pictures, histories, strict=True)}
    for file, content in files.items():
        try:
            write_atomically(file, content)
        except OSError as error:
            raise UserError(f"--out {file} cannot be written: {error.strerror}; give another file") from error
    return list(files)
