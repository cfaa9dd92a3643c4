"""Snapshots of the help texts and error messages of the command line, in tests/cli/snapshots.

    RESIST_UPDATE_SNAPSHOTS=1 python -m pytest tests/cli/test_help.py      # after an intended change

A snapshot contains the names and descriptions of the options, without tyro's layout. That the help which tyro prints
contains all of them is tested here too.
"""

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import resist
from resist.cli import COMMANDS, main
from resist.cli.options import as_typed, options_of
from resist.runs.config import TrainConfig
from resist.runs.config_file import EARLIER

SNAPSHOTS = Path(__file__).parent / "snapshots"


def check(name: str, text: str) -> None:
    file = SNAPSHOTS / name
    if os.environ.get("RESIST_UPDATE_SNAPSHOTS"):
        file.write_text(text, encoding="utf-8")
    assert file.exists(), f"{file} is missing; RESIST_UPDATE_SNAPSHOTS=1 writes it"
    assert text == file.read_text(encoding="utf-8"), "RESIST_UPDATE_SNAPSHOTS=1 writes the new text"


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, monkeypatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    record, _ = COMMANDS[command]
    options = {", ".join(option.flags) or option.flag: option.text for option in options_of(record).values()}
    assert all(options.values()), [option for option, text in options.items() if not text]
    about = " ".join((record.__doc__ or "").split())
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    shown = plain(out)
    assert plain(about) in shown
    for option, text in options.items():
        assert plain(text) in shown, option
        assert all(flag in out for flag in option.split(", ") if flag.startswith("--"))
    assert "None" not in out
    check(f"help-{command}.txt", "\n".join([about, "", *(f"{name}: {text}" for name, text in options.items()), ""]))


def test_train_has_at_most_forty_five_options(capsys) -> None:
    """Later ones become keys of --config: `resist.runs.config.config_key`.

    Forty, and --optimizer, --model-ema-decay, --wire, --fragments and --elastic, which people look for in the help.
    None of the forty became a key for them, because that would break commands that people have.
    """
    assert len(options_of(TrainConfig)) <= 45
    _, out, _ = run(capsys, "train", "--help")
    shown = set(re.findall(r"^[│ ] {1,2}(--[a-z][a-z-]*)", out, re.M))
    assert shown == {option.flag for option in options_of(TrainConfig).values()}
    for group in ("data", "model", "method", "optimization", "machine", "run"):
        assert f" {group} options " in out


@pytest.mark.parametrize("command", COMMANDS)
def test_no_paragraph_of_the_help_breaks_in_mid_sentence(capsys, monkeypatch, command: str) -> None:
    """Within a description a line ends only where the next word does not fit."""
    monkeypatch.setenv("COLUMNS", "100")
    _, out, _ = run(capsys, command, "--help")
    descriptions = " | ".join(option.text for option in options_of(COMMANDS[command][0]).values())
    breaks = 0
    for line, below in pairwise(out.splitlines()):
        words, following = line.strip("│ ").split()[-3:], below.strip("│ ").split()[:1]
        if following and len(words) == 3 and " ".join(words + following) in descriptions:
            breaks += 1
            assert len(line) - len(line.rstrip("│ ")) < len(following[0]) + 4, line
    assert breaks > 0 or command in ("evaluate", "watch")


def plain(text: str) -> str:
    """Without frames, layout and line breaks."""
    return re.sub(r"[\s─-╿]+", "", text)


