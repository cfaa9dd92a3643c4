"""Options of a command: derived from its record, and the record that tyro parses in its place.

A record has options of its own, and parts of a `TrainConfig` with more of them. The help of an option is the string
below its field. Fields that only a configuration file can set (`resist.runs.config.config_key`) are not options.
"""

import ast
import contextlib
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro

from resist.errors import quoted
from resist.runs.config import TrainConfig, is_option

# In the help, the options of the network are two groups: those of the data, and the others.
DATA = "The data set."
DATA_FIELDS = {"data", "data_dir", "image_size", "data_workers", "skip_bad_files"}
MODEL = "The network, its initial weights, and the blocks to partition."
# Options of several values, whose default is the value of the file for one run.
SINGULAR = {"workers": "workers", "seeds": "seed"}
# Options of several values that are turned off as those without a value are.
LISTS = {"log"}
# The module that the classes for tyro say they are from: tyro looks for texts in its source, and it is empty.
EMPTY = "resist.runs"
# The longest value that a message repeats as it was written.
LONGEST = 40
CONFIG = "JSON file in the form of a run's config.json, whole or in part. Options of the command line override it."


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: The field of the record.
        hint: Its type.
        settings: tyro's settings of the field.
        default: Its default; MISSING for a required option.
        text: Its description, without line breaks.
        group: The group of the help, or "" for the first one.
    """

    name: str
    hint: Any
    settings: tuple[Any, ...]
    default: Any
    text: str
    group: str = ""

    @property
    def positional(self) -> bool:
        return tyro.conf.Positional in self.settings

    @property
    def flag(self) -> str:
        """The option as on the command line, `--local-steps`; the name in capitals for a positional argument."""
        return self.name.upper() if self.positional else _flag(self.name)

    @property
    def flags(self) -> list[str]:
        """The option, and the form that turns it off where there is one; none if positional."""
        if self.positional:
            return []
        return [self.flag, "--no-" + self.flag[2:]] if self.switch or self.name in LISTS else [self.flag]

    @property
    def switch(self) -> bool:
        """True for an option without a value that can be turned on and off."""
        return self.hint is bool and not self.name.startswith("no_")


def options_of(
    record: type, config: TrainConfig | None = None, in_file: frozenset[str] = frozenset()
) -> dict[str, Option]:
    """List the options of a record class, with those of the parts in it.

    Args:
        record: A record class of a command.
        config: A configuration whose values are the defaults of the parts. Default: that without a file.
        in_file: Fields whose value in `config` is also the default of the record's own field of the same name and type.

    Returns:
        The options by field.
    """
    config = config or TrainConfig()
    hidden, texts = getattr(record, "NOT_OPTIONS", {}), _descriptions(record)
    hints = get_type_hints(record, include_extras=True)
    known = _flat(config)
    options: dict[str, Option] = {}
    for f in fields(record):
        hint, settings = _bare(hints[f.name])
        if not is_option(f):
            continue
        if not _is_part(hint):
            default = f.default
            if f.name in in_file and f.name in known and known[f.name][0] == hint:
                default = known[f.name][1]
            elif SINGULAR.get(f.name) in in_file:
                default = (known[SINGULAR[f.name]][1],)
            options[f.name] = Option(f.name, hint, settings, default, as_typed(texts[f.name]))
            continue
        inner_texts, inner_hints = _descriptions(hint), get_type_hints(hint)
        for inner in fields(hint):
            if is_option(inner) and inner.name not in hidden:
                value = getattr(getattr(config, f.name), inner.name)
                group = f.name if f.name != "network" else "data" if inner.name in DATA_FIELDS else "model"
                text = as_typed(inner_texts[inner.name]) + f" {_flag(f'no_{inner.name}')}: none." * (
                    inner.name in LISTS
                )
                options[inner.name] = Option(inner.name, inner_hints[inner.name], (), value, text, group)
    if keys := config_keys(record):
        skipped = [name for name in ("out", "resume") if name in options]
        skipped += ["strategy"] if "strategies" in options else []
        without = f" Not taken from it: {', '.join(skipped)}." if skipped else ""
        text = f"{CONFIG}{without} Keys that are not options: {', '.join(keys)}."
        options["config"] = Option("config", Path | None, (), None, text)
    return options


def config_keys(record: type) -> list[str]:
    """List the fields in the parts of a record that only a configuration file can set, as in method.sampling."""
    parts = {name: hint for name, hint in get_type_hints(record).items() if _is_part(hint)}
    keys = [f"{name}.{f.name}" for name, part in parts.items() for f in fields(part) if not is_option(f)]
    own = {f.name for f in fields(record) if not is_option(f)}  # of a part that the record does not have
    return keys + [key for key in (config_keys(TrainConfig) if own else ()) if key.partition(".")[2] in own]


def as_typed(text: str, record: type = TrainConfig, written: Mapping[str, str] | None = None) -> str:
    """Write the options that a message names as the user types them.

    Args:
        text: A message of the other rooms, which name an option as in `timeout_s` or `timeout_s=0`, in backticks.
        record: The record class of the command.
        written: The values of the command line as they were written, by the field's name.

    Returns:
        The text with `--timeout-s` or `--timeout-s 0` in their place; a key that is not an option is written as in
        `method.sampling`. A path is quoted as the shell needs it.
    """
    hints = {**_hints(TrainConfig), **_hints(record)}
    names = {"chains": "--chain"} | _names(TrainConfig) | _names(record)  # `chains` in Python

    def typed(match: re.Match[str]) -> str:
        name, value = names.get(match[1]), match[2]
        if name is None:  # a word of the program's text
            return match[0] if value is None else match[0][1:-1]
        if value is None:
            return name
        value = as_written(value, (written or {}).get(match[1], ""))
        if hints.get(match[1]) in (Path, Path | None):
            value = quoted(value)
        return f"{name} {value}" if name.startswith("--") else f"{name}={value}"

    return re.sub(r"`(\w+)(?:=([^`]*))?`", typed, text)


def as_written(value: str, written: str) -> str:
    """Return a number as the command line has it.

    Args:
        value: The number in a message.
        written: What the command line gives to the option, "" for nothing.

    Returns:
        The word of `written` that is this number, or `value`.
    """
    for word in written.split():
        with contextlib.suppress(ValueError):
            if len(word) <= LONGEST and (value.startswith("about ") or repr(float(word)) == repr(float(value))):
                return word
    return value


def view(record: type, options: Mapping[str, Option]) -> type:
    """Make the record class that tyro parses: the options in groups, with help on one line.

    Args:
        record: The record class of a command.
        options: The result of `options_of`.
    """
    parts = {name: inspect.getdoc(hint) for name, hint in get_type_hints(record).items() if _is_part(hint)}
    about = parts | {"data": DATA, "model": MODEL}
    groups: dict[str, list[Any]] = {}
    for option in options.values():
        groups.setdefault(option.group, []).append((option.name, _annotated(option), _default(option)))
    rows = groups.pop("", [])
    for group, inside in groups.items():
        part = dataclasses.make_dataclass(group, inside, kw_only=True)
        part.__doc__, part.__module__ = about[group], EMPTY
        rows.append((group, part, dataclasses.field(default_factory=part)))
    shown = dataclasses.make_dataclass(record.__name__, rows, kw_only=True)
    shown.__doc__, shown.__module__ = inspect.getdoc(record), EMPTY
    return shown


@functools.cache
def plain(record: type) -> tuple[dict[str, Option], type]:
    """Return the options of a record class without a configuration file, and the class that tyro parses."""
    options = options_of(record)
    return options, view(record, options)


def record_of(record: type, parsed: Any, config: TrainConfig) -> Any:
    """Make a record from an instance of its `view`.

    Args:
        record: The record class of a command.
        parsed: The parsed command line.
        config: The configuration that fields which are not options come from.
    """
    values: dict[str, Any] = {}
    for f in fields(parsed):
        value = getattr(parsed, f.name)
        inside = {inner.name: getattr(value, inner.name) for inner in fields(value)} if is_dataclass(value) else {}
        values |= inside or {f.name: value}
    made, known = dict[str, Any](), _flat(config)
    for name, hint in get_type_hints(record).items():
        if _is_part(hint):
            part = {f.name: values[f.name] for f in fields(hint) if f.name in values}
            made[name] = dataclasses.replace(getattr(config, name), **part)
        elif name in values or name in known:
            made[name] = values[name] if name in values else known[name][1]
    return record(**made)


def _annotated(option: Option) -> Any:
    metavar = None if option.positional or option.hint is bool else _form(option.hint)
    # tyro shows every default, also where the text describes it because the value would say nothing.
    hint = "" if option.default is None or option.default is False or option.default == () else None
    pairs = () if option.switch or option.hint is not bool else (tyro.conf.FlagCreatePairsOff,)
    settings = (*option.settings, *pairs, tyro.conf.arg(help=option.text, metavar=metavar, help_behavior_hint=hint))
    return Annotated[(option.hint, *settings)]  # type: ignore[return-value]


def _default(option: Option) -> Any:
    return dataclasses.field() if option.default is MISSING else dataclasses.field(default=option.default)


def _form(hint: Any) -> str:
    """Return the form of an option's value in the help, as in INT or {step,cosine}."""
    inner = [argument for argument in get_args(hint) if argument is not type(None)]
    if get_origin(hint) is Literal:
        return "{" + ",".join(inner) + "}"
    if get_origin(hint) is tuple:
        return f"{_form(inner[0])} ..." if inner[-1] is Ellipsis else " ".join(map(_form, inner))
    if inner:  # an optional value
        return _form(inner[0])
    return hint.__name__.upper()


