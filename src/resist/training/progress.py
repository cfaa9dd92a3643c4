"""What a person sees of a run: a display that is drawn again and again on a terminal, a line now and then elsewhere.

It knows records of metrics.jsonl and nothing else, so a run that is watched from elsewhere looks as it does where it
goes on.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from resist.report.colors import color_of
from resist.report.units import amount

EVERY_S = 10.0  # between two lines, without a terminal
TIMED = ("compute", "wait", "sync")  # kinds of seconds that belong to training
RECENT = 50  # rounds that the time left is estimated from
LATE_S, LATE_ROUNDS = 10.0, 3  # without news for so long, and for so many rounds' time, the display says so


class Summary:
    """The records so far, added up. rounds: how many there will be, or None where nobody knows."""

    def __init__(self, rounds: int | None) -> None:
        self.rounds = rounds
        self.seconds: dict[str, float] = {}
        self.bytes = self.done = 0
        self.accuracy: float | None = None
        self.score = "accuracy"  # its name: of the scores of a task the one that counts
        self.tested = 0  # the round of `accuracy`
        self.last: Mapping[str, Any] = {}
        self._recent: deque[tuple[float, float, int]] = deque(maxlen=RECENT)  # seconds, those of training, images

    def add(self, record: Mapping[str, Any]) -> None:
        for kind, value in record["seconds"].items():
            self.seconds[kind] = self.seconds.get(kind, 0.0) + value
        self.bytes += sum(num for kind, num in record["bytes"].items() if kind != "evaluate")
        self.done, self.last = record["round"], record
        if record["accuracy"] is not None:
            self.accuracy, self.tested = record["accuracy"], record["round"]
            self.score = next(iter(record.get("scores") or ()), self.score)
        timed = sum(record["seconds"].get(kind, 0.0) for kind in TIMED)
        self._recent.append((sum(record["seconds"].values()), timed, record.get("images", 0)))

    @property
    def round_s(self) -> float:
        """Mean seconds of the last rounds, evaluations among them; 0 before the first."""
        return sum(one[0] for one in self._recent) / max(1, len(self._recent))

    @property
    def images_s(self) -> float:
        """Images a second that all workers together trained on, in the last few rounds, evaluations left out."""
        few = list(self._recent)[-5:]
        timed = sum(one[1] for one in few)
        return sum(one[2] for one in few) / timed if timed > 0 else 0.0

    def left_s(self, since_s: float = 0.0) -> float | None:
        """Seconds that it will probably take from now on, `since_s` after the last record."""
        if self.rounds is None or not self.done:
            return None
        return max(0.0, (self.rounds - self.done) * self.round_s - since_s)

    def figures(self, since_s: float = 0.0) -> list[str]:
        """The round's numbers in words, the most wanted first."""
        if not self.last:
            return ["the first round is under way"]
        found = [f"loss {self.last['loss']:.4f}"]
        if self.accuracy is not None:
            when = f" (round {self.tested})" if self.tested < self.done else ""
            found.append(f"{self.score} {100 * self.accuracy:.2f} %{when}")
        found += [f"{self.images_s:,.0f} images/s"] if self.images_s else []
        left = self.left_s(since_s)
        if left is not None and self.done < (self.rounds or 0):
            found.append(f"{clock(left)} left")
        epoch = self.last.get("epoch", float("nan"))
        found += [f"epoch {epoch:.2f}"] if epoch == epoch else []
        found.append(f"sent {amount(self.bytes)}")
        return found


def clock(seconds: float) -> str:
    """1:02:03"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Display:
    """Shows a summary while it grows; a context.

    live:   drawn again every second; else a line for each test, and every ten seconds. Only a terminal can be live.
    remark: asked for a sentence to be shown below, or "".
    """

    def __init__(
        self, title: str, summary: Summary, *, live: bool = True, console: Console | None = None,
        remark: Callable[[], str] = lambda: "",
    ) -> None:  # fmt: skip
        self.title, self.summary, self.remark = title, summary, remark
        self.console = console or Console(highlight=False)
        self.live = live and self.console.is_terminal and not self.console.is_dumb_terminal
        self._lock = threading.Lock()
        self._news, self._last_line, self._said = time.monotonic(), 0.0, ""
        self._live = Live(
            console=self.console, get_renderable=self._locked, refresh_per_second=1, vertical_overflow="crop",
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def __enter__(self) -> "Display":
        if self.live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the terminal to others, the last picture standing."""
        if self.live:
            self._live.stop()

    @property
    def silent_s(self) -> float:
        """Seconds since the last record."""
        return time.monotonic() - self._news

    def heard(self, age_s: float) -> None:
        """The last news is so old; for records that were there already."""
        self._news = time.monotonic() - max(0.0, age_s)

    def restart(self, rounds: int | None) -> None:
        """Forget the records: the run began anew."""
        with self._lock:
            self.summary.__init__(rounds)

    def add(self, record: Mapping[str, Any], *, fresh: bool = True) -> None:
        """Take a record in. fresh: it is of now, and may be worth a line."""
        with self._lock:
            self.summary.add(record)
        if not fresh:
            return
        self._news = time.monotonic()
        if not self.live and (record["accuracy"] is not None or self._news - self._last_line > EVERY_S):
            self.line()

    def line(self) -> None:
        """Print the line of the last round."""
        self._last_line = time.monotonic()
        of = "" if self.summary.rounds is None else f"/{self.summary.rounds}"
        self.console.print(f"round {self.summary.done}{of}  " + "  ".join(self.summary.figures()), soft_wrap=True)

    def tick(self) -> None:
        """Without a terminal, say what is to be remarked, each thing once in a while; call it now and then."""
        said = self.remark() or self.late()
        if not self.live and said and time.monotonic() - self._last_line > EVERY_S:
            self._last_line = time.monotonic()
            self.console.print(said, soft_wrap=True)

    def late(self) -> str:
        """A sentence where there was no news for longer than rounds take."""
        silent = self.silent_s
        if silent < max(LATE_S, LATE_ROUNDS * self.summary.round_s):
            return ""
        return f"no news for {silent:.0f} s"

    def _locked(self) -> RenderableType:
        with self._lock:
            remark = self.remark() or self.late()
            return picture(self.title, self.summary, self.console.size, self.silent_s, remark)


