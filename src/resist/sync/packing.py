"""Packing: nested values (tensors, numbers, lists, dictionaries) as one tensor of bytes, and their mean over holders.

A packed value is a header in JSON, which describes the structure, and the bytes of all tensors and numbers in it:

    [length of the header, 8 bytes | header | data]
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor

from resist.sync.averaging import mean_into

# Tensor, int, float, bool, str, None, `InFlat`, `Unmovable`; lists, tuples and dictionaries (keys: str, int) of them.
Value = Any
LENGTH_BYTES = 8
_INT64 = range(-(2**63), 2**63)


@dataclass(frozen=True)
class InFlat:
    """In place of a value that is in a flat tensor already.

    Attributes:
        scale: Factor for the value in the flat tensor, which is a mean over holders that include some without a value.
    """

    scale: float = 1.0


@dataclass(frozen=True)
class Unmovable:
    """In place of a value that cannot move.

    Attributes:
        kind: Description of its type.
    """

    kind: str


@dataclass(frozen=True)
class Entry:
    """Description of a packed value, short enough to be compared between processes.

    Attributes:
        size: Bytes of the packed value.
        structure: Digest of its header: values with equal ones have equal sizes.
        content: Digest of all of it.
    """

    size: int
    structure: str
    content: str


def can_move(value: Value) -> bool:
    """Check that a value can be packed.

    Args:
        value: The value.

    Returns:
        False if a part of it is neither a dense tensor in memory, nor a Python number, text or None.
    """
    if isinstance(value, Tensor):
        plain = type(value) in (Tensor, torch.nn.Parameter)
        return plain and value.layout == torch.strided and not value.is_quantized and not value.is_meta
    if isinstance(value, dict):
        items = cast(dict[object, Value], value)
        return all(type(key) in (str, int) and can_move(item) for key, item in items.items())
    if type(value) in (list, tuple):
        return all(map(can_move, value))
    return value is None or type(value) in (bool, int, float, str, InFlat, Unmovable)


@torch.no_grad()
def pack(value: Value, device: torch.device) -> Tensor:
    """Pack a value. Waits for the device of its tensors.

    Args:
        value: A value that can move.
        device: Device that tensors on it return to; others return to the CPU.

    Returns:
        The packed value, (size,) uint8 on the CPU.
    """
    data: list[Tensor] = []
    header = json.dumps(_header(value, data, device), separators=(",", ":")).encode()
    prefix = len(header).to_bytes(LENGTH_BYTES, "big") + header
    return torch.cat([_from_bytes(prefix), *_on_cpu(data)])


def unpack(packed: Tensor, device: torch.device) -> Value:
    """Reverse `pack`.

    Args:
        packed: Packed value, (size,) uint8.
        device: Device for the tensors that were on the device given to `pack`.

    Returns:
        The value; its tensors have memory of their own.
    """
    packed = packed.cpu()
    end = LENGTH_BYTES + int.from_bytes(packed[:LENGTH_BYTES].numpy().tobytes(), "big")
    data = packed[end:]
    position = 0

    def take(num_bytes: int) -> Tensor:
        nonlocal position
        position += num_bytes
        return data[position - num_bytes : position].clone()  # at an address that fits every dtype

    return _value(json.loads(packed[LENGTH_BYTES:end].numpy().tobytes()), take, device)


def entry_of(packed: Tensor) -> Entry:
    """Describe a packed value.

    Args:
        packed: Packed value, (size,) uint8 on the CPU.

    Returns:
        Its size and digests.
    """
    content = packed.numpy().tobytes()
    end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "big")
    return Entry(len(content), _digest(content[:end]), _digest(content))


def combine(values: Sequence[Value]) -> Value:
    """Combine the values of several holders.

    Floating-point numbers become their mean, where they are finite and of equal shape; counters (single numbers that
    are whole) and everything else are those of the first holder. What only some holders have is combined over those.

    Args:
        values: The value of each holder, the owner's first.

    Returns:
        The combined value. Tensors that were averaged are new ones.
    """
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        return first
    if isinstance(first, dict):
        dictionaries = cast(Sequence[dict[str | int, Value]], values)
        keys = dict.fromkeys(key for dictionary in dictionaries for key in dictionary)
        return {key: _combine_entries([d[key] for d in dictionaries if key in d], len(values)) for key in keys}
    if isinstance(first, list | tuple):
        sequences = cast(Sequence[Sequence[Value]], values)
        if len(set(map(len, sequences))) > 1:
            return sequences[0]
        combined: list[Value] = [combine(items) for items in zip(*sequences, strict=True)]
        return combined if type(sequences[0]) is list else tuple(combined)
    if isinstance(first, Tensor):
        return _mean(cast(Sequence[Tensor], values))
    if isinstance(first, float) and not all(value.is_integer() for value in values):
        return math.fsum(values) / len(values) if all(map(math.isfinite, values)) and len(set(values)) > 1 else first
    return first


def scaled(value: Value, scale: float) -> Value:
    """Multiply the scale of all values that are in flat tensors.

    Args:
        value: Any value.
        scale: The factor.

    Returns:
        The value, with other `InFlat` markers.
    """
    if isinstance(value, InFlat):
        return InFlat(value.scale * scale)
    if isinstance(value, dict):
        return {key: scaled(item, scale) for key, item in cast(dict[str | int, Value], value).items()}
    return value


def _combine_entries(present: Sequence[Value], holders: int) -> Value:
    return scaled(combine(present), holders / len(present)) if len(present) < holders else combine(present)


@torch.no_grad()
def _mean(tensors: Sequence[Tensor]) -> Tensor:
    first = tensors[0]
    if any(tensor.shape != first.shape or tensor.dtype != first.dtype for tensor in tensors):
        return first
    if not (first.is_floating_point() or first.is_complex()):
        return first
    if first.dim() == 0 and first.is_floating_point() and all(float(tensor).is_integer() for tensor in tensors):
        return first  # a counter
    # Of bfloat16 and float16 the mean in single precision, rounded once.
    wide = torch.float32 if first.is_floating_point() and first.itemsize < 4 else first.dtype
    mean = first.to(wide, copy=True)
    mean_into(mean, [tensor.to(wide) for tensor in tensors[1:]])
    finite = torch.stack([tensor.to(wide).isfinite() for tensor in tensors]).all(0)
    return torch.where(finite, mean, first.to(wide)).to(first.dtype)


def _header(value: Value, data: list[Tensor], device: torch.device) -> object:
    """The structure of a value; appends its tensors and numbers to `data`."""
    match value:
        case Tensor():
            data.append(value.detach())
            here = value.device.type == device.type and device.type != "cpu"
            return ["t", str(value.dtype).removeprefix("torch."), list(value.shape), int(here)]
        case bool():
            data.append(torch.tensor(value, device="cpu"))
            return "b"
        case int() if value in _INT64:
            data.append(torch.tensor(value, dtype=torch.int64, device="cpu"))
            return "i"
        case float():
            data.append(torch.tensor(value, dtype=torch.float64, device="cpu"))
            return "f"
        case InFlat():
            return "v" if value.scale == 1.0 else ["v", value.scale]
        case Unmovable():
            return ["x", value.kind]
        case list() | tuple():
            items = cast(Sequence[Value], value)
            return ["l" if isinstance(value, list) else "u", [_header(item, data, device) for item in items]]
        case dict():
            entries = cast(dict[str | int, Value], value)
            keys = sorted(entries, key=lambda key: (str(type(key)), key))
            return ["d", [[key, _header(entries[key], data, device)] for key in keys]]
        case _:
            return ["=", value]


def _value(header: Any, take: Callable[[int], Tensor], device: torch.device) -> Value:
    kind, *rest = header
    match kind:
        case "t":
            dtype, shape, here = getattr(torch, rest[0]), torch.Size(rest[1]), rest[2]
            tensor = take(shape.numel() * dtype.itemsize).view(dtype).view(shape)
            return tensor.to(device) if here else tensor
        case "b":
            return bool(take(1).item())
        case "i":
            return int(take(8).view(torch.int64).item())
        case "f":
            return float(take(8).view(torch.float64).item())
        case "v":
            return InFlat(*rest)
        case "x":
            return Unmovable(rest[0])
        case "l" | "u":
            items = [_value(item, take, device) for item in rest[0]]
            return items if kind == "l" else tuple(items)
        case "d":
            return {key: _value(item, take, device) for key, item in rest[0]}
        case _:
            return rest[0]


def _on_cpu(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """The bytes of tensors, copied to the CPU together."""
    flats = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    parts = dict[int, Tensor]()
    for device in {flat.device for flat in flats if flat.device.type != "cpu"}:
        numbers = [number for number, flat in enumerate(flats) if flat.device == device]
        together = torch.cat([flats[number] for number in numbers]).cpu()
        for number in numbers:
            parts[number], together = together[: flats[number].numel()], together[flats[number].numel() :]
    return (parts.get(number, flat) for number, flat in enumerate(flats))


def _from_bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()
