"""Codecs: numbers of single precision to the bytes of a wire format, and back; without messages.

`resist.planning.wire` has the formats. Rounding is to the nearest, or stochastic, so that the mean over many rounds is
exact. NaN and inf make their whole group NaN (in bf16 they stay alone, and rounded stochastically both are inf): they
are never lost. On the CPU the work goes in chunks that stay in the cache, but not in small ones: a call takes a
microsecond or two.

The bytes of a tensor are [scales of all groups, 4 bytes each | codes of all groups].
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from resist.planning.wire import FORMATS, Format

PACKED = 64  # neighboring bytes that are packed in the same way; a group has a whole number of rows of them
CHUNK = {"cpu": 1 << 18}  # numbers that are encoded at once; a multiple of every group
_GPU_CHUNK = 1 << 24
# Groups whose largest magnitude is below this are zero: a quotient by it must not overflow.
_SMALLEST = 2.0**-100


@dataclass(frozen=True)
class Codec:
    """A wire format with its code.

    Attributes:
        format: The format.
        signed: Whether it carries negative numbers. Where it does not, a group with one becomes NaN.
        quantize: Maps groups of numbers (groups, group), their largest magnitudes (groups, 1), and draws for stochastic
            rounding (None: to the nearest) to codes, uint8 below 2^bits.
        dequantize: Maps codes (groups, group) and the largest magnitudes back to numbers.
    """

    format: Format
    signed: bool = True
    quantize: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None = None
    dequantize: Callable[[Tensor, Tensor], Tensor] | None = None

    def num_bytes(self, numel: int) -> int:
        """See `Format.num_bytes`."""
        return self.format.num_bytes(numel)

    @torch.no_grad()
    def encode(
        self, numbers: Tensor, generator: torch.Generator | None = None, *, into: Tensor | None = None
    ) -> Tensor:
        """Encode numbers.

        Args:
            numbers: (numel,) float32.
            generator: Draws for stochastic rounding; None: round to the nearest.
            into: (num_bytes(numel),) uint8 to write to. Default: a new tensor.

        Returns:
            (num_bytes(numel),) uint8 on the same device.
        """
        if into is None:
            into = torch.empty(self.num_bytes(numbers.numel()), dtype=torch.uint8, device=numbers.device)
        for start, end, encoded in self.chunks(numbers.numel(), into):
            self.encode_chunk(numbers[start:end], encoded, generator)
        return into

    @torch.no_grad()
    def decode(self, encoded: Tensor, numel: int, *, into: Tensor | None = None) -> Tensor:
        """Decode numbers.

        Args:
            encoded: (num_bytes(numel),) uint8, from `encode`.
            numel: How many numbers.
            into: (numel,) float32 to write to. Default: a new tensor.

        Returns:
            (numel,) float32 on the same device.
        """
        if into is None:
            into = torch.empty(numel, device=encoded.device)
        for start, end, chunk in self.chunks(numel, encoded):
            into[start:end] = self.decode_chunk(chunk, end - start)
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

    def encode_chunk(self, numbers: Tensor, encoded: tuple[Tensor, Tensor], generator: torch.Generator | None) -> None:
        """Encode the numbers of one chunk into its scales and codes."""
        scales, codes = encoded
        if self.quantize is None:
            plain = numbers.contiguous()
            if self.format.bits == 16:
                plain = _to_bf16(plain, generator)
            codes.copy_(plain.view(torch.uint8))
            return
        size = codes.numel() * 8 // self.format.bits
        if numbers.numel() < size:
            numbers, short = numbers.new_zeros(size), numbers
            numbers[: short.numel()] = short
        groups = numbers.view(-1, self.format.group)
        largest = groups.abs().amax(1, keepdim=True)  # NaN if there is one
        largest.masked_fill_(~largest.isfinite(), torch.nan).masked_fill_(largest < _SMALLEST, 0.0)
        if not self.signed:
            largest.masked_fill_(groups.amin(1, keepdim=True) < 0, torch.nan)
        scales.copy_(largest.view(-1).view(torch.uint8))
        draws = None if generator is None else _draws(size, numbers.device, generator).view_as(groups)
        pack(self.quantize(groups, largest, draws).view(-1), self.format.bits, codes)

    def decode_chunk(self, encoded: tuple[Tensor, Tensor], numel: int) -> Tensor:
        """Decode the numbers of one chunk."""
        scales, codes = encoded
        if self.dequantize is None:
            # Where the bytes begin in the middle of a number, they are copied first.
            whole = codes if codes.storage_offset() % 4 == 0 else codes.clone()
            return whole.view(torch.float32 if self.format.bits == 32 else torch.bfloat16).float()
        largest = (scales if scales.storage_offset() % 4 == 0 else scales.clone()).view(torch.float32).unsqueeze(1)
        groups = unpack(codes, self.format.bits).view(-1, self.format.group)
        return self.dequantize(groups, largest).view(-1)[:numel]


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


def _draws(numel: int, device: torch.device, generator: torch.Generator) -> Tensor:
    """Draw 16 random bits for each number: (numel,) int16. One call of the generator gives four of them."""
    words = torch.empty(-(-numel // 4), dtype=torch.int64, device=device)
    return words.random_(-(2**63), None, generator=generator).view(torch.int16)[:numel]


def _fractions(draws: Tensor) -> Tensor:
    """Uniform numbers in 0 .. 1 from random bits."""
    return draws.float().add_(32768.5).mul_(2.0**-16)


def _to_bf16(numbers: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round to bf16; stochastically by adding random low bits before they are cut off."""
    if generator is None:
        return numbers.to(torch.bfloat16)
    numbers = numbers.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)  # sums with NaN could overflow
    bits = _draws(numbers.numel(), numbers.device, generator).int().add_(0x8000).add_(numbers.view(torch.int32))
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def _linear(name: str) -> Codec:
    """The code of whole multiples."""
    format = FORMATS[name]
    most = 2 ** (format.bits - 1) - 1
    # Codes of 8 bits are signed integers. Others are shifted to be positive, since they are packed.
    shift = 0 if format.bits == 8 else most

    def quantize(groups: Tensor, largest: Tensor, draws: Tensor | None) -> Tensor:
        # A group of zeros has zeros, and one with NaN anything: its scale makes it NaN again.
        factor = torch.where(largest > 0, most / largest, 0.0)
        scaled = groups * factor
        codes = scaled.round_() if draws is None else scaled.add_(_fractions(draws)).floor_()
        return codes.add_(shift).clamp_(shift - most, shift + most).to(torch.int8).view(torch.uint8)

    def dequantize(codes: Tensor, largest: Tensor) -> Tensor:
        return codes.view(torch.int8).float().sub_(shift).mul_(largest / most)

    return Codec(format, quantize=quantize, dequantize=dequantize)


