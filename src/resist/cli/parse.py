"""Parse the command line into records with tyro, and reduce its boxed error messages to one line."""

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

import tyro

from resist.errors import UserError

DESCRIPTION = """Train a deep residual network with a different, shallower sub-network on each worker (ResIST).
resist COMMAND --help lists the options of a command, resist --version prints the version."""
HELP = ("-h", "--help")
RENAMED = {  # options of earlier versions, and their new names
    "--accumulate": "--grad-accum-steps",
    "--evaluations": "--num-evals",
    "--loaders": "--data-workers",
    "--nonfinite": "--on-nonfinite",
    "--safety": "--replicate",
    "--schedule": "--lr-schedule",
}
FORMS = {
    "INT": "a whole number", "FLOAT": "a number", "FLOAT FLOAT": "two numbers",
    "[INT [INT ...]]": "whole numbers", "[FLOAT [FLOAT ...]]": "numbers",
}  # fmt: skip


def parse(commands: Mapping[str, type], arguments: Sequence[str]) -> Any:
    """Parse a command line into the record of its command.

    Help is printed, and ends the process with status 0.

    Args:
        commands: The record class of each command.
        arguments: The command line without the program's name.

    Raises:
        UserError: For an unknown command or option, and for an invalid value. The message is one line.
    """
    command = next(iter(arguments), "")
    if command in commands:
        _check_options(command, commands[command], arguments)
    elif command not in HELP and not command.startswith("--tyro-"):  # tyro's own: completions for shells
        near = get_close_matches(command, commands, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(commands)}"
        raise UserError(f"{command!r} is not a command; {hint}" if command else f"no command given; {hint}")
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.extras.subcommand_cli_from_dict(
                dict(commands),
                prog="resist",
                description=DESCRIPTION,
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        where = f"resist {command}" if command in commands else "resist"
        raise UserError(f"{one_line(message.getvalue(), arguments)}; see {where} --help") from None


def options_of(record: type) -> list[str]:
    """List the options of a record class and of the records in it, as in --local-steps."""
    options: list[str] = []
    for name, hint in get_type_hints(record, include_extras=True).items():
        bare = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        if is_dataclass(bare):
            options += options_of(bare)  # type: ignore[arg-type]  # a class, since it is a type hint
        elif tyro.conf.Positional not in getattr(hint, "__metadata__", ()) and name in {f.name for f in fields(record)}:
            options.append("--" + name.replace("_", "-"))
    return options


def _check_options(command: str, record: type, arguments: Sequence[str]) -> None:
    known = options_of(record)
    for word in arguments:
        option = word.partition("=")[0].replace("_", "-")
        if not word.startswith("--") or word == "--help" or option in known:
            continue
        if RENAMED.get(option) in known:
            raise UserError(f"{option} is now {RENAMED[option]}; see resist {command} --help")
        near = get_close_matches(option, known, 1, cutoff=0.75)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{option} is not an option of resist {command}{hint}; see resist {command} --help")


def one_line(text: str, arguments: Sequence[str]) -> str:
    """Reduce one of tyro's boxes to a line, without title, frame, advice and line breaks."""
    body: list[list[str]] = [[]]  # the sections between horizontal rules; without Unicode there is no frame
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        content = line.strip("│ \t")
        if content and set(content) <= {"─", "-"}:
            body.append([])
        elif content and not line.startswith(("╭", "╰")):
            body[-1].append(content)
    if len(body) > 1 and re.fullmatch(r"[A-Z][a-z]+( [a-z]+)+", " ".join(body[0])):
        del body[0]
    first, below = " ".join(" ".join(body[0]).split()), [line for part in body[1:] for line in part]
    if wrong := re.match(r"Error parsing (--[\w-]+)", first):
        option = wrong.group(1)
        form = next((line[len(option) :] for line in below if line.startswith(option + " ")), "")
        form = re.sub(r"\{None\}\||[{}]", "", form).strip()
        return f"{option} {' '.join(_values(option, arguments))!r} is not {FORMS.get(form, form)}" if form else first
    if choice := re.match(r"invalid choice (.*?) for argument '(--[\w-]+)'. Expected one of \((.*?),?\)", first):
        names = choice.group(3).replace("'", "")
        return f"{choice.group(2)} {choice.group(1)} is not one of {names}"
    if bare := re.match(r"Missing value for argument '(--[\w-]+)'", first):
        return f"{bare.group(1)} needs a value"
    if missing := re.match(r"Missing from .*?: (\S+) (.*?)(\. \(required\)|$)", first):
        return f"{missing.group(1)} is missing: {missing.group(2)}"
    return re.sub(r"^Unrecognized options: ", "not understood: ", first).rstrip(".") or "the command line is invalid"


def _values(option: str, arguments: Sequence[str]) -> list[str]:
    """List the values that the command line gives to an option."""
    values: list[str] = []
    for number, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") != option:
            continue
        values = [value] if equals else []
        for following in arguments[number + 1 :]:
            if following.startswith("--"):
                break
            values.append(following)
    return values