def picture(
    title: str, summary: Summary, size: tuple[int, int], since_s: float = 0.0, remark: str = ""
) -> RenderableType:
    """The display as it is drawn into `size`, (columns, lines)."""
    width, height = max(20, size[0]), max(6, size[1])
    of = "" if summary.rounds is None else f"/{summary.rounds}"
    head = Table.grid(padding=(0, 1))
    head.add_row(
        Text(f"round {summary.done}{of}", no_wrap=True),
        ProgressBar(
            total=summary.rounds, completed=summary.done, width=max(4, min(60, width - 16 - len(of))),
            pulse=summary.rounds is None,
        ),
    )  # fmt: skip
    figures = Text("   ".join(part.replace(" ", "\u00a0") for part in summary.figures(since_s)), overflow="fold")
    lines = len(figures.wrap(Console(width=width), width))
    parts: list[RenderableType] = [Text(title, style="bold", no_wrap=True, overflow="ellipsis"), head, figures]
    room = height - 5 - lines - bool(remark)
    if summary.last.get("workers") and room >= 3:
        parts.append(worker_table(summary.last, width, room))
    if remark:
        parts.append(Text(remark, style="yellow", no_wrap=True, overflow="ellipsis"))
    return Group(*parts, Text(""))  # where others may write, as a terminal that echoes ^C


def worker_table(record: Mapping[str, Any], width: int, height: int) -> Table:
    """A line for each worker of a record, as many as `height` lines have room for."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    plans = record.get("plan") or {}
    workers, most = record["workers"], height - 1
    blocks = {name: 1 + max((block for held in plan for block in held), default=0) for name, plan in plans.items()}
    strips = width - 44 >= sum(blocks.values()) + len(blocks)
    columns = ["worker"] + ["blocks"] * bool(plans) + ["compute s"] * (width >= 32) + ["exchange s"] * (width >= 44)
    columns += ["sent"] * (width >= 56)
    for name in columns:
        table.add_column(name, justify="left" if name == "blocks" else "right", no_wrap=True, overflow="ellipsis")
    sent = sent_by(record)
    shown = workers if len(workers) <= most else workers[: most - 1]
    for number, worker in enumerate(shown):
        index = int(worker.get("worker", number))
        held = [(plan[index] if index < len(plan) else (), blocks[name]) for name, plan in plans.items()]
        exchange = worker.get("exchange_s")
        cells: dict[str, str | Text] = {
            "worker": str(index),
            "blocks": strip(held, color_of(index)) if strips else ", ".join(f"{len(h)} of {n}" for h, n in held),
            "compute s": f"{worker.get('compute_s', 0.0):.2f}",
            "exchange s": "" if exchange is None else f"{exchange:.2f}",
            "sent": amount(sent.get(index, 0)),
        }
        table.add_row(*(cells[name] for name in columns))
    if len(shown) < len(workers):
        table.add_row("…", f"{len(workers) - len(shown)} more", *[""] * (len(columns) - 2))
    return table


def strip(held: Sequence[tuple[Sequence[int], int]], color: str) -> Text:
    """A place for each block, marked where it is held; held: (blocks, number of blocks) of each chain."""
    text = Text()
    for number, (own, blocks) in enumerate(held):
        text.append(" " if number else "")
        for block in range(blocks):
            text.append("■" if block in own else "·", style=color if block in own else "dim")
    return text


def sent_by(record: Mapping[str, Any]) -> dict[int, float]:
    """Bytes that each worker sent in a round: to other workers, and its part of the all-reduces."""
    workers = record["workers"]
    every = sum(record["bytes"].get(kind, 0) for kind in ("shared", "gradients")) / max(1, len(workers))
    sent = {int(worker.get("worker", number)): every for number, worker in enumerate(workers)}
    for source, _, num_bytes in record.get("pairs") or ():
        sent[source] = sent.get(source, every) + num_bytes
    return sent
