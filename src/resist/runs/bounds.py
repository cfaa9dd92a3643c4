"""Checks of single values by the types of their fields."""

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from resist.errors import UserError

# Upper bounds of numbers; those of all others are 1e9.
LARGEST = {
    "seed": 2**63 - 1, "lr": 10**20, "workers": 4096, "capacities": 10**6, "num_classes": 10**6, "rounds": 10**4,
}  # fmt: skip


def check_values(part: Any) -> None:
    """Raise UserError for a value that is no choice of its field, not finite, or too large.

    Args:
        part: A record of options, a dataclass.
    """
    for f in fields(part):
        value = getattr(part, f.name)
        choices = _choices(f.type)
        for item in value if isinstance(value, tuple) and choices else (value,) if choices else ():
            if item not in choices:
                raise UserError(f"`{f.name}={item!r}` is not one of {', '.join(choices)}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"`{f.name}={number}` is not a finite number")
            if isinstance(number, int | float):
                check_size(f.name, number)


def check_size(name: str, number: float) -> None:
    """Raise UserError for a number above its bound, or below the negative of it."""
    bound = LARGEST.get(name, 10**9)
    if abs(number) > bound:
        limit = f"large; give at most {bound}" if number > 0 else f"small; give at least {-bound}"
        raise UserError(f"`{name}={_shortened(number)}` is too {limit}")


def _shortened(number: float) -> str:
    """Return a number for a message, in a few digits where it has many."""
    if isinstance(number, float):
        return str(number)
    digits = number.bit_length() * math.log10(2)  # Python refuses to print very long ones
    return str(number) if digits < 21 else f"{'-' * (number < 0)}about 1e{digits:.0f}"


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the allowed values of a Literal, or of a tuple of literals; () for another type."""
    if get_origin(hint) is tuple:
        return _choices(get_args(hint)[0])
    return get_args(hint) if get_origin(hint) is Literal else ()
