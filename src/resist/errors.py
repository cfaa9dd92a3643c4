"""Exceptions: invalid user input, diverged training, and lost workers; and the texts of their messages."""

import codecs
import os
import shlex
from collections.abc import Iterable
from difflib import get_close_matches

# The name of an error handler for `str.encode`: what the encoding does not have is written in ASCII, a byte that is not
# UTF-8 as in \\xe9.
PRINTABLE = "resist.printable"
ASCII = {"■": "#", "─": "-", "·": ".", "±": "+/-", "…": "...", "×": "x", "→": "->", "\u00a0": " "}


class UserError(ValueError):
    """An invalid option, argument or file.

    The message is one line that names the value, the bound and the remedy.
    """


class AgreedError(UserError):
    """A UserError that all processes raise at the same time.

    So only the first process needs to print it.
    """


class DivergedError(AgreedError):
    """NaN or inf in a worker's loss or weights.

    These weights have not been averaged into those of other workers.
    """


class IncompleteNetworkError(AgreedError):
    """A part of the network was lost with its workers: no process has it any more."""


class WorkerLostError(RuntimeError):
    """Contact with another worker was lost.

    Its process ended, or did not answer in time.
    """


class NotAMemberError(WorkerLostError):
    """This process cannot go on with the others.

    They have gone on without it, it does not reach the store at which they agree, or too few are left.
    """


class LeftBehindError(NotAMemberError):
    """The other members have gone on without this process, which may come back as a new one."""


class RunEndedError(UserError):
    """The run that this process wants to join has ended."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text.

    Args:
        error: The exception.

    Returns:
        The line, or the name of the exception's class if it has no text.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def shown(path: str | os.PathLike[str]) -> str:
    r"""Return a path for a message.

    Bytes of it that are not UTF-8, and control characters, are written as in `\xe9`: they could not be printed, or
    would break the line.
    """
    return "".join(map(_shown, str(path)))


def _shown(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that is not UTF-8, see os.fsdecode
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def quoted(path: str | os.PathLike[str]) -> str:
    r"""Return a path as one word of a command line, printable: `a`, `'a b'`, or `$'caf\xe9'`."""
    text = str(path)
    if all(c.isprintable() for c in text):
        return shlex.quote(text)
    escaped = "".join(c if c.isprintable() else "".join(f"\\x{b:02x}" for b in os.fsencode(c)) for c in _escaped(text))
    return f"$'{escaped}'"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of some names that was probably meant, or None where all of them are other names.

    Args:
        name: What was given.
        known: The names that exist.
    """
    names = sorted(known)
    for mark in ("\n", "-") if len(name) > 2 else ():  # the beginning of a name, or of a later word of it
        beginning = [other for other in names if mark + name in f"\n{other}"]
        if len(beginning) == 1:
            return beginning[0]
    if swapped := [other for other in names if sorted(other) == sorted(name)]:  # short names are never close enough
        return swapped[0]
    return next(iter(get_close_matches(name, names, 1, cutoff=0.75)), None)


def _replacement(error: UnicodeError) -> tuple[str, int]:
    """Return what to write in place of characters that an encoding does not have, and where to go on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(ASCII.get(c) or _in_ascii(c) for c in error.object[error.start : error.end]), error.end


def _in_ascii(character: str) -> str:
    text = _shown(character)
    return text if text.isascii() else character.encode("ascii", "backslashreplace").decode()


codecs.register_error(PRINTABLE, _replacement)
