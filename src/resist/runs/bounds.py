"""Checks of single values by the types of their fields, and their bounds."""

import math
from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from resist.errors import UserError

# Upper bounds of numbers; those of all others are 1e9.
LARGEST = {
    "seed": 2**63 - 1, "lr": 10**20, "workers": 4096, "capacities": 10**6, "num_classes": 10**6, "rounds": 10**4,
    "image_size": 8192, "grad_accum_steps": 10**6, "num_evals": 10**6, "restarts": 1000, "timeout_s": 10**8,
    "mixup": 1000, "cutmix": 1000, "epochs": 10**6,
}  # fmt: skip
# Lower bounds.
LEAST: dict[str, float] = {
    "batch_size": 1, "grad_accum_steps": 1, "lr": 0, "momentum": 0, "weight_decay": 0, "lr_warmup_steps": 0,
    "warmup_rounds": 0, "label_smoothing": 0, "mixup": 0, "cutmix": 0, "image_size": 32, "data_workers": 0,
    "processes": 1, "num_evals": 1, "checkpoint_rounds": 1, "redraw_every": 1, "restarts": 0, "fragments": 0,
    "delay": 1,
}  # fmt: skip
DEVICES = ("auto", "cpu", "cuda")
# Numbers that have to be above 0, and numbers that have to be below 1.
ABOVE_0 = ("epochs", "timeout_s", "clip_grad_norm")
BELOW_1 = {"label_smoothing": "0.1 is usual", "momentum": "0.9 is usual"}


def check_values(part: Any) -> None:
    """Raise UserError for a value that is no choice of its field, not finite, or outside of its bounds.

    Args:
        part: A record of options, a dataclass.
    """
    for f in fields(part):
        value = getattr(part, f.name)
        choices = _choices(f.type)
        or_number = get_origin(f.type) in (Union, UnionType)
        for item in value if isinstance(value, tuple) and choices else (value,) if choices else ():
            if item not in choices and not (or_number and type(item) is int):
                known = [*choices, "a whole number"] if or_number else choices
                raise UserError(f"`{f.name}={item!r}` is not one of {', '.join(known)}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int | float):
                check_size(f.name, number)


def check_size(name: str, number: float) -> None:
    """Raise UserError for a number that is not finite, or outside of the bounds of its option.

    Args:
        name: The option.
        number: Its value.
    """
    if isinstance(number, float) and not math.isfinite(number):
        raise UserError(f"`{name}={number}` is not a finite number")
    most = LARGEST.get(name, 10**9)
    if number > most:
        raise UserError(f"`{name}={_shortened(number)}` is too large; give at most {most}")
    if number < (least := LEAST.get(name, -most)):
        raise UserError(f"`{name}={_shortened(number)}` is too small; give at least {least}")
    if name in ABOVE_0 and number <= 0:
        raise UserError(f"`{name}={_shortened(number)}` must be above 0")
    if name in BELOW_1 and number >= 1:
        raise UserError(f"`{name}={_shortened(number)}`; must be less than 1; {BELOW_1[name]}")


def check_device(name: str) -> None:
    """Raise UserError for a name that is no kind of device."""
    if name not in DEVICES:
        raise UserError(f"`device={name!r}` is not one of {', '.join(DEVICES)}")


def _shortened(number: float) -> str:
    """Return a number for a message, in a few digits where it has many."""
    if isinstance(number, float):
        return str(number).removesuffix(".0")
    digits = number.bit_length() * math.log10(2)  # Python refuses to print very long ones
    return str(number) if digits < 21 else f"{'-' * (number < 0)}about 1e{digits:.0f}"


def _choices(hint: Any) -> tuple[Any, ...]:
    """Return the allowed values of a Literal, of a tuple of literals, or of a literal beside numbers; else ()."""
    if get_origin(hint) is tuple:
        return _choices(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return next(filter(None, map(_choices, get_args(hint))), ())
    return get_args(hint) if get_origin(hint) is Literal else ()
