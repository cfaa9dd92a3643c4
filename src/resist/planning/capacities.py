"""Capacities: how many blocks of each chain every worker holds, in every round.

`Capacities` is the one record of it. It is plain data, and `Capacities.of` is a pure function of (num_blocks, workers,
chain, round), so every process computes the same capacities, and may compare the records.

    >>> growing = Capacities(by_round={0: 2, 10: 4})
    >>> growing.of(6, 3, round=9), growing.of(6, 3, round=10)
    ((2, 2, 2), (4, 4, 4))
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import SupportsIndex, TypeVar, cast

from resist.errors import UserError
from resist.planning.plan import ChainLike, equal_capacities

# Default lower bound of a worker's capacity: the depth that the paper's Table 1 implies at S = 8.
MIN_DEPTH = 4

Amount = int | tuple[int, ...]  # blocks of every worker, or of each
GivenAmount = int | Sequence[int]
Key = TypeVar("Key")
Value = TypeVar("Value")
GivenByChain = Mapping[str, GivenAmount] | Iterable[tuple[str, GivenAmount]]


@dataclass(frozen=True, init=False)
class Capacities:
    """Number of blocks of every worker, by chain and round.

    The most specific entry that says something about a chain in a round decides:

    1. `by_round`: entries of this round and earlier ones, the latest first, each by the same rules 2 to 4;
    2. `by_chain`;
    3. `by_worker`;
    4. `min_depth`: every worker holds max(ceil(num_blocks / workers), min_depth) blocks.

    So growing overrides what the run begins with, a chain may differ from the others, and the paper's rule is for the
    rest. A capacity above the length of a chain is that length. A worker holds at least one block of each chain,
    because the first slot has the structure that further slots are made from.

    Args:
        min_depth: Lower bound of the capacities that follow the rule. Default: 4.
        by_worker: Blocks of each worker in every chain; one number for all workers, or one for each.
        by_chain: The same for single chains, by name: `layer3:1-22`, or `layer3` for the chains in it.
        by_round: Round, counted from 0 and with warm-up -> what holds from that round on: a number, one for each
            worker, a mapping as `by_chain`, or a record without rounds of its own.

    Attributes:
        min_depth: As given.
        by_worker: As given, as a number or a tuple.
        by_chain: Pairs of name and number or tuple.
        by_round: Pairs of round and record, ascending.

    Raises:
        UserError: If a number is out of range, or an entry has no effect.
    """

    min_depth: int | None
    by_worker: Amount | None
    by_chain: tuple[tuple[str, Amount], ...]
    by_round: "tuple[tuple[int, Capacities], ...]"

    def __init__(
        self,
        *,
        min_depth: int | None = None,
        by_worker: GivenAmount | None = None,
        by_chain: GivenByChain = (),
        by_round: "Mapping[int, Given] | Iterable[tuple[int, Given]]" = (),
    ) -> None:
        put = object.__setattr__  # the record is frozen
        put(self, "min_depth", None if min_depth is None else _whole(min_depth, f"`min_depth={min_depth}`"))
        put(self, "by_worker", None if by_worker is None else _amount(by_worker))
        put(self, "by_chain", tuple((_name(name), _amount(given, name)) for name, given in _pairs(by_chain, "chain")))
        records = ((_round(first), as_capacities(given)) for first, given in _pairs(by_round, "round"))
        rounds = sorted(records, key=operator.itemgetter(0))
        put(self, "by_round", tuple(rounds))
        if min_depth is not None and min_depth < 0:
            raise UserError(f"`min_depth={min_depth}` is negative; give 0 or more")
        if min_depth is not None and by_worker is not None:
            raise UserError(f"`min_depth={min_depth}` has no effect with `capacities`; remove one of the two")
        _check_once("chain", [name for name, _ in self.by_chain])
        _check_once("round", [first for first, _ in rounds])
        for first, record in rounds:
            if record.by_round:
                raise UserError(f"capacities from round {first} on have rounds of their own; list all rounds together")

    def __repr__(self) -> str:
        """The call that makes the record, without defaults."""
        values = ((name, getattr(self, name)) for name in ("min_depth", "by_worker", "by_chain", "by_round"))
        return f"Capacities({', '.join(f'{name}={value!r}' for name, value in values if value not in (None, ()))})"

    def of(self, num_blocks: int, workers: int, *, chain: str = "", round: int = 0) -> tuple[int, ...]:
        """Compute the capacities of one chain in one round.

        Args:
            num_blocks: Number of blocks in the chain.
            workers: Number of workers.
            chain: Name of the chain.
            round: Number of the round, from 0.

        Returns:
            Number of blocks of each worker, 1 to `num_blocks`; their sum is at least `num_blocks`.

        Raises:
            UserError: If there is not one value for each worker, or if they hold fewer than `num_blocks` blocks.
        """
        amount, depth = self.deciding(chain, round)
        if amount is None:
            return equal_capacities(num_blocks, workers, min(depth, num_blocks), chain=chain)
        given = amount if isinstance(amount, tuple) else (amount,) * workers
        _check_number(given, workers)
        capacities = tuple(min(capacity, num_blocks) for capacity in given)
        if sum(capacities) < num_blocks:
            raise UserError(
                f"{_shown(given)} hold {sum(capacities)} of the {num_blocks} blocks of "
                f"{f'chain {chain}' if chain else 'the chain'}{f' after {round} rounds' if round else ''}; raise them "
                "until every block has a worker"
            )
        return capacities

    def depth_of(self, chain: str, round: int) -> int | None:
        """Return the minimum depth that a chain follows in a round.

        Args:
            chain: Name of the chain.
            round: Number of the round, from 0.

        Returns:
            The depth, or None if the chain has capacities of its own.
        """
        amount, depth = self.deciding(chain, round)
        return depth if amount is None else None

    @property
    def rounds(self) -> tuple[int, ...]:
        """First rounds of different capacities, ascending, from 0."""
        return tuple(sorted({0, *(first for first, _ in self.by_round)}))

    def from_round(self, first: int, given: "Given") -> "Capacities":
        """Return the record with other capacities from a round on, instead of those that it has for that very round.

        Args:
            first: Number of the round, from 0.
            given: As a value of `by_round`.

        Raises:
            UserError: If a number is out of range.
        """
        others = [entry for entry in self.by_round if entry[0] != first]
        return replace(self, by_round=[*others, (first, given)])

    def check(self, workers: int, chains: Sequence[ChainLike] = ()) -> None:
        """Check the record for a number of workers and for chains.

        Args:
            workers: Number of workers.
            chains: All chains that are partitioned.

        Raises:
            UserError: If a sequence does not have a value for each worker; if a chain has other capacities and is not
                among `chains`; if a capacity or a minimum depth exceeds all of them; or if no plan is possible in some
                round.
        """
        for record in (self, *(record for _, record in self.by_round)):
            for amount in (record.by_worker, *(amount for _, amount in record.by_chain)):
                if isinstance(amount, tuple):
                    _check_number(amount, workers)
            if not chains:
                continue
            for name, amount in record.by_chain:
                if not (named := [chain for chain in chains if _fits(name, chain.name)]):
                    known = ", ".join(chain.name for chain in chains)
                    raise UserError(f"capacities of chain {name!r}, which is not partitioned; the chains are {known}")
                _check_lengths(amount, named, f" of chain {name}")
            if record.by_worker is not None:
                _check_lengths(record.by_worker, chains)
            longest = max(chains, key=lambda chain: chain.num_blocks)
            if record.min_depth is not None and record.min_depth > longest.num_blocks:
                raise UserError(
                    f"`min_depth={record.min_depth}` exceeds the {longest.num_blocks} blocks of chain {longest.name}"
                    f"{', the longest' if len(chains) > 1 else ''}; lower it or add chains"
                )
        for round in self.rounds:
            for chain in chains:
                self.of(chain.num_blocks, workers, chain=chain.name, round=round)

    def deciding(self, chain: str, round: int) -> tuple[Amount | None, int]:
        """Return the entry that decides about a chain in a round: an amount, or None and the minimum depth."""
        records = [record for first, record in reversed(self.by_round) if first <= round]
        for record in (*records, self):
            for fits in (operator.eq, _fits):  # the full name before that of the container
                for name, amount in record.by_chain:
                    if fits(name, chain):
                        return amount, 0
            if record.by_worker is not None:
                return record.by_worker, 0
            if record.min_depth is not None:
                return None, record.min_depth
        return None, MIN_DEPTH


Given = int | Sequence[int] | Mapping[str, GivenAmount] | Capacities


def as_capacities(given: Given | None = None, *, min_depth: int | None = None) -> Capacities:
    """Make the record from what a strategy is given.

    Args:
        given: A number for all workers, one for each, a mapping from names of chains to either, or the record itself.
        min_depth: Lower bound of the capacities that `given` says nothing about.

    Returns:
        The record.

    Raises:
        UserError: If a number is out of range, or one of the two has no effect.
    """
    if isinstance(given, Capacities):
        if min_depth is None:
            return given
        if given.min_depth is not None:
            raise UserError(f"`min_depth={min_depth}` and that of `capacities`, {given.min_depth}; give one of the two")
        return replace(given, min_depth=min_depth)
    if isinstance(given, Mapping):
        return Capacities(min_depth=min_depth, by_chain=given)
    return Capacities(min_depth=min_depth, by_worker=given)


def _pairs(given: Mapping[Key, Value] | Iterable[tuple[Key, Value]], what: str) -> list[tuple[Key, Value]]:
    try:
        items = cast("Mapping[Key, Value]", given).items() if isinstance(given, Mapping) else given
        return [(key, value) for key, value in items]
    except (TypeError, ValueError):
        raise UserError(f"capacities by {what} are {given!r}; give a mapping, or pairs") from None


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise UserError(
            f"capacities of {name!r}, which is not the name of a chain; for rounds give "
            f"resist.Capacities(by_round={{{name!r}: ...}})"
        )
    return name


def _round(first: object) -> int:
    number = _whole(first, f"capacities from round {first!r} on")
    if number < 0:
        raise UserError(f"capacities from round {number} on; rounds count from 0")
    return number


def _amount(given: object, chain: object = None) -> Amount:
    """Check a number for all workers, or one for each."""
    of_chain = "" if chain is None else f" of chain {chain}"
    if isinstance(given, str) or not isinstance(given, Iterable):
        number = _whole(given, f"`capacities={given}`{of_chain}")
        numbers, amount = (number,), number
    else:
        values = tuple(cast("Iterable[object]", given))
        numbers = amount = tuple(_whole(value, f"{_shown(values)}{of_chain}: {value!r}") for value in values)
    for worker, number in enumerate(numbers):
        if number < 1:
            where = f"capacity {number} of worker {worker}" if isinstance(amount, tuple) else "it"
            raise UserError(
                f"{_shown(numbers)}{of_chain}: {where} is less than 1; every worker holds a block of each chain"
            )
    return amount


def _whole(value: object, what: str) -> int:
    try:
        return operator.index(cast(SupportsIndex, None if isinstance(value, bool) else value))
    except TypeError:
        raise UserError(f"{what} is not a whole number; give one") from None


def _check_once(what: str, keys: Sequence[object]) -> None:
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"capacities of {what} {twice[0]} are given twice; give them once")


def _check_number(given: Sequence[int], workers: int) -> None:
    if len(given) != workers:
        raise UserError(f"{_shown(given)} has {len(given)} values for `workers={workers}`; give one for each worker")


def _check_lengths(amount: Amount, chains: Sequence[ChainLike], named: str = "") -> None:
    """Refuse more blocks than the longest of the chains has."""
    given = amount if isinstance(amount, tuple) else (amount,)
    longest = max(chains, key=lambda chain: chain.num_blocks)
    if max(given) > longest.num_blocks:
        length = f"{longest.num_blocks} blocks of chain {longest.name}{', the longest' * (len(chains) > 1)}"
        raise UserError(f"{_shown(given)}{named}: {max(given)} exceeds the {length}; lower it")


def _shown(values: Iterable[object]) -> str:
    return f"`capacities={' '.join(map(str, values))}`"


def _fits(name: str, chain: str) -> bool:
    """True if this names a chain or its container."""
    return name in (chain, chain.partition(":")[0])
