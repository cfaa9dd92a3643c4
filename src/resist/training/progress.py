"""The display of a run: redrawn every second on a terminal, a log line now and then elsewhere.

It knows records of metrics.jsonl and nothing else, so `resist watch` shows a run as its own terminal does.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from resist.report.colors import color_of
from resist.report.plan_view import block_row
from resist.report.units import amount
from resist.runs.records import allreduced_bytes, training_bytes, training_seconds

EVERY_S = 10.0  # between two lines, without a terminal
RECENT = 50  # rounds that the remaining time is estimated from
LATE_S, LATE_ROUNDS = 10.0, 3  # without a record for so long, and for so many rounds' time, the display says so


class Summary:
    """Running totals of a run's records.

    Args:
        rounds: the number of rounds that the run will have, or None where it is unknown.

    Attributes:
        rounds: as above.
        seconds: seconds by phase.
        training_s: training seconds, without evaluations.
        bytes: training bytes, sent by all workers.
        done: the number of the last round.
        accuracy: the last score of the full network, 0 to 1, or None before the first test.
        score: the name of that score.
        tested: the round of that score.
        last: the last record.
        recent: seconds, training seconds and images of the last rounds.
    """

    def __init__(self, rounds: int | None) -> None:
        self.rounds = rounds
        self.seconds: dict[str, float] = {}
        self.training_s = 0.0
        self.bytes = self.done = self.tested = 0
        self.accuracy: float | None = None
        self.score = "accuracy"
        self.last: Mapping[str, Any] = {}
        self.recent: deque[tuple[float, float, int]] = deque(maxlen=RECENT)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a round.

        Args:
            record: as the training loop writes it, or as `resist.runs.records.clean` returns it.
        """
        for phase, value in record["seconds"].items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + value
        training_s = training_seconds(record)
        self.training_s += training_s
        self.bytes += training_bytes(record)
        self.done, self.last = record["round"], record
        if record["accuracy"] is not None:
            self.accuracy, self.tested = record["accuracy"], record["round"]
            self.score = next(iter(record.get("scores") or ()), self.score)
        self.recent.append((sum(record["seconds"].values()), training_s, record.get("images", 0)))

    @property
    def round_s(self) -> float:
        """Mean seconds of the last rounds, including evaluations; 0 before the first."""
        return sum(seconds for seconds, _, _ in self.recent) / max(1, len(self.recent))

    @property
    def images_s(self) -> float:
        """Images per second of all workers together over the last five rounds, without evaluations."""
        last = list(self.recent)[-5:]
        training_s = sum(seconds for _, seconds, _ in last)
        return sum(images for _, _, images in last) / training_s if training_s > 0 else 0.0

    def left_s(self, since_s: float = 0.0) -> float | None:
        """Estimated seconds to the end of the run.

        Args:
            since_s: seconds since the last record.

        Returns:
            The estimate, or None where there is no record or the number of rounds is unknown.
        """
        if self.rounds is None or not self.done:
            return None
        return max(0.0, (self.rounds - self.done) * self.round_s - since_s)

    def figures(self, since_s: float = 0.0) -> list[str]:
        """The numbers of the last round as texts, the most important first."""
        if not self.last:
            return ["the first round is running"]
        texts = [f"loss {self.last['loss']:.4f}"]
        if self.accuracy is not None:
            when = f" (round {self.tested})" if self.tested < self.done else ""
            texts.append(f"{self.score} {100 * self.accuracy:.2f} %{when}")
        texts += [f"{self.images_s:,.0f} images/s"] if self.images_s else []
        left = self.left_s(since_s)
        if left is not None and self.done < (self.rounds or 0):
            texts.append(f"{clock(left)} left")
        epoch = self.last.get("epoch", float("nan"))
        texts += [f"epoch {epoch:.2f}"] if epoch == epoch else []
        texts.append(f"sent {amount(self.bytes)}")
        return texts