@cache
def _table(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def _look_up(values: tuple[float, ...], positions: Tensor) -> Tensor:
    table = _table(values, positions.device)
    return table.index_select(0, positions.reshape(-1).int()).view(positions.shape)


# Of log4: the magnitudes, and the values of all codes.
_MAGNITUDES = (0.0, *(2.0**-k for k in range(6, -1, -1)))
_LOG4_VALUES = (*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES))


def _log4_quantize(groups: Tensor, largest: Tensor, draws: Tensor | None) -> Tensor:
    factor = torch.where(largest > 0, 1.0 / largest, 0.0)
    parts = (groups * factor).nan_to_num_(0.0).clamp_(-1.0, 1.0)
    size = parts.abs()
    # The exponent of a number is its position: 2^-6 .. 2^0 are 1 .. 7, and below 2^-6 the step is 2^-6 itself.
    below = (size.view(torch.int32) >> 23).sub_(120).clamp_(0, 7)
    step = (below.clamp(min=1).add_(120) << 23).view(torch.float32)
    rest = size.div_(step).sub_(below.clamp(max=1))
    codes = below.add_(rest > (0.5 if draws is None else _fractions(draws))).clamp_(max=7)
    sign = (parts.view(torch.int32) >> 28) & 8
    return codes.add_(sign).to(torch.int8).view(torch.uint8)


def _log4_dequantize(codes: Tensor, largest: Tensor) -> Tensor:
    return _look_up(_LOG4_VALUES, codes).mul_(largest)


_STEPS = 6  # of log8, in an octave
_LOG8_VALUES = (0.0, *(2.0 ** ((code - 255) / _STEPS) for code in range(1, 256)))


def _log8_quantize(groups: Tensor, largest: Tensor, draws: Tensor | None) -> Tensor:
    exponents = groups.log2().sub_(largest.log2()).mul_(_STEPS).add_(255)
    if draws is None:
        codes = exponents.round_()
    else:
        # Up with the probability with which the mean of the two values is the number.
        codes = exponents.floor()
        up = exponents.sub_(codes).mul_(1 / _STEPS).exp2_().sub_(1).mul_(1 / (2 ** (1 / _STEPS) - 1))
        codes += up > _fractions(draws)
    return codes.clamp_(1, 255).mul_(groups > 0).nan_to_num_(0.0).to(torch.int32).to(torch.uint8)


def _log8_dequantize(codes: Tensor, largest: Tensor) -> Tensor:
    return _look_up(_LOG8_VALUES, codes).mul_(largest)


CODECS = {
    codec.format.name: codec
    for codec in (
        Codec(FORMATS["fp32"]),
        Codec(FORMATS["bf16"]),
        *map(_linear, ("int8", "int6", "int4")),
        Codec(FORMATS["log4"], quantize=_log4_quantize, dequantize=_log4_dequantize),
        Codec(FORMATS["log8"], signed=False, quantize=_log8_quantize, dequantize=_log8_dequantize),
    )
}
