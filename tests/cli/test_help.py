"""Snapshots of the help texts and error messages of the command line, in tests/cli/snapshots.

    RESIST_UPDATE_SNAPSHOTS=1 python -m pytest tests/cli/test_help.py      # after an intended change

A snapshot contains the names and descriptions of the options, without tyro's layout. That the help which tyro prints
contains all of them is tested here too.
"""

import ast
import inspect
import os
import re
import textwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import tyro

from resist.cli import COMMANDS, main
from resist.cli.parse import options_of

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


def described(record: type) -> dict[str, str]:
    """Description of each option of a record and of the records in it: the string below the field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(record))).body[0].body  # type: ignore[attr-defined]
    hints, texts = get_type_hints(record, include_extras=True), dict[str, str]()
    for field, below in zip(body, [*body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        name, hint = field.target.id, hints[field.target.id]
        if hasattr(hint, "__dataclass_fields__"):
            texts |= described(hint)
            continue
        positional = tyro.conf.Positional in getattr(hint, "__metadata__", ())
        text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
        texts[name.upper() if positional else "--" + name.replace("_", "-")] = " ".join(str(text).split())
    return texts


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, monkeypatch, command: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    record, _ = COMMANDS[command]
    options = described(record)
    assert sorted(option for option in options if option.startswith("--")) == sorted(options_of(record))
    assert all(options.values()), [option for option, text in options.items() if not text]
    about = " ".join((record.__doc__ or "").split())
    status, out, err = run(capsys, command, "--help")
    assert (status, err) == (0, "")
    shown = plain(out)
    assert plain(about) in shown
    for option, text in options.items():
        assert plain(text) in shown, option
        assert not option.startswith("--") or option in out
    check(f"help-{command}.txt", "\n".join([about, "", *(f"{name}: {text}" for name, text in options.items()), ""]))


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
    """An option has the same type in all commands, except where a command takes several values."""
    several = {"--workers", "--seeds", "--strategies", "--out", "--no-progress"}
    types: dict[str, Any] = {}
    for record, _ in COMMANDS.values():
        for name, hint in get_type_hints(record).items():
            if not hasattr(hint, "__dataclass_fields__") and f"--{name.replace('_', '-')}" not in several:
                assert types.setdefault(name, get_args(hint) or hint) == (get_args(hint) or hint), name


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
train --capacities a b
train --strategy magic
train --workers 1 2
train --workers 9
train --workers 0
train --min-depth 30
train --capacities 1 1 1 1
train --processes 9
train --lr -1
train --epochs 0
train --batch-size 10 --grad-accum-steps 3
train --nesterov --momentum 0
train --model resnet9
train --data mnist
train --sections 1 1
train --sections 1 1 1 1
train --chain layer9:1-2
train --chain layer3:x
train --scale big
train --until soon
train --until accuracy=95
train --strategy ddp --outer 0.7 0.9
train --strategy local_sgd --min-depth 2
train --device tpu
train --resume none
plan --rounds 0
cost --latency-ms 1
cost --images-s 5
compare --strategy resist
compare --strategies magic
evaluate
evaluate none
evaluate none more
watch
watch none
report
report none
report none -o x.doc
""".splitlines()[1:]


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
