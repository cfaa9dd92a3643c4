"""The display: its numbers, its size on any terminal, and that it follows runs of other processes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from report_runs import make_run
from resist.cli import main, watch
from resist.errors import UserError
from resist.runs.follower import Follower, gone
from resist.runs.history import read_history
from resist.training.progress import Display, Summary, clock, picture, sent_by


def records(path: Path, **options: int) -> list[dict]:
    return read_history(make_run(path, **options)).rounds  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def eight(tmp_path_factory) -> list[dict]:
    return records(tmp_path_factory.mktemp("runs") / "eight", rounds=12, workers=8, capacity=4)


def drawn(summary: Summary, width: int, height: int, remark: str = "") -> list[str]:
    console = Console(file=StringIO(), width=width, height=height, force_terminal=True, color_system=None)
    console.print(picture("a run of some name", summary, (width, height), remark=remark))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_the_display_shows_numbers_and_holders(eight: list[dict]) -> None:
    summary = Summary(40)
    for record in eight:
        summary.add(record)
    text = "\n".join(drawn(summary, 160, 40)).replace("\u00a0", " ")
    last = eight[-1]
    for expected in (
        "round 12/40", "epoch 1.50", f"loss {last['loss']:.4f}", f"accuracy {100 * last['accuracy']:.2f} %",
        "images/s", "left", "worker", "blocks", "compute s", "exchange s", "sent",
        f"{last['workers'][7]['compute_s']:.2f}",
    ):  # fmt: skip
        assert expected in text
    rows = [line for line in text.splitlines() if re.match(r" *\d+ +[■─]", line)]
    assert len(rows) == 8
    (plan,) = last["plan"].values()
    for row, held in zip(rows, plan, strict=True):
        strip = row.split()[1]
        assert [block for block, mark in enumerate(strip) if mark == "■"] == list(held)


@given(st.integers(1, 200), st.integers(1, 60), st.integers(0, 12), st.booleans())
def test_no_line_is_wider_than_the_terminal_and_none_is_lost(
    eight: list[dict], width: int, height: int, rounds: int, late: bool
) -> None:
    summary = Summary(40 if rounds % 2 else None)
    for record in eight[:rounds]:
        summary.add(record)
    lines = drawn(summary, width, height, "no record for 40 s" if late else "")
    if width >= 20 and height >= 12:
        assert all(len(line) <= width for line in lines)
        assert len(lines) <= height
        assert any("■" in line or "of 22" in line for line in lines) or rounds == 0 or width < 40


def test_time_left_counts_down_and_counts_evaluations(eight: list[dict]) -> None:
    summary = Summary(20)
    assert summary.left_s() is None
    for record in eight:
        summary.add(record)
    mean = sum(sum(record["seconds"].values()) for record in eight) / 12
    assert summary.left_s() == pytest.approx(8 * mean)
    assert summary.left_s(3.0) == pytest.approx(8 * mean - 3)
    assert summary.left_s(1e6) == 0
    assert clock(3723.4) == "1:02:03"


def test_bytes_of_the_workers_add_up(eight: list[dict]) -> None:
    for record in eight:
        assert sum(sent_by(record).values()) == pytest.approx(record["bytes"]["shared"] + record["bytes"]["blocks"])


def test_without_a_terminal_there_are_lines_now_and_then(eight: list[dict], monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("resist.training.progress.time.monotonic", lambda: now[0])
    file = StringIO()
    remark = [""]
    with Display("t", Summary(12), console=Console(file=file, width=20), remark=lambda: remark[0]) as display:
        for record in eight:
            now[0] += 1.0
            display.add(record | {"accuracy": 0.5 if record["round"] == 5 else None})
        lines = file.getvalue().splitlines()
        assert [line.split("  ")[0] for line in lines] == ["round 1/12", "round 5/12"]
        assert "accuracy 50.00 %" in lines[1]
        now[0] += 5.0
        display.tick()
        now[0] += 20.0
        display.tick()
        display.tick()
        assert file.getvalue().splitlines()[2:] == ["no record for 25 s"]


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("variables", "file", "live"),
    [
        ({}, Terminal, True),
        ({}, StringIO, False),
        ({"FORCE_COLOR": "1"}, StringIO, False),
        ({"TTY_COMPATIBLE": "1"}, StringIO, False),
        ({"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "1"}, StringIO, False),
        ({"FORCE_COLOR": "1"}, Terminal, True),
        ({"NO_COLOR": "1"}, Terminal, True),
        ({"TERM": "dumb"}, Terminal, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, Terminal, False),
        ({"TTY_COMPATIBLE": "0"}, Terminal, False),
        ({"TTY_INTERACTIVE": "0"}, Terminal, False),
    ],
)
def test_only_a_terminal_can_be_live(eight, monkeypatch, variables: dict, file: type[StringIO], live: bool) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **variables}.items():
        monkeypatch.setenv(name, value)
    console = Console(file=file())
    with Display("t", Summary(12), console=console) as display:
        display.add(eight[0])
    assert display.live == live
    assert ("\x1b[?25l" in console.file.getvalue()) == live  # type: ignore[attr-defined]


def resist(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def write_state(run: Path, state: str, **more: object) -> None:
    content = {"state": state, "rounds": 60, "error": "", "host": socket.gethostname(), "process": os.getpid(), **more}
    (run / "state.json").write_text(json.dumps(content))


def test_watch_does_not_call_a_run_finished_whose_records_are_lost(capsys, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=6)
    write_state(run, "finished")
    for content, text in (
        ("", "holds no complete round"),
        ("{]\n{}\n", "line 1 of"),
        (None, "cannot be read: No such"),
    ):
        (run / "metrics.jsonl").unlink()
        if content is not None:
            (run / "metrics.jsonl").write_text(content)
        status, out, err = resist(capsys, "watch", run)
        assert (status, err.count("\n")) == (2, 1), out
        assert text in err


def test_watch_ends_with_the_run(capsys, tmp_path: Path, monkeypatch) -> None:
    run = make_run(tmp_path / "run", rounds=6)
    status, out, _ = resist(capsys, "watch", run)
    assert status == 0
    assert out.startswith("round 6  loss ")
    assert out.endswith(f"finished after round 6; report: resist report {run}\n")
    (run / "model.safetensors").unlink()
    for state, status, text in (
        ("interrupted", 0, f"to continue: resist train --resume {run}"),
        ("failed", 1, "the run failed after round 6: {no} disk"),
    ):
        write_state(run, state, error="{no}\ndisk")
        code, out, err = resist(capsys, "watch", run)
        assert code == status
        assert text in out + err
    write_state(run, "running")
    status, _, err = resist(capsys, "watch", run, "--patience-s", "0.01")
    assert (status, err.count("\n")) == (1, 1)
    assert "no new record in" in err
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    write_state(run, "running", process=ended.pid)
    os.utime(run / "metrics.jsonl", (time.time() - 100, time.time() - 100))
    status, _, err = resist(capsys, "watch", run)
    assert (status, err.count("\n")) == (1, 1)
    assert f"without a final state (process {ended.pid} no longer exists)" in err
    with monkeypatch.context() as patched:
        patched.setattr(watch, "watch", interrupt)
        assert resist(capsys, "watch", run) == (130, "", "")
    for arguments, text in (
        ([tmp_path / "none"], "is not a run directory"),
        ([run, "--patience-s", "-1"], "must be more than 0"),
    ):
        status, _, err = resist(capsys, "watch", *arguments)
        assert (status, err.count("\n")) == (2, 1)
        assert text in err


def interrupt(_config: object) -> int:
    raise KeyboardInterrupt


def test_a_process_elsewhere_is_not_taken_for_gone() -> None:
    running = {"state": "running", "host": socket.gethostname(), "process": os.getpid()}
    assert not gone(running)
    assert not gone(running | {"host": "another", "process": 2**22 + 1})
    assert not gone(running | {"state": "finished", "process": 2**22 + 1})
    assert gone(running | {"process": 2**22 + 1})
    assert not gone({})


def test_a_follower_reads_each_line_once_and_whole(tmp_path: Path) -> None:
    lines = (make_run(tmp_path / "run", rounds=5) / "metrics.jsonl").read_text().splitlines(keepends=True)
    file, follower = tmp_path / "metrics.jsonl", Follower(tmp_path)
    assert follower.read() == []
    with file.open("w") as metrics:
        for number, text in enumerate([lines[0], lines[1] + lines[2][:50], lines[2][50:], lines[3]]):
            metrics.write(text)
            metrics.flush()
            expected = [[1], [2], [3], [4]][number]
            assert [record["round"] for record in follower.read()] == expected
            assert not follower.restarted
        metrics.write("damaged\n" + lines[4].replace('"round": 5', '"round": 6'))
        metrics.flush()
        with pytest.raises(UserError, match="no record of round 5; restore the file"):
            follower.read()
    (tmp_path / "partial").write_text(lines[0] + lines[1])
    (tmp_path / "partial").replace(file)  # as a run does that goes on from an earlier round
    assert [record["round"] for record in follower.read()] == [1, 2]
    assert follower.restarted
    assert follower.read() == []
    assert not follower.restarted


SMALL = ["--workers", "4", "--min-depth", "0", "--model-args", "depths=1,1,5,1", "width=4", "--batch-size", "32",
         "--local-steps", "3", "--epochs", "9", "--num-evals", "2", "--device", "cpu",
         "--processes", "1"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs pseudo terminals")
def test_a_terminal_shows_a_run_and_ctrl_c_ends_it_in_order(capsys, tmp_path: Path) -> None:
    """On a pseudo terminal: nothing drawn is wider than it; Ctrl-C saves, and the cursor is shown."""
    import fcntl
    import pty
    import struct
    import termios

    columns = 60
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    out = tmp_path / "run"
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    running = subprocess.Popen(
        [sys.executable, "-m", "resist", "train", *SMALL, "--out", str(out)],
        stdin=theirs, stdout=theirs, stderr=theirs,
        env={**environment, "TERM": "xterm", "OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    seen, signaled, deadline = b"", False, time.monotonic() + 200
    while time.monotonic() < deadline:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        seen += part
        if not signaled and seen.count(b"loss") > 3:
            signaled = True
            running.send_signal(signal.SIGINT)
    assert running.wait() == 75
    os.close(ours)
    text = seen.decode().replace("\u00a0", " ")
    assert "digits, preact_small, resist, 4 workers" in text
    assert "to continue: resist train --resume" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l")  # the cursor is visible again
    display = text[text.index("\x1b[?25l") : text.rindex("\x1b[?25h")]
    for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", display).replace("\r", "\n").splitlines():
        assert len(line) <= columns or re.match("ending[ :]", line)  # a line of its own, which is printed once
    assert json.loads((out / "state.json").read_text())["state"] == "interrupted"
    status, out_text, _ = resist(capsys, "watch", out)
    assert status == 0
    assert "interrupted after round" in out_text
