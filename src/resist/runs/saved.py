"""Checkpoints on disk: find the newest, read what it says of itself, and compare it with its digests."""

import contextlib
import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

from resist.errors import UserError, first_line
from resist.runs.job_state import process_file
from resist.runs.tensor_file import other_format, verify_tensors

FORMAT = "resist checkpoint 4"
JOB = "job.json"
LEAST = {"round": 0, "step": 0, "workers": 1, "processes": 1}


def is_sound(path: Path) -> bool:
    with contextlib.suppress(UserError):
        verify(path)
        return True
    return False


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, sound or damaged, the newest first."""
    return sorted((path for path in folder.glob("round-*") if path.is_dir()), reverse=True)


def newest(folder: Path) -> tuple[Path | None, list[UserError]]:
    """The newest sound checkpoint, and an error for each newer one, which is damaged or has another format."""
    errors: list[UserError] = []
    for path in complete(folder):
        try:
            verify(path)
            return path, errors
        except UserError as error:
            errors.append(error)
    return None, errors


def read_job(path: Path) -> dict[str, Any]:
    """Read the job.json of a checkpoint.

    It has the round, step, numbers of workers and processes, and the files with their digests.

    Raises:
        UserError: It is missing or damaged.
        FormatError: An earlier version of resist wrote it.
    """
    try:
        about = json.loads((path / JOB).read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise other_format(f"checkpoint {path}", about["format"], FORMAT)
        if about.pop("digest") != digest_of(about):
            raise ValueError(f"{JOB} does not match its digest")
        for name, least in LEAST.items():
            if type(about[name]) is not int or about[name] < least:
                raise ValueError(f"{JOB} has {name}={about[name]!r}; must be an integer, at least {least}")
        num_files = len(about["files"])
        if num_files != about["processes"] or set(about["files"]) != {process_file(k) for k in range(num_files)}:
            raise ValueError(f"{JOB} does not name a file for each process")
    except UserError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"checkpoint {path} is damaged: {reason_of(error)}") from error
    return about


def verify(path: Path) -> dict[str, Any]:
    """Compare the files of a checkpoint with their digests; return its job.json.

    Raises:
        UserError: A file is missing or damaged.
        FormatError: An earlier version of resist wrote the checkpoint.
    """
    about = read_job(path)
    for name, digest in about["files"].items():
        if verify_tensors(path / name, FORMAT).digest != digest:
            raise UserError(f"checkpoint {path} is damaged: {name} is not the file that {JOB} describes")
    return about


def digest_of(content: Mapping[str, object]) -> str:
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def reason_of(error: BaseException) -> str:
    """The reason of an error on one line, without what the message about the checkpoint says anyway."""
    if isinstance(error.__cause__, OSError):
        error = error.__cause__
    if isinstance(error, KeyError):
        return f"{JOB} has no entry {first_line(error)}"
    return getattr(error, "strerror", None) or first_line(error)
