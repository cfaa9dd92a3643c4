"""Wire formats: what a tensor of float32 becomes on the way to another worker.

A format is a pair of pure functions between a flat tensor and its bytes, without messages. Numbers are encoded in
groups with one scale each, so that a few large ones do not take the precision of all others:

| format | bits | code | bytes of n numbers |
| --- | ---: | --- | --- |
| fp32 | 32 | as it is | 4 n |
| bf16 | 16 | rounded | 2 n |
| int8, int6, int4 | 8, 6, 4 | whole multiples of its largest magnitude / (127, 31, 7) | n bits / 8 + 4 a group |
| log4 | 4 | sign and 3 bits of exponent: 0 and ± largest x 2^0, 2^-1 .. 2^-6 | n / 2 + 4 a group |
| log8 | 8 | for numbers that are never negative: 0 and largest x 2^(-k / 6), k = 0 .. 254 | n + 4 a group |

Four numbers of int6 are three bytes. `log8` keeps every number within 6 % down to 2^-42 of the largest of its group and
never turns a positive one into zero: it is for second moments, by whose roots a step is divided.

Rounding is to the nearest, or stochastic, so that the mean over many rounds is exact. NaN and inf make their whole
group NaN: they are never lost.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from resist.errors import UserError


@dataclass(frozen=True)
class Wire:
    """A wire format.

    Attributes:
        name: Its name, as in the table above.
        bits: Bits of a number, without scales.
        group: Numbers that share a scale; 0: there are no scales. A multiple of the numbers that are packed together.
        signed: Whether it carries negative numbers.
        codes: Maps groups, divided by their largest magnitude, (groups, group) float32 in -1 .. 1, and uniform draws of
            the same shape (None: round to the nearest) to codes, uint8 below 2^bits.
        values: Maps codes back to -1 .. 1.
    """

    name: str
    bits: int
    group: int = 0
    signed: bool = True
    codes: Callable[[Tensor, Tensor | None], Tensor] | None = None
    values: Callable[[Tensor], Tensor] | None = None

    def num_bytes(self, numel: int) -> int:
        """Return the bytes of `numel` numbers, scales included."""
        if not self.group:
            return numel * self.bits // 8
        groups = -(-numel // self.group)
        return groups * (4 + self.group * self.bits // 8)

    @torch.no_grad()
    def encode(self, numbers: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode numbers.

        Args:
            numbers: (numel,) float32.
            generator: Draws for stochastic rounding; None: round to the nearest.

        Returns:
            (num_bytes(numel),) uint8 on the same device.
        """
        if self.codes is None:
            if self.bits == 32:
                return numbers.contiguous().view(torch.uint8)
            return _to_bf16(numbers, generator).view(torch.uint8)
        groups = -(-numbers.numel() // self.group)
        padded = numbers.new_zeros(groups * self.group)
        padded[: numbers.numel()] = numbers
        padded = padded.view(groups, self.group)
        largest = padded.abs().amax(1, keepdim=True)
        # A group of zeros is divided by one. NaN and inf stay in the scale, and make the whole group NaN again.
        parts = (padded / torch.where(largest > 0, largest, 1.0)).nan_to_num_(0.0).clamp_(-1.0, 1.0)
        draws = None if generator is None else torch.rand(parts.shape, generator=generator, device=parts.device)
        scales = torch.where(largest.isfinite(), largest, torch.nan).flatten().view(torch.uint8)
        return torch.cat([scales, pack(self.codes(parts, draws).flatten(), self.bits)])

    @torch.no_grad()
    def decode(self, encoded: Tensor, numel: int) -> Tensor:
        """Decode numbers.

        Args:
            encoded: (num_bytes(numel),) uint8, from `encode`.
            numel: How many numbers.

        Returns:
            (numel,) float32 on the same device.
        """
        if self.values is None:
            return encoded.view(torch.float32 if self.bits == 32 else torch.bfloat16).float()
        groups = -(-numel // self.group)
        scales = encoded[: 4 * groups].view(torch.float32).unsqueeze(1)
        codes = unpack(encoded[4 * groups :], self.bits).view(groups, self.group)
        return (self.values(codes) * scales).flatten()[:numel]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes of 4, 6 or 8 bits into bytes.

    Args:
        codes: (n,) uint8 below 2^bits; n is even for 4 bits, a multiple of 4 for 6.
        bits: 4, 6 or 8.

    Returns:
        (n * bits / 8,) uint8.
    """
    if bits == 8:
        return codes
    if bits == 4:
        low, high = codes.view(-1, 2).unbind(1)
        return low | high << 4
    first, second, third, fourth = codes.view(-1, 4).unbind(1)
    return torch.stack([first | fourth << 6, second | (fourth & 12) << 4, third | (fourth & 48) << 2], 1).flatten()


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack what `pack` has packed."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], 1).flatten()
    first, second, third = packed.view(-1, 3).unbind(1)
    fourth = first >> 6 | (second >> 6) << 2 | (third >> 6) << 4
    return torch.stack([first & 63, second & 63, third & 63, fourth], 1).flatten()


def _to_bf16(numbers: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round to bf16; stochastically by adding random low bits before they are cut off."""
    if generator is None:
        return numbers.to(torch.bfloat16)
    low = torch.randint(0, 1 << 16, numbers.shape, generator=generator, device=numbers.device, dtype=torch.int32)
    cut = ((numbers.view(torch.int32) + low) & ~0xFFFF).view(torch.float32)
    return torch.where(numbers.isfinite() & cut.isfinite(), cut, numbers).to(torch.bfloat16)


def _rounded(x: Tensor, draws: Tensor | None) -> Tensor:
    return x.round() if draws is None else x.floor().add_(draws < x - x.floor())


def _uniform(name: str, bits: int, group: int) -> Wire:
    most = 2 ** (bits - 1) - 1
    return Wire(
        name,
        bits,
        group,
        codes=lambda parts, draws: (_rounded(parts * most, draws) + most).to(torch.uint8),
        values=lambda codes: (codes.float() - most) / most,
    )


# Of log4: the magnitudes, and between which of them a number is rounded up.
_MAGNITUDES = torch.tensor([0.0, *(2.0**-k for k in range(6, -1, -1))])


def _log4_codes(parts: Tensor, draws: Tensor | None) -> Tensor:
    magnitudes = _MAGNITUDES.to(parts.device)
    size = parts.abs()
    below = (torch.bucketize(size, magnitudes, right=True) - 1).clamp_(0, 6)
    low, high = magnitudes[below], magnitudes[below + 1]
    up = (size - low) / (high - low) > (0.5 if draws is None else draws)
    return ((below + up) | (parts < 0).long() << 3).to(torch.uint8)


def _log4_values(codes: Tensor) -> Tensor:
    sizes = _MAGNITUDES.to(codes.device)[(codes & 7).long()]
    return torch.where(codes > 7, -sizes, sizes)


_STEPS = 6  # of log8, in an octave


def _log8_codes(parts: Tensor, draws: Tensor | None) -> Tensor:
    exponents = _rounded(255 + _STEPS * parts.log2(), draws)
    return torch.where(parts > 0, exponents.clamp(1, 255), 0.0).to(torch.uint8)


def _log8_values(codes: Tensor) -> Tensor:
    return torch.where(codes > 0, torch.exp2((codes.float() - 255) / _STEPS), 0.0)


WIRES = {
    wire.name: wire
    for wire in (
        Wire("fp32", 32),
        Wire("bf16", 16),
        _uniform("int8", 8, 1024),
        _uniform("int6", 6, 512),
        _uniform("int4", 4, 128),
        Wire("log4", 4, 128, codes=_log4_codes, values=_log4_values),
        Wire("log8", 8, 1024, signed=False, codes=_log8_codes, values=_log8_values),
    )
}


def wire(name: str) -> Wire:
    """Return a wire format by name.

    Raises:
        UserError: There is none of this name.
    """
    if name not in WIRES:
        raise UserError(f"`wire={name}` is not known; choose one of {', '.join(WIRES)}")
    return WIRES[name]
