"""Environment variables that a command depends on: each has a value that can be used, or is named in one line."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping

from resist.errors import UserError
from resist.runs.bounds import LARGEST

# Variables of torchrun, their lower and upper bounds. Without RANK and WORLD_SIZE a job is started here.
JOB: dict[str, tuple[int, int]] = {
    "WORLD_SIZE": (1, LARGEST["workers"]), "RANK": (0, LARGEST["workers"] - 1),
    "LOCAL_WORLD_SIZE": (1, LARGEST["workers"]), "LOCAL_RANK": (0, LARGEST["workers"] - 1),
    "MASTER_PORT": (1, 65535),
}  # fmt: skip
STARTED = ("RANK", "WORLD_SIZE")
UNSET = "set what torchrun sets, or unset it"
OWN = "resist sets it for the processes that it starts; unset it"


def check_environment(
    environment: Mapping[str, str] = os.environ, *, training: bool = False, drawing: bool = False
) -> None:
    """Check the variables that this package and its libraries read, where they matter.

    Args:
        environment: The environment.
        training: The command trains.
        drawing: The command draws pictures.

    Raises:
        UserError: One of them cannot be used.
    """
    _temporary_folder()
    values: dict[str, tuple[Callable[[str], bool], str]] = {}
    if drawing:  # matplotlib writes it into pictures
        values["SOURCE_DATE_EPOCH"] = (lambda text: _number(text, 0, 10**11), "give seconds since 1970, or unset it")
    if training:
        _check_job(environment)
        values |= {
            "OMP_NUM_THREADS": (_are_threads, "give the threads of a process, as in 1, or unset it"),
            "TORCHELASTIC_RESTART_COUNT": (lambda text: _number(text, 0, 10**9), UNSET),
            "RESIST_FORK": (lambda text: text in ("0", "1"), "give 0 or 1, or unset it"),
            "RESIST_LIFELINE": (lambda text: _number(text, 0, 10**7), OWN),
            "RESIST_COMMAND": (_is_command, OWN),
        }
    for name, (usable, remedy) in values.items():
        if name in environment and not usable(environment[name]):
            raise UserError(_message(name, environment[name], remedy))


def _check_job(environment: Mapping[str, str]) -> None:
    """Check the variables of a job that torchrun, or a person, starts. Raises UserError."""
    given = [name for name in STARTED if name in environment]
    if len(given) == 1:
        missing = next(name for name in STARTED if name not in environment)
        raise UserError(
            f"{given[0]} is in the environment and {missing} is not; set both, as torchrun does, or unset it"
        )
    if not given:
        return
    for name, (least, most) in JOB.items():
        if name in environment and not _number(environment[name], least, most):
            raise UserError(_message(name, environment[name], f"give {least} to {most}, or start with torchrun"))
    rank, size = (int(environment[name]) for name in STARTED)
    if rank >= size:
        raise UserError(f"RANK={rank} exceeds the last process of WORLD_SIZE={size}; give 0 to {size - 1}")
    for name in ("MASTER_ADDR", "MASTER_PORT") if size > 1 else ():
        if not environment.get(name):
            raise UserError(f"{name} is not in the environment, which says WORLD_SIZE={size}; {UNSET}")


def _message(name: str, value: str, remedy: str) -> str:
    shortened = value if len(value) <= 60 else f"{value[:57]}..."
    return f"the environment variable {name}={shortened!r} cannot be used; {remedy}"


def _number(text: str, least: int, most: int) -> bool:
    return text.isascii() and text.strip().isdecimal() and len(text) < 20 and least <= int(text) <= most


def _are_threads(text: str) -> bool:
    return not text or all(_number(part, 1, 10**5) for part in text.split(","))


def _is_command(text: str) -> bool:
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def _temporary_folder() -> None:
    """Raise UserError where no folder for temporary files can be written."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        where = f"TMPDIR={os.environ['TMPDIR']!r}, " if "TMPDIR" in os.environ else ""
        raise UserError(
            f"no folder for temporary files can be written ({where}/tmp, /var/tmp); set TMPDIR to one that can"
        ) from error
