"""Names of files in messages: printable on every stream, and a few of many."""

import os
from collections.abc import Sequence

# What to do about a file or folder that cannot be used.
REMEDY = "fix or delete it, or give `skip_bad_files`"
# Names that a message gives where there are more.
NAMED = 5


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


def few(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many follow: "a, b, c, d, e and 7 more"."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more


def count(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural: "1 file", "2 files"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
