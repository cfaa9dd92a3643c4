"""Fragments: every number once, one after another, and bad numbers refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resist.errors import UserError
from resist.job import Job
from resist.planning.fragments import STRIPS, fragment_sizes, fragment_strips, fragment_times
from resist.planning.strategy import ddp, resist
from resist.planning.wire import Wire
from wired import single


@given(st.integers(0, 9000), st.integers(1, 12))
def test_strips_have_every_number_once(numel: int, fragments: int) -> None:
    dealt = fragment_strips(numel, fragments)
    assert len(dealt) == fragments
    ordered = sorted(strip for strips in dealt for strip in strips)
    assert [number for start, end in ordered for number in range(start, end)] == list(range(numel))
    assert all(len(strips) <= STRIPS for strips in dealt)
    assert sum(fragment_sizes(numel, fragments)) == numel
    if numel >= 16 * 8 * fragments:
        assert all(strips[-1][1] - strips[0][0] > numel / 2 for strips in dealt if fragments < 5)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 12))
def test_fragments_follow_each_other_within_the_round(steps: int, fragments: int, delay: int) -> None:
    if steps < 2 * fragments or delay >= steps // fragments:
        with pytest.raises(UserError, match=r"needs at least|is too long"):
            fragment_times(steps, fragments, delay)
        return
    before = 0
    for times in fragment_times(steps, fragments, delay):
        assert 1 <= times.begin < times.advance <= times.finish <= steps
        assert times.finish == times.begin + delay
        assert times.begin >= before
        before = times.finish


def test_bad_numbers_are_refused_in_one_line() -> None:
    for wire, message in (
        ({"fragments": -1}, "`fragments=-1`; must be at least 0"),
        ({"fragments": 2, "delay": 0}, "`delay=0`; must be at least 1"),
        ({"fragments": 2.5}, "`fragments=2.5` is not a whole number"),
        ({"delay": 2}, "`delay=2` has no effect without `fragments`"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(")):
            Wire(**wire)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"needs at least 10 steps in a round, .* give `fragments=3` or fewer"):
        Job(single, resist(2, 6), wire=Wire(fragments=5), example=False)
    with pytest.raises(UserError, match=r"`delay=3` is too long: .* give at most 2"):
        Job(single, resist(2, 6), wire=Wire(fragments=2, delay=3), example=False)
    with pytest.raises(UserError, match="leave out"):
        Job(single, ddp(1), wire=Wire(fragments=2), example=False)
