"""Names of files in messages: printable on every stream, and a few of many."""

from collections.abc import Sequence

from resist.errors import shown

# What to do about a file or folder that cannot be used.
REMEDY = "fix or delete it, or give `skip_bad_files`"
# Names that a message gives where there are more.
NAMED = 5


def few(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many follow: "a, b, c, d, e and 7 more"."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(shown, names[:NAMED])) + more


def count(number: int, noun: str) -> str:
    """Return a number with its noun in the singular or plural: "1 file", "2 files"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
