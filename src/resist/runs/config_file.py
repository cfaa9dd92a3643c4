"""Reader of configuration files: the config.json of a run, and the file that a user gives, which has the same form."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from resist.errors import UserError, first_line, nearest
from resist.runs.atomic import read_small
from resist.runs.bounds import LARGEST
from resist.runs.config import TrainConfig

# Entries of config.json that an earlier version wrote: the entry in place of each, and a value of it or "". Most were
# options, too.
EARLIER = {
    "accumulate": ("grad_accum_steps", ""),
    "backbone": ("init_from", ""),
    "evaluations": ("num_evals", ""),
    "final_norm": ("model_args", "final_norm=true"),
    "loaders": ("data_workers", ""),
    "pretrained": ("init_from", ""),
    "safety": ("replicate", ""),
    "sections": ("model_args", "depths=3,4,23,3"),
    "tensorboard": ("log", "tensorboard"),
    "wandb": ("log", "wandb"),
    "warmup_epochs": ("warmup_rounds", ""),
    "width": ("model_args", "width=64"),
}


def read_config(path: Path) -> TrainConfig:
    """Read the configuration of a run that resumes, or whose network is used.

    Raises:
        UserError: There is none, it is damaged, its values are invalid, or another version of resist wrote it.
    """
    data = _read_config_of(path)
    for _, name in _unknown_entries(data):
        raise UserError(_other_version(path, name))
    try:
        config = from_json(data)
        config.check()
    except UserError as error:
        raise UserError(f"{path / 'config.json'}: {error}") from error
    return config


def read_config_file(file: Path) -> tuple[TrainConfig, frozenset[str]]:
    """Read a configuration file, in the form of a run's config.json.

    Returns:
        The configuration, with defaults for all that the file leaves out, and the names of the fields in the file.

    Raises:
        UserError: It cannot be read, or has an unknown entry or a value of the wrong type. The message names the file.
    """
    remedy = "give a JSON file like the config.json of a run"
    try:
        data = _read_json(file, f"{file} is not a configuration", remedy)
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; {remedy}") from error
    for part, name in _unknown_entries(data):
        raise UserError(f"{file}: {_unknown_entry(part, name)}")
    try:
        config = from_json(data)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    return config, frozenset(name for values in data.values() for name in values)


def read_options(path: Path, notes: list[str]) -> tuple[TrainConfig, dict[str, dict[str, Any]]]:
    """Read the configuration of a run that is only looked at.

    An unknown entry or value is left out with a note.

    Args:
        path: The run directory.
        notes: A sentence is added to it where entries were left out.

    Returns:
        The configuration, and config.json as it is in the file.

    Raises:
        UserError: There is none, it is damaged, or a whole part of it is unknown to this version.
    """
    data = _read_config_of(path)
    known: dict[str, dict[str, Any]] = {f.name: {} for f in fields(TrainConfig)}
    for part in data:
        if part not in known:
            raise UserError(_other_version(path, part))
        if not isinstance(data[part], Mapping):
            raise UserError(f"{path / 'config.json'} is damaged: {part} is not a table of names and values; restore it")
    given = {part: dict(values) for part, values in data.items()}
    unknown: list[str] = []
    for part, values in given.items():
        for name, value in values.items():
            try:
                from_json({part: {name: value}})
                known[part][name] = value
            except UserError:
                unknown.append(name)
    if unknown:
        notes.append(f"config.json is of another version; entries that are not understood: {', '.join(unknown)}.")
    config = from_json(known)
    if not 1 <= config.method.workers <= LARGEST["workers"]:
        bounds = f"1 to {LARGEST['workers']}"
        raise UserError(f"{path / 'config.json'} is damaged: method.workers is not a number from {bounds}; restore it")
    return config, given


def _read_config_of(path: Path) -> dict[str, Any]:
    """Read the config.json of a run."""
    file = path / "config.json"
    try:
        return _read_json(file, f"{file} is damaged", "restore it, or train again")
    except OSError as error:
        raise UserError(f"{path} is not a run directory: config.json: {error.strerror}") from error


def _read_json(file: Path, problem: str, remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises UserError, with the problem and the remedy, for other content."""
    try:
        data = json.loads(read_small(file), object_pairs_hook=_table)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{problem}: {first_line(error)}; {remedy}") from error
    if not isinstance(data, dict):
        raise UserError(f"{problem}: it is not a table of names and values; {remedy}")
    return data


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a table of the entries of a JSON object. Raises ValueError where a name is there twice."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the entry {next(name for name in names if names.count(name) > 1)!r} twice")
    return table


