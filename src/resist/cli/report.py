"""`resist report`: run directories as a page, a picture or Markdown that one can send to somebody."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from resist.errors import UserError
from resist.report.compare import labels
from resist.report.markdown import markdown
from resist.report.page import page
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
    """html: one page that needs nothing else. md: tables, and pictures beside it. png: the pictures, the curves in
    --out and those of each run beside it. Default: by the ending of --out."""
    force: bool = False
    """Replace files that are there already."""


def run_report(config: ReportConfig, arguments: list[str]) -> int:
    runs = found(config.runs)
    kind = config.format or (None if config.out is None else FORMATS.get(config.out.suffix.lower()))
    if kind is None and config.out is not None:
        raise UserError(f"--out {config.out} does not end in .html, .md or .png; give --format")
    kind = kind or "html"
    out = config.out or (runs[0] if len(runs) == 1 else Path()) / f"report.{kind}"
    histories = [read_history(run) for run in runs]
    written = write(histories, out, kind, config.force)
    print("wrote " + ", ".join(map(str, written)))
    return 0


def found(paths: Sequence[Path]) -> list[Path]:
    """The run directories that are meant: a directory that is none stands for those in it."""
    runs: list[Path] = []
    for path in paths:
        inside = sorted(one.parent for one in path.glob("*/config.json")) if path.is_dir() else []
        runs += inside if inside and not (path / "config.json").exists() else [path]
    if not runs:
        raise UserError("no run directory is given; name at least one, as in resist report runs/a")
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run directory is given twice; name each once")
    return runs


def write(histories: Sequence[History], out: Path, kind: str, force: bool) -> list[Path]:
    """Write the files of a report. Returns them; raises UserError before any is written where one may not be."""
    curves = out.with_suffix(".png")
    pictures = [out.with_name(f"{out.stem}-{number}.png") for number in range(1, len(histories) + 1)]
    for file in [out] if kind == "html" else [out, curves, *pictures]:
        if file.exists() and not force:
            raise UserError(f"{file} exists already; give --force to replace it, or another --out")
    files: dict[Path, str | bytes] = {}
    if kind == "html":
        files[out] = page(histories)
    else:
        from resist.report.png import curves_png, run_png  # matplotlib is slow to import

        if kind == "md":
            files[out] = markdown(histories, curves.name, [picture.name for picture in pictures])
        one = ["full network"] if len(histories) == 1 else labels(histories)
        files[out if kind == "png" else curves] = curves_png(histories, one)
        files |= {picture: run_png(history) for picture, history in zip(pictures, histories, strict=True)}
    for file, content in files.items():
        partial = file.with_name(f".{file.name}.partial")
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(file)
        except OSError as error:
            raise UserError(f"--out {file} cannot be written: {error.strerror}; give another file") from error
    return list(files)
