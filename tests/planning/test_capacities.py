"""Capacities: one record, one precedence; the laws of the plans that follow from it, by chain and by round."""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist import Capacities
from resist.errors import UserError
from resist.planning.capacities import as_capacities
from resist.planning.schedule import schedule
from resist.planning.strategy import local_sgd, resist, switch
from resist.subnet.scaling import chain_scales


@dataclass(frozen=True)
class Run:
    """What a plan needs of a chain."""

    name: str
    num_blocks: int


LONG, SHORT, LONE = Run("layer3:1-22", 22), Run("layer2:1-3", 3), Run("tail.blocks:0-11", 12)


@st.composite
def amounts(draw: st.DrawFn, workers: int, num_blocks: int) -> int | tuple[int, ...]:
    """A number for all workers or one for each, that hold all blocks of a chain; others may be shorter."""
    if draw(st.booleans()):
        return draw(st.integers(-(-num_blocks // workers), num_blocks))
    values = [draw(st.integers(1, num_blocks)) for _ in range(workers)]
    values[0] = max(values[0], num_blocks - sum(values[1:]))
    return tuple(values)


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[Run, ...], int, Capacities]:
    """One to three chains, one to nine workers (also more than blocks), and any record that fits them."""
    workers = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(2, 12), min_size=1, max_size=3))
    chains = tuple(Run(f"stage{number}:1-{length}", length) for number, length in enumerate(lengths))
    longest = max(lengths)

    def record(rounds: bool) -> Capacities:
        named = draw(st.lists(st.sampled_from(chains), unique=True))
        names = {c: draw(st.sampled_from([c.name, c.name.partition(":")[0]])) for c in named}
        by_chain = {names[chain]: draw(amounts(workers, chain.num_blocks)) for chain in named}
        rule = draw(st.booleans())
        return Capacities(
            min_depth=draw(st.none() | st.integers(0, longest)) if rule else None,
            by_worker=None if rule else draw(amounts(workers, longest)),
            by_chain=by_chain,
            by_round={r: record(False) for r in draw(st.sets(st.integers(0, 9), max_size=3))} if rounds else {},
        )

    return chains, workers, record(True)