def test_help_of_all(capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command, (record, _) in COMMANDS.items():
        assert command in out
        assert plain(record.__doc__ or "-") in plain(out)


def test_no_option_means_two_things() -> None:
    """An option has the same type in all commands, except where a command takes several values or has no default."""
    several = {"--workers", "--seeds", "--strategies", "--out", "--data-dir", "--scale"}
    types: dict[str, Any] = {}
    for record, _ in COMMANDS.values():
        for option in options_of(record).values():
            if option.flag not in several:
                assert types.setdefault(option.flag, option.hint) == option.hint, option.flag


MISTAKES = """

nope
trian
train --bogus 2
train --bogus=2
train --local-step 5
train --workers x
train --lr
train --lr fast
train --outer 1
train --config none
train --batch-siz 3 --config none
train --sections 1 1
train --task detection
train --log tensorbord
train --model-args depths=1,x
train --model-args deep=3
train --model-args width=8 width=4
train --capacities a b
train --strategy magic
train --workers 1 2
train --capacities 3 3 3
train --workers 0
train --min-depth 30
train --capacities 1 1 1 1
train --processes 9
train --lr -1
train --epochs 0
train --batch-size 10 --grad-accum-steps 3
train --nesterov
train --model resnet9
train --data mnist
train --model-args depths=1,1
train --model-args depths=1,1,1,1
train --chain layer9:1-2
train --chain layer3:x
train --chain all layer3
train --capacities-by-round 3=4
train --until soon
train --until accuracy=95
train --strategy local_sgd --min-depth 2
train --device tpu
train --resume none
plan --rounds 0
plan --rounds 99999999999
plan --num-classes 99999999999999999999
train --compile --no-compile
cost --latency-ms 1
cost --images-s 5
compare --strategy resist
compare --strategies magic
compare --strategies
compare --seeds
compare --strategies ddp local_sgd --min-depth 3
cost --workers
cost --strategies
cost --workers 100000000000000000000
train --config=
train --until
train --log
train --chain
train --capacities
train --seed 100000000000000000000
train --epochs 1e308
train --timeout-s 1e300
train --out /
--tyro-print-completion foo
evaluate
evaluate none
evaluate none more
watch
watch none
report
report none
report none -o x.doc
report none -o
report none --format foo
""".splitlines()[1:]


@pytest.mark.slow
def test_mistakes_end_in_one_line(capsys, monkeypatch, tmp_path: Path) -> None:
    """For every width of the terminal: status 2, nothing on stdout, and one line on stderr, as in the snapshot."""
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    for number, mistake in enumerate(MISTAKES):
        monkeypatch.setenv("COLUMNS", ("40", "100", "300")[number % 3])
        status, out, err = run(capsys, *mistake.split())
        assert (status, out, err.count("\n")) == (2, "", 1), mistake
        assert err.startswith("resist: ")
        lines += [f"$ resist {mistake}".rstrip(), err.removesuffix("\n")]
    assert list(tmp_path.iterdir()) == []
    check("errors.txt", "\n".join([*lines, ""]))


def test_options_are_written_as_the_user_types_them() -> None:
    text = "`timeout_s=0` must be above 0; give `processes`, `scale='big'` or `sampling`; `forward_stem`, `resist=1`"
    typed = "--timeout-s 0 must be above 0; give --processes, method.scale='big' or method.sampling; `forward_stem`, "
    assert as_typed(text) == typed + "resist=1"
    assert as_typed("`scale=keep`", COMMANDS["export"][0]) == "--scale keep"
    assert as_typed("`run` is in `runs`", COMMANDS["evaluate"][0]) == "`run` is in `runs`"


SOURCE = Path(resist.__file__).parent
# The page of a report shows the command that repeats the run.
ROOMS = [file for file in SOURCE.rglob("*.py") if file.parent.name != "cli" and file.name != "provenance.py"]
FLAGS = {flag for record, _ in COMMANDS.values() for option in options_of(record).values() for flag in option.flags}


def test_only_this_room_writes_options_with_dashes() -> None:
    """The others name the argument, `timeout_s=0`, as their users in Python write it; docstrings too."""
    flags = FLAGS | {"--" + name.replace("_", "-") for name in EARLIER} | {"--resume", "--outer", "--scale"}
    found = {file: set(re.findall(r"--[a-z][a-z-]+", file.read_text(encoding="utf-8"))) & flags for file in ROOMS}
    assert len(found) > 100
    assert {str(file.relative_to(SOURCE)): names for file, names in found.items() if names} == {}