@functools.cache
def _names(record: type) -> dict[str, str]:
    """Return how the user types each field of a record: `--local-steps`, or `method.sampling` for a key of a file."""
    names: dict[str, str] = {}
    keys = {f.name for f in fields(record) if not is_option(f)}
    for name, hint in get_type_hints(record, include_extras=True).items():
        bare, settings = _bare(hint)
        if _is_part(bare):
            names |= {f.name: _flag(f.name) if is_option(f) else f"{name}.{f.name}" for f in fields(bare)}
        elif tyro.conf.Positional not in settings and name not in keys:
            names[name] = _flag(name)
    return names


@functools.cache
def _hints(record: type) -> dict[str, Any]:
    """Return the type of each field of a record and of its parts."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(record).items():
        found |= get_type_hints(hint) if _is_part(hint) else {name: hint}
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_part(hint: Any) -> bool:
    return is_dataclass(hint) and isinstance(hint, type)


def _bare(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    return (get_args(hint)[0], hint.__metadata__) if get_origin(hint) is Annotated else (hint, ())


def _flat(config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return type and value of every field of a configuration."""
    parts = [getattr(config, f.name) for f in fields(config)]
    hints = _hints(TrainConfig)
    return {f.name: (hints[f.name], getattr(part, f.name)) for part in parts for f in fields(part)}


@functools.cache
def _descriptions(record: type) -> dict[str, str]:
    """Return the string below each field, without line breaks."""
    body = ast.parse(textwrap.dedent(inspect.getsource(record))).body[0].body  # type: ignore[attr-defined]
    texts: dict[str, str] = {}
    for field, below in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            texts[field.target.id] = " ".join(str(text).split())
    return texts
