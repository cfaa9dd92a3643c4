"""Wire formats: sizes, errors, packing, rounding that is right on average, and numbers that are none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resist.errors import UserError
from resist.planning.wire import CHOICES, WIRES, Wire, as_wire
from resist.sync import codecs
from resist.sync.codecs import CODECS, PACKED, Codec, RandomBits, pack, unpack
from resist.sync.compressed_mean import CompressedMean, Feedback
from resist.sync.local import Local
from waits import fake_gpu

# Greatest error as a share of the largest magnitude of a group.
ERRORS = {"fp32": 0.0, "bf16": 2**-8, "int8": 0.5 / 127, "int6": 0.5 / 31, "int4": 0.5 / 7, "log4": 0.25, "log8": 0.06}
every = pytest.mark.parametrize("code", CODECS.values(), ids=CODECS)


def random_bits(numel: int, seed: int = 0) -> RandomBits:
    return RandomBits(numel, torch.device("cpu"), torch.Generator().manual_seed(seed))


def numbers(numel: int, code: Codec, seed: int = 0) -> torch.Tensor:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    return values if code.signed else values.abs()


@every
@pytest.mark.parametrize("numel", [0, 1, 3, 127, 128, 1024, 1025, 5000])
def test_every_number_comes_back_within_the_error_of_its_group(code: Codec, numel: int) -> None:
    before = numbers(numel, code)
    encoded = code.encode(before)
    assert encoded.dtype == torch.uint8
    assert encoded.numel() == code.num_bytes(numel)
    after = code.decode(encoded, numel)
    assert after.shape == before.shape
    for start in range(0, numel, code.format.group or 1024):
        group = slice(start, start + (code.format.group or 1024))
        assert (after[group] - before[group]).abs().max() <= ERRORS[code.format.name] * before[group].abs().max() + 1e-7


@every
def test_zeros_and_the_largest_number_are_exact(code: Codec) -> None:
    assert torch.equal(code.decode(code.encode(torch.zeros(300)), 300), torch.zeros(300))
    largest = torch.tensor([0.0, 4.0, 0.0])
    assert torch.equal(code.decode(code.encode(largest), 3), largest)
    tiny = torch.tensor([1e-38, 0.0])
    assert torch.isfinite(code.decode(code.encode(tiny), 2)).all()


@every
def test_numbers_that_are_none_are_never_lost(code: Codec) -> None:
    patterns = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    for bad in patterns if code.signed else ():  # of NaN: some become other numbers if something is added to their bits
        values = torch.full((1024,), float("nan"))
        values.view(torch.int32).fill_(int(bad.view(torch.int32)))
        for random in (None, random_bits(1024)):
            assert not code.decode(code.encode(values, random), 1024).isfinite().any()
    for bad in (torch.inf, torch.nan) + ((-torch.inf,) if code.signed else ()):
        before = numbers(3000, code)
        before[1500] = bad
        for random in (None, random_bits(3000)):
            after = code.decode(code.encode(before, random), 3000)
            assert not torch.isfinite(after[1500])
            assert torch.isfinite(after[:1024]).all()


@every
def test_stochastic_rounding_is_right_on_average(code: Codec) -> None:
    before = numbers(256, code)
    copies = before.repeat(2000)  # whole groups, all with the same largest numbers
    mean = torch.zeros(256)
    for seed in range(4):
        encoded = code.encode(copies, random_bits(copies.numel(), seed))
        mean += code.decode(encoded, copies.numel()).view(2000, 256).mean(0) / 4
    step = 2 * ERRORS[code.format.name] * before.abs().max()
    assert (mean - before).abs().max() <= 0.05 * step + 1e-6


@given(st.sampled_from([4, 6, 8]), st.integers(0, 50), st.integers(0, 2**32 - 1))
def test_codes_are_packed_without_loss(bits: int, rows: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (4 * PACKED * rows,), generator=random, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits), codes)


def test_second_moments_neither_vanish_nor_turn_negative() -> None:
    before = torch.logspace(-20, 0, 500)
    after = CODECS["log8"].decode(CODECS["log8"].encode(before), 500)
    assert (after > 0).all()
    near = before > 2.0**-42
    assert ((after - before).abs() / before)[near].max() < 0.06


@every
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "random"])
def test_chunks_do_not_show(code: Codec, random: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = numbers(5000, code)
    before[4000] = torch.nan
    encoded = []
    for size in (1024, 1 << 16):
        monkeypatch.setitem(codecs.CHUNK, "cpu", size)
        encoded.append(code.encode(before, random_bits(5000) if random else None))
    assert torch.equal(*encoded)
    assert torch.equal(code.decode(encoded[0], 5000).isnan(), code.decode(encoded[1], 5000).isnan())


def test_random_bits_are_used_again_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a GPU are larger than what random bits are drawn for."""
    code, numel = CODECS["int8"], codecs.REUSED + 5000
    before = numbers(numel, code)
    encoded = []
    for size in (1 << 16, 1 << 20):
        monkeypatch.setitem(codecs.CHUNK, "cpu", size)
        encoded.append(code.encode(before, random_bits(numel)))
    assert torch.equal(*encoded)
    bits = random_bits(numel)
    assert torch.equal(bits.bits(codecs.REUSED, 5000), bits.bits(0, 5000))


