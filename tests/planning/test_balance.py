"""The balance of capacities: as good as trying all of them, in steps, and still under noise."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist.planning.balance import balanced, slowest, slowness


def every_vector(total: int, length: int, workers: int) -> list[tuple[int, ...]]:
    return [v for v in itertools.product(range(1, length + 1), repeat=workers) if sum(v) == total]


@given(slow=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=4), length=st.integers(4, 9), cost=st.floats(0.02, 0.5))
def test_without_bounds_it_is_the_best_of_all_vectors(slow: list[float], length: int, cost: float) -> None:
    first = [-(-length // len(slow))] * len(slow)
    found = balanced([first], [length], [cost], slow, step=length, gain=0)
    assert sum(found[0]) == sum(first)
    assert all(1 <= held <= length for held in found[0])
    best = min(slowest([v], [cost], slow) for v in every_vector(sum(first), length, len(slow)))
    assert slowest(found, [cost], slow) == pytest.approx(best)


@pytest.mark.parametrize("cost", [0.03, 0.1, 0.3])
def test_a_worker_slowed_by_a_third_is_within_a_twentieth_of_the_best(cost: float) -> None:
    """Round by round, each moving a block at most, from measured times."""
    slow, capacities = [1.0, 1.0, 1.3, 1.0], [[6, 6, 6, 6]]
    for _ in range(6):
        steps = [own * (1 + cost * held) for own, held in zip(slow, capacities[0], strict=True)]
        measured = [slowness(s, [cost], [held]) for s, held in zip(steps, capacities[0], strict=True)]
        after = balanced(capacities, [22], [cost], measured)
        assert max(abs(a - b) for a, b in zip(after[0], capacities[0], strict=True)) <= 1
        capacities = after
    best = min(slowest([v], [cost], slow) for v in every_vector(24, 22, 4))
    assert slowest(capacities, [cost], slow) <= 1.05 * best


def test_noise_moves_nothing() -> None:
    assert balanced([[6, 6, 6, 6]], [22], [0.1], [1.0, 1.01, 0.99, 1.01]) == [[6, 6, 6, 6]]


def test_several_chains_and_their_bounds() -> None:
    """The chain whose blocks cost more gives first; nobody gives its last block, or holds more than all."""
    found = balanced([[4, 4], [2, 2]], [6, 4], [0.3, 0.1], [1.0, 2.0], step=6)
    assert [sum(chain) for chain in found] == [8, 4]
    assert all(1 <= held <= length for chain, length in zip(found, (6, 4), strict=True) for held in chain)
    assert slowest(found, [0.3, 0.1], [1.0, 2.0]) < slowest([[4, 4], [2, 2]], [0.3, 0.1], [1.0, 2.0])
    assert balanced([[1, 1]], [2], [0.3], [1.0, 5.0]) == [[1, 1]]