def expected(record: Capacities, chain: Run, workers: int, round: int) -> tuple[int, ...]:
    """The precedence as a list of all that might decide, the most specific first."""
    candidates: list[int | tuple[int, ...] | str] = []
    depths: list[int] = []
    for first in range(round, -2, -1):  # -1: the record itself, after all of its rounds
        part = dict(record.by_round).get(first) if first >= 0 else record
        if part is not None:
            by_chain = dict(part.by_chain)
            candidates += [by_chain[key] for key in (chain.name, chain.name.split(":")[0]) if key in by_chain]
            candidates += [] if part.by_worker is None else [part.by_worker]
            candidates += [] if part.min_depth is None else ["rule"]
            depths += [] if part.min_depth is None else [part.min_depth]
    decides = (*candidates, "rule")[0]
    if isinstance(decides, str):
        depth = (*depths, 4)[0]
        return (min(chain.num_blocks, max(-(-chain.num_blocks // workers), depth)),) * workers
    each = decides if isinstance(decides, tuple) else (decides,) * workers
    return tuple(min(chain.num_blocks, capacity) for capacity in each)


@given(cases(), st.integers(0, 12), st.integers(0, 2**40))
def test_the_laws_of_plans_hold_by_chain_and_by_round(
    case: tuple[tuple[Run, ...], int, Capacities], round: int, seed: int
) -> None:
    chains, workers, record = case
    strategy = resist(workers, capacities=record)
    plan = strategy.plan(chains, seed=seed, round=round)
    for chain, own in zip(chains, plan.plans, strict=True):
        assert own.capacities == expected(record, chain, workers, round)
        counts = Counter(block for held in own.blocks for block in held)
        assert set(counts) == set(range(chain.num_blocks))
        assert sum(counts.values()) == sum(own.capacities)
        assert max(counts.values()) - min(counts.values()) <= 1
        assert all(list(held) == sorted(set(held)) for held in own.blocks)
    assert strategy.plan(chains, seed=seed, round=round) == plan
    inclusion = [sum(own.capacities) / workers / own.num_blocks for own in plan.plans]
    assert chain_scales("inclusion", plan) == pytest.approx(inclusion)
    # A plan of some chains is the same without the others.
    if not record.by_chain and not any(part.by_chain for _, part in record.by_round):
        longest = max(chains, key=lambda chain: chain.num_blocks)
        alone = strategy.plan((longest,), seed=seed, round=round)
        assert alone.plans[0] == plan.plans[chains.index(longest)]


@given(cases())
def test_the_record_is_plain_and_its_rounds_are_those_of_the_changes(
    case: tuple[tuple[Run, ...], int, Capacities],
) -> None:
    chains, workers, record = case
    again = eval(repr(record), {"Capacities": Capacities})
    assert again == record
    assert hash(again) == hash(record)
    assert json.loads(json.dumps(asdict(record))) == json.loads(json.dumps(asdict(again)))
    for chain in chains:
        for round in range(12):
            if round not in record.rounds:
                before, now = (
                    record.of(chain.num_blocks, workers, chain=chain.name, round=r) for r in (round - 1, round)
                )
                assert before == now


@pytest.mark.parametrize(("num_blocks", "sizes"), [(6, (4,) * 8), (3, (1, 2, 3, 1, 1)), (2, (1,) * 7)])
def test_inclusion_is_uniform_with_more_workers_than_blocks(num_blocks: int, sizes: tuple[int, ...]) -> None:
    """Each cell within 4.5 standard deviations of the binomial; fixed seed."""
    rounds, counts = 3000, np.zeros((len(sizes), num_blocks))
    strategy = resist(len(sizes), capacities=sizes)
    for round in range(rounds):
        for worker, held in enumerate(strategy.assign(num_blocks, chain="c", seed=5, round=round).blocks):
            counts[worker, list(held)] += 1
    p = np.array(sizes)[:, None] / num_blocks
    sigma = np.sqrt(rounds * p * (1 - p))
    assert np.abs((counts - rounds * p) / np.where(sigma == 0, 1, sigma)).max() < 4.5


def test_more_workers_than_blocks() -> None:
    plan = resist(8, min_depth=4).plan([Run("c", 6)], seed=0, round=0).plans[0]
    assert plan.capacities == (4,) * 8
    assert sum(plan.capacities) == 32
    assert {len(plan.holders(block)) for block in range(6)} == {5, 6}
    assert resist(9).plan([Run("c", 8)], seed=0, round=0).plans[0].capacities == (4,) * 9
    assert resist(9, min_depth=0).plan([Run("c", 8)], seed=0, round=0).plans[0].capacities == (1,) * 9


def test_chains_of_different_lengths() -> None:
    chains = (SHORT, LONE)
    plan = resist(2, capacities=(8, 4)).plan(chains, seed=0, round=0)
    assert [p.capacities for p in plan.plans] == [(3, 3), (8, 4)]
    plan = resist(2, capacities={"layer2": 2, "tail.blocks:0-11": (8, 4)}).plan(chains, seed=0, round=0)
    assert [p.capacities for p in plan.plans] == [(2, 2), (8, 4)]
    plan = resist(2, capacities={"layer2": (1, 2)}).plan(chains, seed=0, round=0)
    assert [p.capacities for p in plan.plans] == [(1, 2), (6, 6)]  # the rule for the other one
    plan = resist(2, min_depth=7, capacities={"layer2": (1, 2)}).plan(chains, seed=0, round=0)
    assert [p.capacities for p in plan.plans] == [(1, 2), (7, 7)]
    plan = resist(4, min_depth=8).plan(chains, seed=0, round=0)  # exceeds one of them
    assert [p.capacities for p in plan.plans] == [(3,) * 4, (8,) * 4]
    plan = resist(4, capacities=6).plan(chains, seed=0, round=0)
    assert [p.capacities for p in plan.plans] == [(3,) * 4, (6,) * 4]


def test_the_full_name_of_a_chain_goes_before_its_container() -> None:
    record = Capacities(by_chain={"layer3": 9, "layer3:1-22": 11})
    assert record.of(22, 2, chain="layer3:1-22") == (11, 11)
    assert record.of(10, 2, chain="layer3:30-39") == (9, 9)
    assert record.of(10, 2, chain="layer30:0-9") == (5, 5)
    assert Capacities(by_chain={"": 3}).of(4, 2, chain=":0-3") == (3, 3)


def test_growing() -> None:
    strategy = resist(2, capacities=Capacities(by_worker=(12, 10), by_round={3: 15, 7: {"layer3": (22, 20)}}))
    sizes = [strategy.plan([LONG, SHORT], seed=0, round=round) for round in range(9)]
    assert [plan.plans[0].capacities for plan in sizes] == [(12, 10)] * 3 + [(15, 15)] * 4 + [(22, 20)] * 2
    assert [plan.plans[1].capacities for plan in sizes] == [(3, 3)] * 9
    assert strategy.change_rounds == (0, 3, 7)
    # Rounds count from the beginning of the run, also those of a warm-up or of another strategy before.
    warm = resist(2, warmup_rounds=4, capacities=Capacities(by_worker=11, by_round={3: 15, 6: 22}))
    sizes = [warm.plan([LONG], seed=0, round=round).plans[0].capacities[0] for round in range(8)]
    assert sizes == [22] * 4 + [15] * 2 + [22] * 2
    assert warm.change_rounds == (0, 3, 4, 6)
    assert switch(local_sgd(2), resist(2), at_round=5).change_rounds == (0, 5)
    assert local_sgd(2).change_rounds == (0,)


@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 6), st.integers(0, 9))
def test_blocks_stay_until_they_are_drawn_again(redraw_every: int, round: int, workers: int, seed: int) -> None:
    kept, always = resist(workers, redraw_every=redraw_every), resist(workers)
    plan, after = (kept.plan([LONG], seed=seed, round=number) for number in (round, round + 1))
    assert plan == always.plan([LONG], seed=seed, round=round // redraw_every)
    if (round + 1) % redraw_every:
        assert plan == after
        moved = {message.block for message in schedule(plan, after, [1]).messages}
        assert moved == {block for block in range(LONG.num_blocks) if len(plan.holders(0, block)) > 1}


def test_other_capacities_take_effect_between_two_draws() -> None:
    growing = resist(2, redraw_every=4, capacities=Capacities(by_round={0: 11, 2: 15}))
    sizes = [growing.plan([LONG], seed=0, round=round).plans[0].capacities for round in range(4)]
    assert sizes == [(11, 11)] * 2 + [(15, 15)] * 2


def test_depth_of_is_the_minimum_depth_that_decides() -> None:
    record = Capacities(by_chain={"layer2": 2}, by_round={3: 15, 7: Capacities(min_depth=2)})
    assert [record.depth_of("layer3:1-22", round) for round in (0, 3, 7)] == [4, None, 2]
    assert [record.depth_of("layer2:1-3", round) for round in (0, 3, 7)] == [None, None, 2]


def test_strategies_can_be_compared() -> None:
    assert resist(2, min_depth=3) == resist(2, min_depth=3)
    assert resist(2, min_depth=3) != resist(2, min_depth=2)
    assert resist(2, capacities={"a": 2}) != resist(2, capacities={"a": (2, 3)})
    assert "by_round=((0, Capacities(by_worker=2)), (3, Capacities(by_worker=4)))" in repr(
        resist(2, capacities=Capacities(by_round={0: 2, 3: 4}))
    )


def test_what_is_given_becomes_plain() -> None:
    record = as_capacities({"layer3": np.array([3, 4]), "layer2": np.int64(2)})  # type: ignore[dict-item]
    assert record == Capacities(by_chain=(("layer3", (3, 4)), ("layer2", 2)))
    assert type(dict(record.by_chain)["layer2"]) is int
    assert as_capacities(record) is record
    assert as_capacities(record, min_depth=3) == replace(record, min_depth=3)
    assert as_capacities() == Capacities()
    assert as_capacities([3, 1]) == Capacities(by_worker=(3, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Capacities(by_worker=(2, 0)),
            r"`capacities=2 0`: capacity 0 of worker 1 is less than 1; every worker",
        ),
        (lambda: Capacities(by_worker=0), r"`capacities=0`: it is less than 1"),
        (lambda: Capacities(by_chain={"layer3": -1}), r"`capacities=-1` of chain layer3: it is less than 1"),
        (lambda: Capacities(by_worker=(2.5, 1)), r"`capacities=2.5 1`: 2.5 is not a whole number"),  # type: ignore[arg-type]
        (lambda: Capacities(by_worker="44"), r"`capacities=44` is not a whole number"),  # type: ignore[arg-type]
        (lambda: Capacities(min_depth=-1), r"`min_depth=-1` is negative; give 0 or more"),
        (lambda: Capacities(min_depth=2.5), r"`min_depth=2.5` is not a whole number"),  # type: ignore[arg-type]
        (lambda: Capacities(min_depth=2, by_worker=3), r"`min_depth=2` has no effect with `capacities`"),
        (lambda: Capacities(by_chain=[("a", 1), ("a", 2)]), r"capacities of chain a are given twice"),
        (lambda: Capacities(by_round=[(1, 1), (1, 2)]), r"capacities of round 1 are given twice"),
        (lambda: Capacities(by_round={-1: 2}), r"capacities from round -1 on; rounds count from 0"),
        (lambda: Capacities(by_round={"a": 2}), r"capacities from round 'a' on is not a whole number"),  # type: ignore[dict-item]
        (lambda: Capacities(by_round=[2, 4]), r"capacities by round are \[2, 4\]; give a mapping, or pairs"),  # type: ignore[list-item]
        (lambda: Capacities(by_round={3: Capacities(by_round={4: 1})}), r"from round 3 on have rounds of their own"),
        (lambda: resist(2, capacities={0: 3}), r"capacities of 0, which is not the name of a chain; for rounds give"),  # type: ignore[dict-item]
        (
            lambda: resist(2, min_depth=3, capacities=Capacities(min_depth=2)),
            r"`min_depth=3` and that of `capacities`, 2; give one of the two",
        ),
        (lambda: resist(3, capacities={"layer3": (1, 2)}), r"`capacities=1 2` has 2 values for `workers=3`"),
        (lambda: resist(3, capacities=Capacities(by_round={5: (1, 2)})), r"`capacities=1 2` has 2 values"),
        (lambda: plan(resist(2, min_depth=30)), r"`min_depth=30` exceeds the 22 blocks of chain layer3:1-22; lower it"),
        (
            lambda: plan(resist(2, min_depth=30), LONG, SHORT),
            r"`min_depth=30` exceeds the 22 blocks of chain layer3:1-22, the longest; lower it or add chains",
        ),
        (
            lambda: plan(resist(2, capacities={"layer4": 3})),
            r"capacities of chain 'layer4', which is not partitioned; the chains are layer3:1-22",
        ),
        # The whole run is checked at its beginning.
        (
            lambda: plan(resist(2, capacities=Capacities(by_round={0: 11, 9: {"layer4": 3}}))),
            r"capacities of chain 'layer4', which is not partitioned",
        ),
        (
            lambda: plan(resist(2, warmup_rounds=3, capacities=Capacities(by_round={9: (4, 5)}))),
            r"`capacities=4 5` hold 9 of the 22 blocks of chain layer3:1-22 after 9 rounds; raise them",
        ),
        (lambda: plan(resist(2, capacities=10)), r"`capacities=10 10` hold 20 of the 22 blocks of chain layer3:1-22;"),
        # A number beyond all chains that it is for would be cut.
        (lambda: plan(resist(2, capacities=30)), r"^`capacities=30`: 30 exceeds the 22 blocks of chain layer3:1-22"),
        (
            lambda: plan(resist(2, capacities=(22, 23)), SHORT, LONG),
            r"^`capacities=22 23`: 23 exceeds the 22 blocks of chain layer3:1-22, the longest; lower it$",
        ),
        (
            lambda: plan(resist(2, capacities={"layer2": (2, 9)}), SHORT, LONG),
            r"^`capacities=2 9` of chain layer2: 9 exceeds the 3 blocks of chain layer2:1-3; lower it$",
        ),
        (
            lambda: plan(resist(2, capacities=Capacities(by_round={0: 11, 9: {"layer3": 40}}))),
            r"^`capacities=40` of chain layer3: 40 exceeds the 22 blocks of chain layer3:1-22; lower it$",
        ),
        (lambda: plan(resist(2, capacities=Capacities(by_round={0: 11, 5: 40}))), r"^`capacities=40`: 40 exceeds the"),
    ],
)
def test_refusals(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def plan(strategy, *chains: Run) -> object:
    return strategy.plan(chains or (LONG,), seed=0, round=0)


def test_from_a_round_on_they_are_others() -> None:
    """Nothing changes before; what the same round had is replaced; a later entry stays."""
    record = Capacities(by_worker=6, by_round={20: 11}).from_round(5, (7, 7, 6, 4)).from_round(5, (8, 6, 6, 4))
    held = [record.of(22, 4, chain=LONG.name, round=round) for round in (4, 5, 19, 20)]
    assert held == [(6, 6, 6, 6), (8, 6, 6, 4), (8, 6, 6, 4), (11, 11, 11, 11)]


def test_a_strategy_changes_its_capacities_in_every_stage_that_partitions() -> None:
    changed = resist(2, warmup_rounds=3).with_capacities((2, 1), from_round=5)
    assert [changed.plan([SHORT], seed=0, round=round).capacities(0) for round in (0, 4, 5)] == [(3,), (3,), (2,)]
    with pytest.raises(UserError, match="every worker holds every block"):
        local_sgd(2).with_capacities(1, from_round=1)
