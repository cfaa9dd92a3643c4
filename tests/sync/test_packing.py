"""Packed values: they come back as they were, and their mean over holders."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist.sync.packing import InFlat, Unmovable, Value, can_move, combine, entry_of, pack, unpack

CPU = torch.device("cpu")
NUMBERS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    NUMBERS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)


def back(value: Value) -> Value:
    return unpack(pack(value, CPU), CPU)


@given(VALUES)
def test_numbers_and_containers_come_back_with_their_types(value: Value) -> None:
    assert can_move(value)
    assert repr(back(value)) == repr(sort_keys(value))


def sort_keys(value: Value) -> Value:
    if isinstance(value, dict):
        return {key: sort_keys(value[key]) for key in sorted(value, key=lambda key: (str(type(key)), key))}
    return type(value)(map(sort_keys, value)) if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.tensor(7, dtype=torch.int64),
        torch.randn(3, 1, 2).to(torch.bfloat16),
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(6, dtype=torch.complex64)[::2],
        torch.tensor([True, False]),
        torch.arange(300).to(torch.uint8),
        torch.randn(5).to(torch.float8_e4m3fn),
        torch.empty(0, 3),
    ],
    ids=lambda tensor: f"{tensor.dtype}{tuple(tensor.shape)}",
)
def test_tensors_come_back_bit_for_bit(tensor: torch.Tensor) -> None:
    values = {"a": torch.zeros(1, dtype=torch.int8), "b": [tensor, 0.5]}  # at an odd address
    found = back(values)["b"][0]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (found, tensor)))
    assert str(found) == str(tensor)


def test_markers_come_back() -> None:
    assert back({"a": InFlat(), "b": InFlat(0.5), "c": Unmovable("Preconditioner")}) == {
        "a": InFlat(),
        "b": InFlat(0.5),
        "c": Unmovable("Preconditioner"),
    }


def test_what_cannot_move() -> None:
    for value in (object(), {"a": [object()]}, {(1, 2): 3}, torch.eye(2).to_sparse(), torch.empty(2, device="meta")):
        assert not can_move(value)


def test_digests_tell_values_and_structures_apart() -> None:
    one, same, other = (entry_of(pack({"step": torch.tensor(x)}, CPU)) for x in (1.0, 1.0, 2.0))
    assert one == same
    assert one.content != other.content
    assert (one.size, one.structure) == (other.size, other.structure)
    assert entry_of(pack({"step": 1.0}, CPU)).structure != one.structure


def test_means_over_holders() -> None:
    """Numbers are averaged where they are finite; counters, integers and texts are the owner's."""
    owner = {"row": torch.tensor([1.0, math.inf]), "step": torch.tensor(3.0), "n": 4, "d": 0.5, "name": "a", "q": [1.5]}
    other = {"row": torch.tensor([2.0, math.inf]), "step": torch.tensor(5.0), "n": 8, "d": 1.0, "name": "b", "q": [2.5]}
    found = combine([owner, other])
    assert found["row"].tolist() == [1.5, math.inf]
    assert (found["step"], found["n"], found["d"], found["name"], found["q"]) == (3.0, 4, 0.75, "a", [2.0])
    assert combine([{"x": torch.ones(2)}, {"x": torch.ones(3)}])["x"].shape == (2,)
    half = combine([torch.tensor([1.0], dtype=torch.bfloat16)] * 3)
    assert half.dtype == torch.bfloat16
    assert half.item() == 1.0


def test_what_only_some_holders_have_is_averaged_over_those() -> None:
    """A flat tensor was averaged over all holders, with zeros of the others: it has to be scaled."""
    found = combine([{}, {"weight": {"exp_avg": InFlat(), "row": torch.ones(2)}}, {}, {"bias": {"exp_avg": InFlat()}}])
    assert found["weight"]["exp_avg"] == InFlat(4.0)
    assert torch.equal(found["weight"]["row"], torch.ones(2))
    assert found["bias"]["exp_avg"] == InFlat(4.0)
