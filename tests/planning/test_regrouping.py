"""Who goes on from where when members change, and how many blocks each may hold: pure functions."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist.errors import IncompleteNetworkError, UserError
from resist.planning.capacities import Capacities
from resist.planning.members import Members, fit
from resist.planning.plan import Plan
from resist.planning.regrouping import Offer, Point, Row, Standing, choose, origins_of, with_members
from resist.planning.strategy import Strategy, ddp, local_sgd, resist, switch


@dataclass(frozen=True)
class OneChain:
    num_blocks: int
    name: str = "c"


amounts = st.integers(1, 12)
bounds = st.none() | st.integers(1, 12)


@given(st.integers(1, 12), st.lists(st.tuples(amounts, bounds), min_size=1, max_size=6))
def test_capacities_fit_within_the_bounds_or_are_refused(
    num_blocks: int, workers: list[tuple[int, int | None]]
) -> None:
    wanted, most = zip(*workers, strict=True)
    limits = [num_blocks if bound is None else min(bound, num_blocks) for bound in most]
    if sum(limits) < num_blocks:
        with pytest.raises(
            UserError, match=f"{len(workers)} workers may hold {sum(limits)} of the {num_blocks} blocks"
        ):
            fit(num_blocks, wanted, most, chain="c")
        return
    found = fit(num_blocks, wanted, most, chain="c")
    assert sum(found) >= num_blocks
    assert all(1 <= capacity <= limit for capacity, limit in zip(found, limits, strict=True))
    asked = [min(amount, limit) for amount, limit in zip(wanted, limits, strict=True)]
    assert all(capacity >= amount for capacity, amount in zip(found, asked, strict=True))
    assert sum(asked) >= num_blocks or sum(found) == num_blocks  # none is raised further than it has to be
    if sum(asked) >= num_blocks:
        assert list(found) == asked


@pytest.mark.parametrize(
    "strategy", [resist(4), resist(4, capacities=(3, 2, 4, 1)), resist(4, capacities=5), local_sgd(4)]
)
def test_the_first_members_draw_the_same_plans(strategy: Strategy) -> None:
    assert with_members(strategy, Members.first(4)) == strategy
    bounded = with_members(strategy, replace(Members.first(4), most=(12,) * 4))
    for round in range(4):
        assert bounded.plan([OneChain(8)], seed=1, round=round) == strategy.plan([OneChain(8)], seed=1, round=round)


def test_other_members_draw_plans_of_their_own_number() -> None:
    members = Members((0, 2, None), (None, None, None), 4)
    unequal = with_members(resist(4, capacities=(3, 2, 4, 1)), members)
    assert unequal.plan([OneChain(8)], seed=1, round=0).plans[0].capacities == (3, 4, 1)
    assert with_members(resist(4, min_depth=0), members).plan([OneChain(8)], seed=1, round=0).workers == 3
    warm = with_members(switch(local_sgd(4), resist(4, min_depth=0), at_round=2), members)
    assert [warm.plan([OneChain(8)], seed=1, round=r).capacities(0) for r in (0, 2)] == [(8,), (3,)]
    growing = Capacities(by_round={0: 2, 3: 4})
    bounded = with_members(resist(4, capacities=growing), Members((0, 1), (5, 3), 4))
    assert [bounded.plan([OneChain(8)], seed=1, round=r).plans[0].capacities for r in (0, 3)] == [(5, 3), (5, 3)]
    with pytest.raises(UserError, match="worker 1 may hold 3 blocks of a chain"):
        with_members(local_sgd(4), Members((0, 1), (None, 3), 4)).plan([OneChain(8)], seed=1, round=0)


def by_hand(num_blocks: int, *, chain: str, seed: int, round: int) -> Plan:
    return Plan(num_blocks, (tuple(range(num_blocks)),) * 2)


def test_strategies_that_have_one_number_of_workers_are_refused() -> None:
    with pytest.raises(UserError, match="ddp joins the workers in every step"):
        with_members(ddp(2), Members.first(2))
    with pytest.raises(UserError, match="only the strategies of this package go on with other workers"):
        with_members(replace(local_sgd(2), assign=by_hand), Members.first(2))


@given(st.data())
def test_workers_keep_their_places_and_others_take_free_ones(data: st.DataObject) -> None:
    given_workers = data.draw(st.integers(1, 5))
    origins = data.draw(st.lists(st.none() | st.integers(0, given_workers - 1), min_size=1, max_size=6))
    origins = [place if origins.index(place) == n else None for n, place in enumerate(origins)]
    members = Members(tuple(origins), (None,) * len(origins), given_workers)
    workers = data.draw(st.integers(1, 6))
    stay = data.draw(st.lists(st.integers(0, len(origins) - 1), unique=True, max_size=workers))
    news = data.draw(st.permutations(range(workers)))
    former = dict(zip(news, stay, strict=False))
    found = origins_of(members, former, workers)
    assert len(found) == workers
    places = [place for place in found if place is not None]
    assert len(places) == len(set(places)) == min(workers, given_workers)
    assert all(0 <= place < given_workers for place in places)
    for new, old in former.items():
        if origins[old] is not None:
            assert found[new] == origins[old]


NOW, START = Point(0, 3, True), Point(0, 3, False)


def standing(new: int, former: int, held: tuple[int, ...], kept: tuple[int, ...], *, torn: bool = False) -> Standing:
    """A process of a job of three workers with one chain, in round 3."""
    row, replicas = {new: Row(former, (held,))}, frozenset((0, block) for block in kept)
    offers = [Offer(point, 3, row, replicas) for point in ((START,) if torn else (NOW, START))]
    return Standing((new,), tuple(offers), (0, 3) if torn else None)


def test_present_weights_come_before_the_beginning_unless_somebody_is_torn() -> None:
    one = standing(0, 0, (0, 1), (4,))
    for torn in (False, True):
        found = choose([one, standing(1, 2, (2, 3), (5,), torn=torn)], [6])
        assert found.point == (START if torn else NOW)
        assert (found.lost, found.former, found.joined) == ((1,), {0: 0, 1: 2}, frozenset())
        assert found.plan.plans[0].blocks == ((0, 1, 4), (2, 3, 5))
        assert found.recovered == {(0, 4): 0, (0, 5): 1}


def test_who_has_completed_a_round_goes_on_alone_if_it_has_everything() -> None:
    ahead = Standing((0,), (Offer(Point(0, 4, True), 3, {0: Row(0, ((0, 1, 2, 3),))}, frozenset({(0, 4), (0, 5)})),))
    behind = standing(1, 2, (2, 3), (5,), torn=True)
    found = choose([ahead, behind], [6])
    assert (found.point.round, found.joined) == (4, frozenset({1}))
    assert found.plan.plans[0].blocks == ((0, 1, 2, 3, 4, 5), ())


def test_a_block_that_is_nowhere_is_named() -> None:
    with pytest.raises(IncompleteNetworkError, match=r"block 5 of chain 0 was lost with worker 1: .* in round 4"):
        choose([standing(0, 0, (0, 1), (4,)), standing(1, 2, (2, 3), ())], [6])
    with pytest.raises(UserError, match="all processes join"):
        choose([Standing((0,)), Standing((1,))], [6])


@given(st.data())
def test_the_chosen_point_has_a_complete_network(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 6))
    some = st.frozensets(st.integers(0, blocks - 1)).map(lambda held: tuple(sorted(held)))
    standings: list[Standing] = []
    for new in range(data.draw(st.integers(1, 4))):
        points = data.draw(st.frozensets(st.builds(Point, st.integers(0, 1), st.integers(0, 2), st.booleans())))
        torn = data.draw(st.none() | st.tuples(st.integers(0, 1), st.integers(0, 2)))
        offers = [
            Offer(point, 4, {new: Row(new, (data.draw(some),))}, frozenset((0, b) for b in data.draw(some)))
            for point in points
            if not (point.steps and (point.generation, point.round) == torn)
        ]
        standings.append(Standing((new,), tuple(offers), torn))

    def known(point: Point) -> set[int]:
        at = [offer for one in standings for offer in one.offers if offer.point == point]
        own = {b for offer in at for row in offer.rows.values() for b in row.held[0]}
        return own | {b for offer in at for _, b in offer.kept}

    points = {offer.point for one in standings for offer in one.offers}
    complete = {point for point in points if len(known(point)) == blocks}
    if not complete:
        with pytest.raises(UserError):
            choose(standings, [blocks])
        return
    found = choose(standings, [blocks])
    newest = max((point.generation, point.round) for point in complete)
    assert (found.point.generation, found.point.round) == newest
    preferred = replace(found.point, steps=newest not in {one.torn for one in standings})
    assert found.point == preferred or preferred not in complete
    (plan,) = found.plan.plans
    assert {b for held in plan.blocks for b in held} == set(range(blocks))
    for one in standings:
        (new,) = one.hosted
        at = [offer for offer in one.offers if offer.point == found.point]
        assert (new in found.joined) == (not at)
        own = at[0].rows[new].held[0] if at else ()
        assert plan.blocks[new][: len(own)] == own
        assert all(found.recovered[0, b] == new and (0, b) in at[0].kept for b in plan.blocks[new][len(own) :])
