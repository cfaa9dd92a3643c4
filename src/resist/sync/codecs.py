"""Codecs: numbers of single precision to the bytes of a wire format, and back; without messages.

`resist.planning.wire` has the formats. Rounding is to the nearest, or stochastic, so that the mean over many rounds is
exact. NaN and inf make their whole group NaN (in bf16 they stay alone, and rounded stochastically both are inf): they
are never lost. On the CPU the work goes in chunks that stay in the cache, but not in small ones: a call takes a
microsecond or two.

The bytes of a tensor are [scales of all groups, 4 bytes each | codes of all groups].
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from resist.planning.wire import FORMATS, Format

PACKED = 64  # neighboring bytes that are packed in the same way; a group has a whole number of rows of them
CHUNK = {"cpu": 1 << 18}  # numbers that are encoded at once; a multiple of every group
_GPU_CHUNK = 1 << 24
REUSED = 1 << 18  # numbers whose stochastic rounding has random bits of its own
MOST_PADDING = 1 << 12  # more than the last group is filled up with
STEPS = 6  # of log8, in an octave
# Groups whose largest magnitude is below this are zero: a quotient by it must not overflow.
_SMALLEST = 2.0**-100


class Code(ABC):
    """How groups of numbers become codes: `levels`, which are as many as there are codes, and their values.

    Attributes:
        signed: Whether it carries negative numbers. Where it does not, a group with one becomes NaN.
    """

    signed = True

    @abstractmethod
    def quantize(self, groups: Tensor, largest: Tensor, fractions: Tensor | None) -> Tensor:
        """Find the level of each number.

        Args:
            groups: (groups, group) the numbers.
            largest: (groups, 1) the largest magnitude of each group; NaN: its codes do not matter.
            fractions: (groups, group) uniform numbers of 0 .. 1 for stochastic rounding; None: to the nearest.
        """

    def to_codes(self, levels: Tensor) -> Tensor:
        """Turn levels, which are not used any more, into codes: uint8 below 2^bits."""
        return levels

    def from_codes(self, codes: Tensor) -> Tensor:
        """Turn codes back into levels."""
        return codes

    @abstractmethod
    def values(self, levels: Tensor, largest: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the numbers that levels stand for, of the shape of the groups; written to `out` if it is given."""


