"""Wire formats: sizes, errors, packing, rounding that is right on average, and numbers that are none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist.errors import UserError
from resist.sync.wire import WIRES, Wire, pack, unpack, wire

# Greatest error as a share of the largest magnitude of a group.
ERRORS = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "int6": 0.5 / 31, "int4": 0.5 / 7, "log4": 0.25, "log8": 0.06}
every = pytest.mark.parametrize("code", WIRES.values(), ids=WIRES)


def numbers(numel: int, code: Wire, seed: int = 0) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return values if code.signed else values.abs()


@every
@pytest.mark.parametrize("numel", [0, 1, 3, 127, 128, 1024, 1025, 5000])
def test_every_number_comes_back_within_the_error_of_its_group(code: Wire, numel: int) -> None:
    before = numbers(numel, code)
    encoded = code.encode(before)
    assert encoded.dtype == torch.uint8
    assert encoded.numel() == code.num_bytes(numel)
    after = code.decode(encoded, numel)
    assert after.shape == before.shape
    for start in range(0, numel, code.group or 1024):
        group = slice(start, start + (code.group or 1024))
        assert (after[group] - before[group]).abs().max() <= ERRORS[code.name] * before[group].abs().max() + 1e-7


@every
def test_zeros_and_the_largest_number_are_exact(code: Wire) -> None:
    assert torch.equal(code.decode(code.encode(torch.zeros(300)), 300), torch.zeros(300))
    largest = torch.tensor([0.0, 4.0, 0.0])
    assert torch.equal(code.decode(code.encode(largest), 3), largest)
    tiny = torch.tensor([1e-38, 0.0])
    assert torch.isfinite(code.decode(code.encode(tiny), 2)).all()


@every
def test_numbers_that_are_none_are_never_lost(code: Wire) -> None:
    for bad in (torch.inf, torch.nan) + ((-torch.inf,) if code.signed else ()):
        before = numbers(3000, code)
        before[1500] = bad
        after = code.decode(code.encode(before), 3000)
        assert not torch.isfinite(after[1500])
        assert torch.isfinite(after[:1024]).all()


@every
def test_stochastic_rounding_is_right_on_average(code: Wire) -> None:
    if code.name in ("fp32", "log8"):
        return  # exact; rounded between logarithms, whose mean is not that of the numbers
    before = numbers(256, code)
    random = torch.Generator().manual_seed(1)
    mean = torch.stack([code.decode(code.encode(before, random), 256) for _ in range(2000)]).mean(0)
    step = 2 * ERRORS[code.name] * before.abs().max()
    assert (mean - before).abs().max() < 0.05 * step


@given(st.sampled_from([4, 6, 8]), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_codes_are_packed_without_loss(bits: int, quads: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (4 * quads,), generator=random, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


def test_second_moments_neither_vanish_nor_turn_negative() -> None:
    before = torch.logspace(-20, 0, 500)
    after = WIRES["log8"].decode(WIRES["log8"].encode(before), 500)
    assert (after > 0).all()
    near = before > 2.0**-42
    assert ((after - before).abs() / before)[near].max() < 0.06


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(UserError, match="`wire=int5` is not known; choose one of fp32"):
        wire("int5")