def _unknown_entry(part: str, name: str) -> str:
    """Describe an entry of a configuration file that this version does not have, and what to give instead."""
    if name in EARLIER:
        new, value = EARLIER[name]
        example = f", as in [{json.dumps(value)}]" if value else ""
        return f"{name!r}, an entry of an earlier version of resist, is now {new}{example}"
    known = TrainConfig().to_json()
    for home, values in known.items():
        if name in values:
            return f"unknown entry {f'{part}.{name}'.lstrip('.')!r}; it belongs to {home!r}"
    near = nearest(name, (name for part, values in known.items() for name in (part, *values)))
    hint = f"did you mean {near}?" if near else "the config.json of a run has all entries"
    return f"unknown entry {name!r}; {hint}"


def _unknown_entries(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what a config.json has and this version does not: ("", part), then (part, option)."""
    parts = {f.name: {option.name for option in fields(f.default_factory())} for f in fields(TrainConfig)}  # type: ignore[operator,arg-type]
    inside = [(part, values) for part, values in data.items() if part in parts and isinstance(values, Mapping)]
    return [("", name) for name in data if name not in parts] + [
        (part, name) for part, values in inside for name in values if name not in parts[part]
    ]


def _other_version(path: Path, entry: str) -> str:
    return (
        f"{path} was written by another version of resist (its config.json has the entry {entry!r}); "
        "train again, or use that version"
    )


def from_json(data: object) -> TrainConfig:
    """Return the configuration whose `to_json` gave `data`. Raises UserError, naming the entry, for other data."""
    return _record(TrainConfig, data, "")


def _record(record: Any, data: object, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise UserError(f"{where or 'the configuration'} is not a table of names and values")
    hints, values = get_type_hints(record), {}
    for name, value in data.items():
        full = f"{where}.{name}".lstrip(".")
        if name not in hints:
            raise UserError(f"unknown entry {full!r}; it comes from another version of resist")
        nested = is_dataclass(hints[name])
        values[name] = _record(hints[name], value, full) if nested else _value(hints[name], value, full)
    return record(**values)


def _value(hint: Any, value: object, where: str) -> Any:
    """Convert a value read from JSON to the type `hint`."""
    inner = get_args(hint)
    if type(None) in inner:  # an optional value
        return None if value is None else _value(inner[0], value, where)
    if get_origin(hint) in (Union, UnionType):  # such as a number or "auto"
        for one in inner:
            with contextlib.suppress(UserError):
                return _value(one, value, where)
    if get_origin(hint) is tuple and isinstance(value, list) and (inner[-1] is Ellipsis or len(value) == len(inner)):
        return tuple(_value(inner[0], item, where) for item in value)
    if get_origin(hint) is Literal and value in inner:
        return value
    if get_origin(hint) is dict and isinstance(value, dict):  # its values are checked where they are used
        return value
    if hint is Path and isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    if hint is float and (isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)):  # else too large
        return float(value)
    if type(value) is hint:
        return value
    raise UserError(f"{where} has the value {json.dumps(value, ensure_ascii=False)[:80]}, which is not {_form(hint)}")


def _form(hint: Any) -> str:
    """Describe the JSON values of a type."""
    inner = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_form, inner))
    if get_origin(hint) is Literal:
        return f"one of {', '.join(inner)}"
    if get_origin(hint) is tuple:
        return f"a list, each entry {_form(inner[0])}" if inner[-1] is Ellipsis else f"a list of {len(inner)} numbers"
    if get_origin(hint) is dict:
        return "a table of names and values"
    names = {int: "a whole number", float: "a number", bool: "true or false", Path: "the name of a file or folder"}
    return names.get(hint, "a string")