@dataclass(frozen=True)
class Codec:
    """A wire format with its code.

    Attributes:
        format: The format.
        code: How its groups become codes; None: numbers go as they are, or as bf16.
    """

    format: Format
    code: Code | None = None

    @property
    def signed(self) -> bool:
        """Whether it carries negative numbers."""
        return self.code is None or self.code.signed

    def num_bytes(self, numel: int) -> int:
        """See `Format.num_bytes`."""
        return self.format.num_bytes(numel)

    @torch.no_grad()
    def encode(self, numbers: Tensor, random: "RandomBits | None" = None, *, into: Tensor | None = None) -> Tensor:
        """Encode numbers.

        Args:
            numbers: (numel,) float32.
            random: Random bits for stochastic rounding; None: round to the nearest.
            into: (num_bytes(numel),) uint8 to write to. Default: a new tensor.

        Returns:
            (num_bytes(numel),) uint8 on the same device.
        """
        if into is None:
            into = torch.empty(self.num_bytes(numbers.numel()), dtype=torch.uint8, device=numbers.device)
        for start, end, encoded in self.chunks(numbers.numel(), into):
            self.encode_chunk(numbers[start:end], encoded, random, start)
        return into

    @torch.no_grad()
    def decode(self, encoded: Tensor, numel: int, *, into: Tensor | None = None, plus: Tensor | None = None) -> Tensor:
        """Decode numbers.

        Args:
            encoded: (num_bytes(numel),) uint8, from `encode`.
            numel: How many numbers.
            into: (numel,) float32 to write to. Default: a new tensor.
            plus: (numel,) float32 to add to them.

        Returns:
            (numel,) float32 on the same device.
        """
        if into is None:
            into = torch.empty(numel, dtype=torch.float32, device=encoded.device)
        for start, end, chunk in self.chunks(numel, encoded):
            self.decode_chunk(chunk, into[start:end])
            if plus is not None:
                into[start:end] += plus[start:end]
        return into

    def chunks(self, numel: int, encoded: Tensor) -> Iterator[tuple[int, int, tuple[Tensor, Tensor]]]:
        """Iterate over numbers and their bytes.

        Args:
            numel: How many numbers.
            encoded: (num_bytes(numel),) uint8.

        Yields:
            First number and end of a chunk; its scales and its codes.
        """
        size, group, bits = CHUNK.get(encoded.device.type, _GPU_CHUNK), self.format.group, self.format.bits
        num_scales = -(-numel // group) if group else 0
        scales, codes = encoded[: 4 * num_scales], encoded[4 * num_scales :]
        for start in range(0, numel, size):
            end = min(start + size, numel)
            padded = -(-end // group) * group if group else end
            own = scales[4 * start // group : 4 * padded // group] if group else scales
            yield start, end, (own, codes[start * bits // 8 : padded * bits // 8])

    def encode_chunk(
        self,
        numbers: Tensor,
        encoded: tuple[Tensor, Tensor],
        random: "RandomBits | None" = None,
        start: int = 0,
        *,
        lost: Tensor | None = None,
    ) -> None:
        """Encode the numbers of one chunk into its scales and codes.

        Args:
            numbers: (size,) float32.
            encoded: Its scales and its codes.
            random: Random bits for stochastic rounding; None: round to the nearest.
            start: Place of the first number in all of them.
            lost: (size,) to write to what the code loses, perhaps `numbers` themselves.
        """
        scales, codes = encoded
        size = codes.numel() * 8 // self.format.bits
        if self.code is None:
            plain = numbers.contiguous()
            if self.format.bits == 16:
                plain = to_bf16(plain, None if random is None else random.bits(start, size))
            codes.copy_(plain.view(torch.uint8))
            if lost is not None:
                torch.sub(numbers, plain, out=lost)
            return
        whole = numbers
        if numbers.numel() < size:
            whole = numbers.new_zeros(size)
            whole[: numbers.numel()] = numbers
        groups = whole.view(-1, self.format.group)
        largest = groups.abs().amax(1, keepdim=True)  # NaN if there is one
        largest.masked_fill_(~largest.isfinite(), torch.nan).masked_fill_(largest < _SMALLEST, 0.0)
        if not self.signed:
            largest.masked_fill_(groups.amin(1, keepdim=True) < 0, torch.nan)
        scales.copy_(largest.view(-1).view(torch.uint8))
        fractions = None if random is None else random.fractions(start, size).view_as(groups)
        levels = self.code.quantize(groups, largest, fractions)
        if lost is not None:
            torch.sub(numbers, self.code.values(levels, largest).view(-1)[: numbers.numel()], out=lost)
        pack(self.code.to_codes(levels).view(-1), self.format.bits, codes)

    def decode_chunk(self, encoded: tuple[Tensor, Tensor], into: Tensor) -> Tensor:
        """Decode the numbers of one chunk.

        Args:
            encoded: Its scales and its codes.
            into: (size,) float32 to write to.

        Returns:
            `into`.
        """
        scales, codes = encoded
        if self.code is None:
            # Where the bytes begin in the middle of a number, they are copied first.
            whole = codes if codes.storage_offset() % 4 == 0 else codes.clone()
            return into.copy_(whole.view(torch.float32 if self.format.bits == 32 else torch.bfloat16))
        largest = (scales if scales.storage_offset() % 4 == 0 else scales.clone()).view(torch.float32).unsqueeze(1)
        levels = self.code.from_codes(unpack(codes, self.format.bits).view(-1, self.format.group))
        if into.numel() == levels.numel():
            self.code.values(levels, largest, into.view(levels.shape))
            return into
        return into.copy_(self.code.values(levels, largest).view(-1)[: into.numel()])


class RandomBits:
    """Random bits for stochastic rounding.

    Numbers far apart get the same ones: each of them is rounded up as often as it should, whatever others do.

    Args:
        numel: How many numbers are rounded.
        device: Their device.
        generator: Draws them.
    """

    def __init__(self, numel: int, device: torch.device, generator: torch.Generator) -> None:
        size = min(numel + MOST_PADDING, REUSED)
        words = torch.empty(size // 4, dtype=torch.int64, device=device)  # each has four times 16 bits
        self._bits = words.random_(-(2**63), None, generator=generator).view(torch.int16).int().add_(0x8000)
        self._fractions: Tensor | None = None

    def bits(self, start: int, numel: int) -> Tensor:
        """Return 16 random bits for each number: (numel,) int32."""
        return self._part(self._bits, start, numel)

    def fractions(self, start: int, numel: int) -> Tensor:
        """Return uniform numbers of 0 .. 1: (numel,) float32."""
        if self._fractions is None:
            self._fractions = self._bits.float().add_(0.5).mul_(2.0**-16)
        return self._part(self._fractions, start, numel)

    @staticmethod
    def _part(drawn: Tensor, start: int, numel: int) -> Tensor:
        start %= drawn.numel()
        if start + numel > drawn.numel():
            drawn = drawn.repeat(-(-(start + numel) // drawn.numel()))
        return drawn[start : start + numel]


def pack(codes: Tensor, bits: int, into: Tensor | None = None) -> Tensor:
    """Pack codes of 4, 6 or 8 bits into bytes.

    Args:
        codes: (n,) uint8 below 2^bits; n is a multiple of 2 PACKED for 4 bits, of 4 PACKED for 6.
        bits: 4, 6 or 8.
        into: (n * bits / 8,) uint8 to write to. Default: a new tensor.

    Returns:
        (n * bits / 8,) uint8.
    """
    if into is None:
        into = codes.new_empty(codes.numel() * bits // 8)
    if bits == 8:
        into.copy_(codes)
    elif bits == 4:  # the first half of a row has the low bits of its bytes
        low, high = codes.view(-1, 2, PACKED).unbind(1)
        torch.bitwise_or(low, high << 4, out=into.view(-1, PACKED))
    else:  # the last quarter of a row has the upper two bits of the others
        first, second, third, fourth = codes.view(-1, 4, PACKED).unbind(1)
        parts = into.view(-1, 3, PACKED)
        torch.bitwise_or(first, fourth << 6, out=parts[:, 0])
        torch.bitwise_or(second, (fourth & 12) << 4, out=parts[:, 1])
        torch.bitwise_or(third, (fourth & 48) << 2, out=parts[:, 2])
    return into


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack what `pack` has packed."""
    if bits == 8:
        return packed
    if bits == 4:
        rows = packed.view(-1, PACKED)
        return torch.stack([rows & 15, rows >> 4], 1).view(-1)
    parts = packed.view(-1, 3, PACKED)
    codes = packed.new_empty(len(parts), 4, PACKED)
    torch.bitwise_and(parts, 63, out=codes[:, :3])
    first, second, third = (parts >> 6).unbind(1)
    torch.bitwise_or(first | second << 2, third << 4, out=codes[:, 3])
    return codes.view(-1)


def to_bf16(numbers: Tensor, bits: Tensor | None) -> Tensor:
    """Round to bf16; with random bits stochastically, by adding them before the low bits are cut off.

    Args:
        numbers: (numel,) float32.
        bits: (numel,) int32 of 16 random bits; None: round to the nearest.
    """
    if bits is None:
        return numbers.to(torch.bfloat16)
    finite = numbers.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # sums with NaN could overflow
    return round_to_bf16(finite, bits, torch.empty_like(finite, dtype=torch.bfloat16))


def round_to_bf16(numbers: Tensor, bits: Tensor, into: Tensor) -> Tensor:
    """Round stochastically to bf16.

    Args:
        numbers: (numel,) float32 without NaN, which are not used any more.
        bits: (numel,) int32 of 16 random bits.
        into: (numel,) bfloat16 to write to.

    Returns:
        `into`.
    """
    into.view(torch.int16).copy_(numbers.view(torch.int32).add_(bits).bitwise_right_shift_(16))
    return into


class Linear(Code):
    """Whole multiples of a fraction of the largest magnitude: levels are -most .. most, as float32.

    Args:
        bits: Bits of a code. Those of 8 are signed integers; others are shifted to be positive, since they are packed.
    """

    def __init__(self, bits: int) -> None:
        self._most = 2 ** (bits - 1) - 1
        self._shift = 0 if bits == 8 else self._most

    def quantize(self, groups: Tensor, largest: Tensor, fractions: Tensor | None) -> Tensor:
        # A group of zeros has zeros, and one with NaN anything: its scale makes it NaN again.
        scaled = groups * torch.where(largest > 0, self._most / largest, 0.0)
        if fractions is None:
            return scaled.round_()  # the largest magnitude is at most a few units in the last place above `most`
        return scaled.add_(fractions).floor_().clamp_(-self._most, self._most)

    def to_codes(self, levels: Tensor) -> Tensor:
        return (levels.add_(self._shift) if self._shift else levels).to(torch.int8).view(torch.uint8)

    def from_codes(self, codes: Tensor) -> Tensor:
        levels = codes.view(torch.int8).float()
        return levels.sub_(self._shift) if self._shift else levels

    def values(self, levels: Tensor, largest: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.mul(levels, largest / self._most, out=out)


class Logarithmic(Code):
    """Codes that are positions in a table of shares of the largest magnitude; levels are codes."""

    table: tuple[float, ...]

    def values(self, levels: Tensor, largest: Tensor, out: Tensor | None = None) -> Tensor:
        table = _table(self.table, levels.device)
        shares = table.index_select(0, levels.reshape(-1).int()).view(levels.shape)
        return torch.mul(shares, largest, out=out)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


class Log4(Logarithmic):
    """A sign and the exponents 2^-6 .. 2^0, or zero."""

    _magnitudes = (0.0, *(2.0**-k for k in range(6, -1, -1)))
    table = (*_magnitudes, *(-magnitude for magnitude in _magnitudes))

    def quantize(self, groups: Tensor, largest: Tensor, fractions: Tensor | None) -> Tensor:
        factor = torch.where(largest > 0, 1.0 / largest, 0.0)
        parts = (groups * factor).nan_to_num_(0.0).clamp_(-1.0, 1.0)
        size = parts.abs()
        # The exponent of a number is its position: 2^-6 .. 2^0 are 1 .. 7, and below 2^-6 the step is 2^-6 itself.
        below = (size.view(torch.int32) >> 23).sub_(120).clamp_(0, 7)
        step = (below.clamp(min=1).add_(120) << 23).view(torch.float32)
        rest = size.div_(step).sub_(below.clamp(max=1))
        codes = below.add_(rest > (0.5 if fractions is None else fractions)).clamp_(max=7)
        sign = (parts.view(torch.int32) >> 28) & 8
        return codes.add_(sign).to(torch.int8).view(torch.uint8)


class Log8(Logarithmic):
    """Equal steps of the logarithm, for numbers that are never negative."""

    signed = False
    table = (0.0, *(2.0 ** ((code - 255) / STEPS) for code in range(1, 256)))

    def quantize(self, groups: Tensor, largest: Tensor, fractions: Tensor | None) -> Tensor:
        exponents = groups.log2().sub_(largest.log2()).mul_(STEPS).add_(255)
        if fractions is None:
            codes = exponents.round_()
        else:
            # Up with the probability with which the mean of the two values is the number.
            codes = exponents.floor()
            up = exponents.sub_(codes).mul_(1 / STEPS).exp2_().sub_(1).mul_(1 / (2 ** (1 / STEPS) - 1))
            codes += up > fractions
        return codes.clamp_(1, 255).mul_(groups > 0).nan_to_num_(0.0).to(torch.int32).to(torch.uint8)


CODECS = {
    codec.format.name: codec
    for codec in (
        Codec(FORMATS["fp32"]),
        Codec(FORMATS["bf16"]),
        *(Codec(FORMATS[name], Linear(FORMATS[name].bits)) for name in ("int8", "int6", "int4")),
        Codec(FORMATS["log4"], Log4()),
        Codec(FORMATS["log8"], Log8()),
    )
}
