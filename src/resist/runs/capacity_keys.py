"""Capacities in a configuration file, as text: `layer3=6`, `layer3:1-22=8,6,4,4`; by round `13=11`, `13:layer3=11`."""

import re
from collections.abc import Sequence

from resist.errors import UserError
from resist.planning.capacities import Amount, Capacities

# The longest numbers of blocks and rounds, in digits.
DIGITS = 6
BLOCKS = rf"\d{{1,{DIGITS}}}(?:,\d{{1,{DIGITS}}})*"


def capacities_of(
    *, by_worker: Sequence[int], by_chain: Sequence[str], by_round: Sequence[str], min_depth: int | None
) -> Capacities:
    """Make the record of capacities from the fields of a configuration.

    Args:
        by_worker: Blocks of each worker, or none.
        by_chain: Texts as in `layer3=6` or `layer3=8,6,4,4`.
        by_round: Texts as in `13=11`: 11 blocks of every chain after 13 rounds; or `13:layer3=8,6,4,4`.
        min_depth: Lower bound of the capacities that nothing is said about.

    Returns:
        The record.

    Raises:
        UserError: If a text has another form, or a number is out of range.
    """
    chains = [_parse("capacities_by_chain", text, r"(?P<chain>.+)", "NAME=BLOCKS, as in layer3=6") for text in by_chain]
    rounds: dict[int, list[tuple[str | None, Amount]]] = {}
    form = "ROUNDS=BLOCKS or ROUNDS:NAME=BLOCKS, as in 13=11"
    for text in by_round:
        found, amount = _parse("capacities_by_round", text, rf"(?P<round>\d{{1,{DIGITS}}})(?::(?P<chain>.+))?", form)
        rounds.setdefault(int(found["round"]), []).append((found["chain"], amount))
    return Capacities(
        min_depth=min_depth,
        by_worker=tuple(by_worker) or None,
        by_chain=[(found["chain"], amount) for found, amount in chains],
        by_round=[(first, _stage(first, entries)) for first, entries in rounds.items()],
    )


def _stage(first: int, entries: Sequence[tuple[str | None, Amount]]) -> Capacities:
    """Capacities from a round on, in all chains or by chain."""
    every = [amount for chain, amount in entries if chain is None]
    if len(every) > 1:
        raise UserError(f"`capacities_by_round` has {first}=... twice; give it once")
    return Capacities(by_worker=every[0] if every else None, by_chain=[(c, a) for c, a in entries if c is not None])


def _parse(name: str, text: str, key: str, form: str) -> tuple[dict[str, str], Amount]:
    found = re.fullmatch(rf"{key}=(?P<blocks>{BLOCKS})", text)
    if found is None:
        raise UserError(f"`{name}={text!r}` is not {form} (or one number for each worker, as in 8,6,4,4)")
    numbers = tuple(map(int, found["blocks"].split(",")))
    return found.groupdict(), numbers if "," in text.rpartition("=")[2] else next(iter(numbers))