def test_bytes_that_begin_anywhere_are_decoded() -> None:
    """The bytes of a block may follow others in a message."""
    for code in CODECS.values():
        before = numbers(1500, code)
        encoded = code.encode(before)
        message = torch.cat([torch.zeros(3, dtype=torch.uint8), encoded])
        assert torch.equal(code.decode(message[3:], 1500), code.decode(encoded, 1500))


def test_negative_second_moments_are_not_hidden() -> None:
    before = torch.rand(2000)
    before[10] = -0.1
    after = CODECS["log8"].decode(CODECS["log8"].encode(before), 2000)
    assert after[:1024].isnan().all()
    assert after[1024:].isfinite().all()


@given(st.sampled_from(list(CODECS.values())), st.integers(0, 20000), st.integers(1, 9))
def test_pieces_are_whole_groups_and_cost_nothing(code: Codec, numel: int, workers: int) -> None:
    pieces = code.format.pieces(numel, workers)
    assert len(pieces) == workers
    assert sum(pieces) == numel
    assert sum(map(code.num_bytes, pieces)) == code.num_bytes(numel)
    assert max(pieces) - min(pieces[:1]) == 0


@every
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "random"])
def test_codes_do_not_wait_for_a_gpu(code: Codec, random: bool) -> None:
    with fake_gpu() as waits:
        values = torch.empty(3000, device="cuda")
        generator = torch.Generator().manual_seed(0)

        def bits() -> RandomBits | None:
            return RandomBits(3000, values.device, generator) if random else None

        code.decode(code.encode(values, bits()), 3000)
        waits.clear()  # of tables, once
        after = code.decode(code.encode(values, bits()), 3000)
        assert after.device.type == "cuda"
        assert not waits.found
        assert not waits.copies


@pytest.mark.parametrize("changes", [False, True])
def test_a_compressed_mean_does_not_wait_for_a_gpu(changes: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    with fake_gpu() as waits:
        numbers = {worker: torch.empty(5000, device="cuda") for worker in range(3)}
        feedback = {worker: Feedback(own.clone()) for worker, own in numbers.items()} if changes else None
        mean = CompressedMean(
            Local(3), CODECS["int8"], numbers, "shared", dropped={1}, draws=lambda _: generator, feedback=feedback
        )
        mean.advance()
        mean.finish()
        assert not waits.found
        assert not waits.copies


def test_one_name_stands_for_three_formats() -> None:
    assert as_wire("int8") == Wire(shared="int8", blocks="bf16", state="int8")
    assert as_wire(Wire(shared="log4")).shared == "log4"
    assert not as_wire("fp32").compresses
    for wire in WIRES.values():
        for part, choices in CHOICES.items():
            assert getattr(wire, part) in choices


def test_unknown_formats_are_named() -> None:
    with pytest.raises(UserError, match="`wire='int5'` is not one of fp32"):
        as_wire("int5")
    with pytest.raises(UserError, match="`wire`: blocks='log4' is not one of fp32, bf16, int8, int6"):
        Wire(blocks="log4")
