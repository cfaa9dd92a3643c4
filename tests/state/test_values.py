"""Values as JSON and tensors; the devices of an optimizer's state."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resist.state.optimizers import placed
from resist.state.values import decode, encode, join, keys_of, split


@given(st.lists(st.text(max_size=6), min_size=1, max_size=4))
def test_keys_come_apart_as_they_were_joined(parts: list[str]) -> None:
    assert split(join(*parts)) == tuple(parts)


SIMPLE = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
KEYS = st.text(max_size=3) | st.integers() | st.tuples(st.integers(), st.text(max_size=2))
ANY = st.recursive(
    SIMPLE | st.binary(max_size=4) | st.complex_numbers(allow_nan=False) | st.just(torch.half),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner, inner) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@pytest.mark.slow
@given(ANY)
def test_values_come_back_as_they_were(value: object) -> None:
    tensors: dict[str, torch.Tensor] = {}
    written = json.loads(json.dumps(encode(value, tensors, path=("a",), what="a")))
    found = decode(written, tensors)
    assert found == value
    assert repr(found) == repr(value)  # True is not 1, (1,) is not [1]
    assert not tensors


def test_keys_that_read_the_same_are_two() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value = {1: torch.zeros(1), "1": torch.ones(1), "a/b": torch.ones(2)}
    written = encode(value, tensors, path=("x",), what="x")
    assert tensors.keys() == {"x/1", "x/1'", "x/a%2Fb"} == keys_of(written)
    found = decode(written, tensors)
    assert all(torch.equal(found[key], tensor) for key, tensor in value.items())


@pytest.mark.parametrize(
    ("shape", "parameter_shape", "name", "group", "host", "device"),
    [
        ((1,), (1,), "momentum_buffer", {}, False, "meta"),  # of a PReLU
        ((), (), "exp_avg", {}, False, "meta"),  # of a learnable scalar
        ((3, 4), (3, 4), "exp_avg", {}, False, "meta"),
        ((3,), (3, 4), "exp_avg_row", {}, False, "meta"),
        ((), (3, 4), "step", {}, False, "cpu"),
        ((), (), "step", {}, False, "cpu"),
        ((), (3, 4), "step", {"fused": True}, False, "meta"),
        ((), (3, 4), "step", {"capturable": True}, True, "meta"),
        ((), (3, 4), "eta", {}, False, "meta"),  # ASGD's own, as torch's load_state_dict places it
        ((), (3, 4), "mu_product", {}, True, "cpu"),
        ((3, 4), (3, 4), "offloaded", {}, True, "cpu"),
    ],
)
def test_state_goes_where_its_optimizer_expects_it(
    shape: tuple[int, ...], parameter_shape: tuple[int, ...], name: str, group: dict[str, bool], host: bool, device: str
) -> None:
    parameter = nn.Parameter(torch.zeros(parameter_shape, device="meta"))
    found = placed(torch.ones(shape, dtype=torch.float64), name, parameter, group, host=host)
    assert found.device.type == device
    assert found.shape == shape
    assert found.dtype == (torch.float32 if name == "step" and group else torch.float64)
    assert not found.requires_grad


def test_state_has_the_memory_format_of_its_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    value = torch.randn(2, 3, 4, 4)
    found = placed(value, "exp_avg", parameter, {}, host=False)
    assert found.stride() == parameter.stride()
    assert torch.equal(found, value)
