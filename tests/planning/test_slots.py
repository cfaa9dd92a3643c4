"""Blocks come into their next slots without overwriting what is still read."""

from hypothesis import given
from hypothesis import strategies as st

from resist.planning.slots import Fill, fill_order


@st.composite
def slots(draw: st.DrawFn) -> tuple[list[int], list[int], set[int], set[int]]:
    capacity = draw(st.integers(1, 7))
    blocks = st.lists(st.integers(0, 9), min_size=capacity, max_size=capacity, unique=True)
    before, after = draw(blocks), draw(blocks)
    here = draw(st.sets(st.integers(0, 9)))
    return before, after, here, draw(st.sets(st.sampled_from(before)))


@given(slots())
def test_every_slot_gets_its_block_and_messages_read_what_was_there(
    case: tuple[list[int], list[int], set[int], set[int]],
) -> None:
    before, after, here, sent = case
    present: list[object] = list(before)
    apart: dict[int, object] = {}
    for fill in fill_order(before, after, here, sent):
        arrives = fill.source is None
        assert arrives == (after[fill.slot] not in here or after[fill.slot] not in before)
        value = ("message", after[fill.slot]) if fill.source is None else present[fill.source]
        if fill.apart:
            apart[fill.slot] = value
        else:
            present[fill.slot] = value
    for block in sent:
        assert present[before.index(block)] == block, "a message reads it"
    for slot, value in apart.items():
        present[slot] = value
    for slot, block in enumerate(after):
        assert present[slot] == (block if block in here and block in before else ("message", block))


def test_memory_of_its_own_is_for_what_is_read_until_the_end() -> None:
    def apart(before: list[int], after: list[int], here: set[int], sent: set[int]) -> list[int]:
        return [fill.slot for fill in fill_order(before, after, here, sent) if fill.apart]

    assert apart([1, 2, 3], [2, 3, 4], {2, 3}, set()) == []  # one after another
    assert apart([2, 3, 4], [1, 2, 3], {2, 3}, set()) == []  # the other way round
    assert apart([1, 2, 3], [4, 5, 6], set(), set()) == []
    assert apart([1, 2, 3], [4, 5, 6], set(), {2}) == [1]
    assert len(apart([1, 2, 3], [2, 3, 1], {1, 2, 3}, set())) == 1  # a circle
    assert len(apart([1, 2, 3, 4], [2, 1, 4, 3], {1, 2, 3, 4}, set())) == 2
    assert apart([1, 2], [1, 2], {1, 2}, {1, 2}) == []


def test_other_memory_is_filled_completely() -> None:
    fills = fill_order([1, 2], [2, 3, 1], {1, 2}, {1, 2}, refill=True)
    assert fills == [Fill(0, 1, apart=False), Fill(1, None, apart=False), Fill(2, 0, apart=False)]
