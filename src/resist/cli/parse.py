"""Parse the command line into records with tyro, and reduce its boxed error messages to one line."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from resist.cli.options import LISTS, Option, config_keys, options_of, plain, record_of, view
from resist.errors import UserError, nearest
from resist.runs.config import TrainConfig
from resist.runs.config_file import EARLIER, read_config_file

DESCRIPTION = """Train a deep residual network with a different, shallower sub-network on each worker (ResIST).

resist COMMAND --help lists the options of a command, resist --version prints the version."""
HELP = ("-h", "--help")
FORMS = {"INT": "a whole number", "FLOAT": "a number", "INT ...": "whole numbers", "FLOAT ...": "numbers"}
SHELLS = ("bash", "zsh", "tcsh", "fish")


def parse(commands: Mapping[str, type], arguments: Sequence[str]) -> tuple[Any, frozenset[str]]:
    """Parse a command line into the record of its command.

    Help is printed, and ends the process with status 0.

    Args:
        commands: The record class of each command.
        arguments: The command line without the program's name.

    Returns:
        The record, and the names of the fields that the command line or its configuration file gives.

    Raises:
        UserError: For an unknown command or option, an invalid value, or a configuration file that cannot be used. The
            message is one line.
    """
    command, rest = next(iter(arguments), ""), arguments[1:]
    if command not in commands:
        _check_command(commands, arguments)
        views = {name: plain(record)[1] for name, record in commands.items()}
        return _run(tyro.extras.subcommand_cli_from_dict, views, "resist", arguments), frozenset()
    record, config, in_file = commands[command], TrainConfig(), frozenset[str]()
    options, shown = plain(record)
    _check_options(command, record, options, rest)
    typed = set(map(_option, rest))
    given = {name for name, option in options.items() if typed.intersection(option.flags)}
    for option in (options[name] for name in given):
        _check_values(command, option, typed, rest)
    if "config" in given:
        config, in_file = read_config_file(Path(_values("--config", rest)[0]))
        config, in_file = replace(config, run=replace(config.run, out=None, resume=None)), in_file - {"out", "resume"}
        options = options_of(record, config, in_file)
        shown = view(record, options)
    off = {option.flags[1]: option.flag for option in options.values() if option.name in LISTS}
    rest = [off.get(_option(word), word) for word in rest]  # for tyro, a list without values
    parsed = _run(tyro.cli, shown, f"resist {command}", rest)
    return record_of(record, parsed, config), in_file | given - {"config"}


def _check_values(command: str, option: Option, typed: set[str], arguments: Sequence[str]) -> None:
    """Raise UserError where an option lacks its value, has one that it does not take, or is both on and off."""
    if len(option.flags) > 1 and typed.issuperset(option.flags):
        raise UserError(f"{' and '.join(option.flags)} contradict each other; give one")
    for flag in typed.intersection(option.flags):
        alone = option.hint is bool or flag != option.flag
        if alone and (any(_values(flag, arguments)) or any(word.startswith(f"{flag}=") for word in arguments)):
            raise UserError(f"{flag} takes no value; give {' or '.join(option.flags)}")
        if not alone and not any(_values(flag, arguments)):
            raise UserError(f"{flag} needs a value; see resist {command} --help")


def _run(parser: Callable[..., Any], records: Any, program: str, arguments: Sequence[str]) -> Any:
    """Call tyro. Raises UserError, in one line, where it would print an error and end the process."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return parser(
                records,
                prog=program,
                description=DESCRIPTION if program == "resist" else None,
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as exit:
        if exit.code in (0, None):
            raise
        raise UserError(f"{one_line(message.getvalue(), arguments)}; see {program} --help") from None


def _check_command(commands: Mapping[str, type], arguments: Sequence[str]) -> None:
    """Raise UserError, with a hint, for a first word that is neither a command nor an option."""
    command, shell = (*arguments, "", "")[:2]
    if command.startswith("--tyro-") and command.endswith("-completion") and shell not in SHELLS:
        raise UserError(f"{command} {shell!r} is not one of {', '.join(SHELLS)}")
    if command not in HELP and not command.startswith("--tyro-"):  # tyro's own: completions for shells
        near = nearest(command, (*commands, "--version", *HELP))
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(commands)}"
        raise UserError(f"{command!r} is not a command; {hint}" if command else f"no command given; {hint}")


def _check_options(command: str, record: type, options: Mapping[str, Option], arguments: Sequence[str]) -> None:
    """Raise UserError, with what to give instead, for a word that looks like an option and is not one."""
    known = [flag for option in options.values() for flag in option.flags]
    keys = {"--" + key.partition(".")[2].replace("_", "-"): key.split(".") for key in config_keys(record)}
    elsewhere = {"--" + name: text for name, text in getattr(record, "NOT_OPTIONS", {}).items()}
    for word in arguments:
        option = _option(word)
        if not word.startswith("--") or word == "--help" or option in known:
            continue
        see = f"see resist {command} --help"
        if option in elsewhere:
            raise UserError(f"{option} {elsewhere[option]}")
        if option in keys:
            part, name = keys[option]
            raise UserError(
                f'{option} is not an option but a key of the file for --config: {{"{part}": {{"{name}": ...}}}}'
            )
        new, value = EARLIER.get(option[2:].replace("-", "_"), ("", ""))
        if new in options:
            raise UserError(f"{option} is now {f'{options[new].flag} {value}'.rstrip()}; {see}")
        near = nearest(option[2:], (flag[2:] for flag in known))
        hint = f"; did you mean --{near}?" if near else ""
        raise UserError(f"{option} is not an option of resist {command}{hint}; {see}")


def _option(word: str) -> str:
    return word.partition("=")[0].replace("_", "-")


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
        form = re.sub(r"[{}]", "", form).strip()
        given = " ".join(_values(option, arguments))
        given = given if len(given) <= 80 else f"{given[:60]}..."
        return f"{option} {given!r} is not {FORMS.get(form, form)}" if form else first
    if choice := re.match(
        r"invalid choice (.*?) for argument '(?:-\w/)?(--[\w-]+)'. Expected one of \((.*?),?\)", first
    ):
        names = choice.group(3).replace("'", "").split(", ")
        if "None" in names:  # an optional value, in tyro's order
            names = sorted(set(names) - {"None"})
        value = choice.group(1)
        value = value if len(value) <= 80 else f"{value[:60]}..."
        return f"{choice.group(2)} {value} is not one of {', '.join(names)}"
    if bare := re.match(r"Missing value for argument '(?:-\w/)?(--[\w-]+)'", first):
        return f"{bare.group(1)} needs a value"
    if missing := re.match(r"Missing from .*?: (\S+) (.*?)(\. \(required\)|$)", first):
        name, text = missing.group(1), missing.group(2)
        choice = re.match(r"\{([\w,]+)\}", text)
        return (
            f"{name} is missing; give one of {choice[1].replace(',', ', ')}" if choice else f"{name} is missing: {text}"
        )
    first = first if len(first) <= 200 else f"{first[:120]}..."
    return re.sub(r"^Unrecognized options: ", "not understood: ", first).rstrip(".") or "the command line is invalid"


def written(arguments: Sequence[str]) -> dict[str, str]:
    """Return what a command line gives to each option, separated by spaces, by the name of its field."""
    names = {_option(word) for word in arguments if word.startswith("--")}
    return {name[2:].replace("-", "_"): " ".join(_values(name, arguments)) for name in names}


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