def clock(seconds: float) -> str:
    """Format a duration, such as 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Display:
    """Show a summary while it grows. A context manager.

    Args:
        title: the first line.
        summary: what is shown.
        live: redraw every second, on a terminal that can. Otherwise print a line for each test and every ten seconds.
        console: where to print. Default: standard output.
        remark: returns a sentence to show below the numbers, or "".
    """

    def __init__(
        self,
        title: str,
        summary: Summary,
        *,
        live: bool = True,
        console: Console | None = None,
        remark: Callable[[], str] = lambda: "",
    ) -> None:
        self.title, self.summary, self.remark = title, summary, remark
        self.console = console or Console(highlight=False)
        # rich alone takes a wish for colors, as FORCE_COLOR in a log, for a terminal.
        able = self.console.is_terminal and self.console.is_interactive and not self.console.is_dumb_terminal
        self.live = live and able and self.console.file.isatty()
        self._lock = threading.Lock()  # rich draws in a thread of its own
        self._last_record, self._last_line = time.monotonic(), 0.0
        self._live = Live(
            console=self.console,
            get_renderable=self._locked,
            refresh_per_second=1,
            vertical_overflow="crop",
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "Display":
        if self.live:
            self._live.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Release the terminal; the last picture remains."""
        if self.live:
            self._live.stop()

    @property
    def silent_s(self) -> float:
        """Seconds since the last record."""
        return time.monotonic() - self._last_record

    def heard(self, age_s: float) -> None:
        """Set the age of the last record, for records that are older than this display."""
        self._last_record = time.monotonic() - max(0.0, age_s)

    def restart(self, rounds: int | None) -> None:
        """Forget the records: the run started again."""
        with self._lock:
            self.summary = Summary(rounds)

    def add(self, record: Mapping[str, Any], *, fresh: bool = True) -> None:
        """Add a round.

        Args:
            record: see `Summary.add`.
            fresh: the round has just ended, and may be worth a line.
        """
        with self._lock:
            self.summary.add(record)
        if not fresh:
            return
        self._last_record = time.monotonic()
        if not self.live and (record["accuracy"] is not None or self._last_record - self._last_line > EVERY_S):
            self.line()

    def line(self) -> None:
        """Print the line of the last round."""
        self._last_line = time.monotonic()
        of = "" if self.summary.rounds is None else f"/{self.summary.rounds}"
        self.console.print(f"round {self.summary.done}{of}  " + "  ".join(self.summary.figures()), soft_wrap=True)

    def tick(self) -> None:
        """Print the remark of the moment, if any, at most every ten seconds. For displays that are not live."""
        remark = self.remark() or self.late()
        if not self.live and remark and time.monotonic() - self._last_line > EVERY_S:
            self._last_line = time.monotonic()
            self.console.print(remark, soft_wrap=True)

    def late(self) -> str:
        """A remark where no record has come for longer than rounds take, else ""."""
        silent = self.silent_s
        if silent < max(LATE_S, LATE_ROUNDS * self.summary.round_s):
            return ""
        return f"no record for {silent:.0f} s"

    def _locked(self) -> RenderableType:
        with self._lock:
            remark = self.remark() or self.late()
            return picture(self.title, self.summary, self.console.size, self.silent_s, remark)


def picture(
    title: str, summary: Summary, size: tuple[int, int], since_s: float = 0.0, remark: str = ""
) -> RenderableType:
    """The display as rich draws it.

    Args:
        title: the first line.
        summary: what is shown.
        size: (columns, lines) that it must fit.
        since_s: seconds since the last record.
        remark: the last line, or "".
    """
    width, height = max(20, size[0]), max(6, size[1])
    of = "" if summary.rounds is None else f"/{summary.rounds}"
    bar = ProgressBar(
        total=summary.rounds,
        completed=summary.done,
        width=max(4, min(60, width - 16 - len(of))),
        pulse=summary.rounds is None,
    )
    head = Table.grid(padding=(0, 1))
    head.add_row(Text(f"round {summary.done}{of}", no_wrap=True), bar)
    # Spaces within a number and its unit must not be broken.
    figures = Text("   ".join(part.replace(" ", "\u00a0") for part in summary.figures(since_s)), overflow="fold")
    lines = len(figures.wrap(Console(width=width), width))
    parts: list[RenderableType] = [Text(title, style="bold", no_wrap=True, overflow="ellipsis"), head, figures]
    room = height - 5 - lines - bool(remark)
    if summary.last.get("workers") and room >= 3:
        parts.append(worker_table(summary.last, width, room))
    if remark:
        parts.append(Text(remark, style="yellow", no_wrap=True, overflow="ellipsis"))
    return Group(*parts, Text(""))  # an empty line for other output, as a terminal that echoes ^C


def worker_table(record: Mapping[str, Any], width: int, height: int) -> Table:
    """A line for each worker of a record, as many as fit into `height` lines of `width` columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    plans = record.get("plan") or {}
    workers, most = record["workers"], height - 1
    blocks = {name: 1 + max((block for held in plan for block in held), default=0) for name, plan in plans.items()}
    rows_fit = width - 44 >= sum(blocks.values()) + len(blocks)  # else the number of blocks has to do
    columns = ["worker"] + ["blocks"] * bool(plans) + ["compute s"] * (width >= 32) + ["exchange s"] * (width >= 44)
    columns += ["sent"] * (width >= 56)
    for name in columns:
        table.add_column(name, justify="left" if name == "blocks" else "right", no_wrap=True, overflow="ellipsis")
    sent = sent_by(record)
    shown = workers if len(workers) <= most else workers[: most - 1]
    for number, worker in enumerate(shown):
        index = int(worker.get("worker", number))
        held = [(plan[index] if index < len(plan) else (), blocks[name]) for name, plan in plans.items()]
        marks = " ".join(block_row(h, range(n)) for h, n in held)
        exchange = worker.get("exchange_s")
        cells: dict[str, str | Text] = {
            "worker": str(index),
            "blocks": Text(marks, color_of(index)) if rows_fit else ", ".join(f"{len(h)} of {n}" for h, n in held),
            "compute s": f"{worker.get('compute_s', 0.0):.2f}",
            "exchange s": "" if exchange is None else f"{exchange:.2f}",
            "sent": amount(sent.get(index, 0)),
        }
        table.add_row(*(cells[name] for name in columns))
    if len(shown) < len(workers):
        table.add_row("…", f"{len(workers) - len(shown)} more", *[""] * (len(columns) - 2))
    return table


def sent_by(record: Mapping[str, Any]) -> dict[int, float]:
    """Bytes that each worker sent in a round: to other workers, and its part of the all-reduces."""
    workers = record["workers"]
    each = allreduced_bytes(record) / max(1, len(workers))
    sent = {int(worker.get("worker", number)): each for number, worker in enumerate(workers)}
    for source, _, num_bytes in record.get("pairs") or ():
        sent[source] = sent.get(source, each) + num_bytes
    return sent
