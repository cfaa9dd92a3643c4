"""Plans: complete, exact, fair, and a function of their arguments alone."""

import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist.errors import UserError
from resist.planning.plan import Plan, RoundPlan, check_capacities, equal_capacities, keyed_int, partition, shuffled


@st.composite
def capacities(draw: st.DrawFn) -> tuple[int, tuple[int, ...]]:
    """A number of blocks and capacities that can hold them."""
    num_blocks = draw(st.integers(1, 30))
    sizes = draw(st.lists(st.integers(1, num_blocks), min_size=1, max_size=8))
    sizes[0] = max(sizes[0], num_blocks - sum(sizes[1:]))
    return num_blocks, tuple(sizes)


@given(capacities(), st.integers(0, 2**40), st.integers(0, 10**6))
def test_a_plan_is_complete_exact_and_balanced(case: tuple[int, tuple[int, ...]], seed: int, round: int) -> None:
    num_blocks, sizes = case
    plan = partition(num_blocks, sizes, seed=seed, round=round, chain="layer3:1-22")
    assert plan.capacities == sizes
    for held in plan.blocks:
        assert list(held) == sorted(set(held))
        assert set(held) <= set(range(num_blocks))
    counts = Counter(block for held in plan.blocks for block in held)
    assert set(counts) == set(range(num_blocks))
    assert max(counts.values()) - min(counts.values()) <= 1
    assert plan == partition(num_blocks, sizes, seed=seed, round=round, chain="layer3:1-22")
    for block in range(num_blocks):
        assert len(plan.holders(block)) == counts[block]
        for worker in plan.holders(block):
            assert plan.blocks[worker][plan.slot(block, worker=worker)] == block


def test_a_block_that_does_not_exist_has_no_holders() -> None:
    plan = partition(5, (3, 2), seed=0, round=0)
    assert plan.holders(-1) == plan.holders(5) == ()


def test_inclusion_is_uniform_over_rounds() -> None:
    """Each cell within 4.5 standard deviations of the binomial; 4 x 7 cells, fixed seed."""
    num_blocks, sizes, rounds = 7, (5, 3, 2, 1), 3000
    counts = np.zeros((len(sizes), num_blocks))
    for round in range(rounds):
        for worker, held in enumerate(partition(num_blocks, sizes, seed=3, round=round).blocks):
            counts[worker, list(held)] += 1
    p = np.array(sizes)[:, None] / num_blocks
    assert np.abs((counts - rounds * p) / np.sqrt(rounds * p * (1 - p))).max() < 4.5


def test_sets_are_uniform_among_those_of_their_size() -> None:
    """A worker that uses up a deck draws from two, and must draw every pair with the same probability."""
    rounds, pairs = 3000, list(combinations(range(4), 2))
    plans = [partition(4, (2, 1, 2), seed=9, round=round) for round in range(rounds)]
    counts = Counter((worker, held) for plan in plans for worker, held in enumerate(plan.blocks))
    for worker in (0, 2):
        chi2 = sum((counts[worker, pair] - rounds / 6) ** 2 / (rounds / 6) for pair in pairs)
        assert chi2 < 20.5  # the 99.9 % point of 5 degrees of freedom


def test_the_remainder_moves_around() -> None:
    """24 places for 22 blocks: two blocks have two holders, and every worker is one of those equally often."""
    rounds = 2000
    sharing: Counter[int] = Counter()
    for round in range(rounds):
        plan = partition(22, equal_capacities(22, 4), seed=0, round=round)
        assert plan.capacities == (6, 6, 6, 6)
        for block in range(22):
            holders = plan.holders(block)
            sharing.update(holders if len(holders) == 2 else ())
    assert sum(sharing.values()) == 4 * rounds
    assert all(abs(sharing[worker] - rounds) < 0.1 * rounds for worker in range(4))


def test_global_random_state_is_neither_read_nor_written() -> None:
    plans: list[Plan] = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
        plans.append(partition(22, (6, 6, 6, 6), seed=0, round=5))
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
        assert torch.equal(torch.get_rng_state(), before[2])
    assert plans[0] == plans[1]


def test_plans_are_the_same_in_all_versions() -> None:
    """Machines of one job may have different versions of Python, and a run continues with a later version."""
    assert partition(7, (3, 2, 2), seed=1, round=4, chain="layer3:1-7").blocks == FROZEN


FROZEN = ((2, 5, 6), (0, 3), (1, 4))


def test_each_argument_changes_the_plan() -> None:
    plans = {
        partition(22, (8, 8, 8), seed=seed, round=round, chain=chain)
        for seed in (0, 1)
        for round in (0, 1)
        for chain in ("a", "b")
    }
    assert len(plans) == 8


def test_held_by_all() -> None:
    assert partition(3, (3, 3), seed=0, round=0).held_by_all
    assert not partition(3, (3, 2), seed=0, round=0).held_by_all


@pytest.mark.parametrize(
    ("num_blocks", "workers", "min_depth", "expected"),
    [
        (22, 2, 4, 11),
        (22, 4, 4, 6),
        (22, 8, 4, 4),
        (22, 8, 0, 3),
        (22, 4, 22, 22),
        (1, 1, 0, 1),
        (6, 8, 4, 4),
        (6, 8, 0, 1),
    ],
)
def test_equal_capacities(num_blocks: int, workers: int, min_depth: int, expected: int) -> None:
    assert equal_capacities(num_blocks, workers, min_depth) == (expected,) * workers


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((22, 0, 0), r"`workers=0`; must be at least 1"),
        ((22, 4, -1), r"`min_depth=-1` is negative; give 0 to 22"),
        ((22, 4, 30), r"`min_depth=30` exceeds the 22 blocks of chain layer3:1-22; lower it or add chains"),
    ],
)
def test_impossible_equal_capacities(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        equal_capacities(*arguments, chain="layer3:1-22")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 0, 6), r"`capacities=6 0 6`: capacity 0 of worker 1 is outside 1 to 6, the blocks of the chain"),
        ((6, 7), r"capacity 7 of worker 1 is outside 1 to 6"),
        ((2, 3), r"`capacities=2 3` hold 5 of the 6 blocks of the chain; raise them until every block has a worker"),
        ((), r"`capacities=` hold 0 of the 6"),
    ],
)
def test_impossible_capacities(sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_capacities(6, sizes)
    with pytest.raises(UserError, match=message):
        partition(6, sizes, seed=0, round=0)


@given(st.integers(0, 50), st.text("a0:. é\n", max_size=9))
def test_shuffled_is_a_permutation(num: int, key: str) -> None:
    assert sorted(shuffled(num, key)) == list(range(num))
    assert 0 <= keyed_int(key, num) < 2**63


def test_the_plan_of_a_round_is_the_plans_of_its_chains() -> None:
    first, second = partition(4, (3, 2), seed=0, round=1, chain="a"), partition(3, (3, 3), seed=0, round=1, chain="b")
    plan = RoundPlan((first, second))
    assert plan.workers == 2
    assert plan.keys == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2)]
    assert plan.held(1) == (first.blocks[1], (0, 1, 2))
    assert (plan.capacities(0), plan.capacities(1)) == ((3, 3), (2, 3))
    for chain, block in plan.keys:
        assert plan.holders(chain, block) == (first, second)[chain].holders(block)
        for worker in plan.holders(chain, block):
            assert plan.held(worker)[chain][plan.slot(chain, block, worker=worker)] == block
    assert not plan.held_by_all
    assert RoundPlan((second,)).held_by_all
