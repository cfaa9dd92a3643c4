"""Batches in order and shares of them."""

import itertools

import pytest

from resist.data.spans import Share, spans


@pytest.mark.parametrize("num", range(12))
@pytest.mark.parametrize("size", [1, 2, 4, 11])
def test_every_image_comes_once_and_none_is_alone(num: int, size: int) -> None:
    batches = spans(num, size)
    assert list(itertools.chain(*batches)) == list(range(num))
    assert all(len(batch) == size for batch in batches[:-1])
    if size > 1 and num > 1:
        assert all(2 <= len(batch) <= size + 1 for batch in batches)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_shares_are_all_batches_in_order(count: int) -> None:
    batches = spans(23, 4)
    shares = [Share(index, count).of(batches) for index in range(count)]
    assert list(itertools.chain(*shares)) == batches
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
