"""Nested Python values as JSON and named tensors, and back. Nothing is pickled.

Numbers, texts and lists are themselves in JSON; everything else is an object with one entry that names its kind:
`{"tensor": key}`, `{"dict": [[key, value], ...]}`, `{"state": value}` for what `state_dict()` has returned.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from resist.errors import UserError

SCALARS = (bool, int, float, str, type(None))
MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
SEQUENCES: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset, "Size": torch.Size}
# (tensor, whether it was in CPU memory beside a network on another device) -> the tensor where it belongs
Place = Callable[[Tensor, bool], Tensor]


def join(*parts: str) -> str:
    """Join the parts of a tensor's key by slashes.

    `split` gives them back, whatever characters they have.
    """
    return "/".join(part.replace("%", "%25").replace("/", "%2F") for part in parts)


def split(key: str) -> tuple[str, ...]:
    """Return the parts that `join` was given."""
    return tuple(part.replace("%2F", "/").replace("%25", "%") for part in key.split("/"))


def has_state(value: object) -> bool:
    """Return True for a thing with `state_dict()` and `load_state_dict()`."""
    methods = (getattr(value, name, None) for name in ("state_dict", "load_state_dict"))
    return not isinstance(value, type) and all(callable(method) for method in methods)


def encode(
    value: object, tensors: dict[str, Tensor], *, path: tuple[str, ...], what: str, device: torch.device | None = None
) -> Any:
    """Write a value as JSON, and its tensors into `tensors`.

    Args:
        value: Numbers, texts, tensors, arrays, generators, things with a state, and dicts, lists, tuples and sets of
            them.
        tensors: Key -> tensor. Tensors are added as they are, not copied.
        path: Beginning of the keys of its tensors.
        what: Name of the value, for messages.
        device: Device of the network; tensors in CPU memory beside it are marked.

    Returns:
        The JSON value.

    Raises:
        UserError: If the value, or a part of it, cannot be saved. Names the part.
    """
    try:
        return _encode(value, tensors, path, what, device)
    except RecursionError:
        raise UserError(f"{what} refers to itself, and cannot be saved; leave it out") from None


def _encode(
    value: object, tensors: dict[str, Tensor], path: tuple[str, ...], what: str, device: torch.device | None
) -> Any:
    def inner(item: object, key: object) -> Any:
        return _encode(item, tensors, (*path, str(key)), f"{what}[{key!r}]", device)

    kind: type = type(value)
    if kind in SCALARS:
        return value
    if kind is list:
        return [inner(item, number) for number, item in enumerate(cast(list[object], value))]
    if kind.__name__ in SEQUENCES and SEQUENCES[kind.__name__] is kind:
        items = list(cast(tuple[object, ...], value))
        return {kind.__name__: [inner(item, number) for number, item in enumerate(items)]}
    if kind.__name__ in MAPPINGS and MAPPINGS[kind.__name__] is kind:
        pairs = cast(dict[object, object], value).items()
        return {kind.__name__: [[_encode(k, tensors, (*path, "key"), what, device), inner(v, k)] for k, v in pairs]}
    if isinstance(value, bytes | bytearray):
        return {kind.__name__: value.hex()}
    if isinstance(value, complex) and kind is complex:
        return {"complex": [value.real, value.imag]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    tensor: Tensor | None = None
    tags: dict[str, object] = {}
    if isinstance(value, Tensor):
        plain = kind in (Tensor, nn.Parameter, nn.Buffer) and value.layout is torch.strided and not value.is_quantized
        tensor = value.detach() if plain and not value.is_meta else None
        if device is not None and value.device.type == "cpu" != device.type:
            tags["host"] = True
    elif isinstance(value, np.ndarray | np.generic):
        try:
            array = np.array(cast(Any, value))  # a copy: it may be read-only
            tensor = torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]
            tags["numpy"] = "scalar" if isinstance(value, np.generic) else "array"
        except TypeError:
            tensor = None
    elif isinstance(value, torch.Generator):
        tensor, tags["generator"] = value.get_state(), str(value.device)
    elif isinstance(value, Optimizer):
        raise UserError(f"{what} is an optimizer; give it among the optimizers of the job")
    elif has_state(value):
        return {"state": _encode(cast(Any, value).state_dict(), tensors, path, f"{what}.state_dict()", device)}
    if tensor is None:
        raise UserError(
            f"{what} is a {kind.__module__}.{kind.__qualname__}, which cannot be saved; give numbers, texts, tensors, "
            "dicts and lists of them, or things with state_dict() and load_state_dict()"
        )
    key = join(*path)
    while key in tensors:  # keys such as 1 and "1"
        key += "'"
    tensors[key] = tensor
    return {"tensor": key, **tags}


def decode(value: Any, tensors: Mapping[str, Tensor], *, place: Place | None = None, into: object = None) -> Any:
    """Return the value that `encode` has written.

    Args:
        value: The JSON value.
        tensors: Key -> tensor.
        place: Moves each tensor to its device. Default: it stays in CPU memory.
        into: The present value. Things with a state, and generators, in it are loaded in place; dicts and lists that
            hold them are searched.

    Returns:
        The value; in place of each thing that was loaded, the thing itself. Without it: its state.

    Raises:
        KeyError: If a tensor is missing.
        ValueError: If `value` is none that `encode` writes, or of another structure than `into`.
    """
    if isinstance(value, list):
        items = cast(list[Any], value)
        present = _items(into, len(items))
        return [decode(item, tensors, place=place, into=i) for item, i in zip(items, present, strict=True)]
    if not isinstance(value, dict):
        return value
    entry = cast(dict[str, Any], value)
    kind = next(iter(entry), "")
    content: Any = entry.get(kind)
    if kind == "tensor":
        return _tensor(entry, tensors[content], place, into)
    if kind in SEQUENCES:
        present = _items(into, len(content))
        return SEQUENCES[kind](
            decode(item, tensors, place=place, into=i) for item, i in zip(content, present, strict=True)
        )
    if kind in MAPPINGS:
        known = cast(dict[Any, Any], into) if isinstance(into, dict) else {}
        pairs = [(decode(k, tensors), v) for k, v in content]
        return MAPPINGS[kind]({k: decode(v, tensors, place=place, into=known.get(k)) for k, v in pairs})
    if kind == "state":
        state = decode(content, tensors, place=place)
        if not has_state(into):
            return state
        cast(Any, into).load_state_dict(state)
        return into
    if kind in ("bytes", "bytearray"):
        return bytes.fromhex(content) if kind == "bytes" else bytearray.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dtype" and isinstance(getattr(torch, content, None), torch.dtype):
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    raise ValueError(f"a value of the kind {kind!r}")


def keys_of(value: Any) -> set[str]:
    """Return the keys of all tensors in a JSON value."""
    if isinstance(value, list):
        return set[str]().union(*map(keys_of, cast(list[Any], value)))
    if not isinstance(value, dict):
        return set()
    entry = cast(dict[str, Any], value)
    key = entry.get("tensor")
    return {key} if isinstance(key, str) else set[str]().union(*map(keys_of, entry.values()))


def _tensor(entry: Mapping[str, Any], tensor: Tensor, place: Place | None, into: object) -> Any:
    if "numpy" in entry:
        array = tensor.numpy()
        return array[()] if entry["numpy"] == "scalar" else array
    if "generator" in entry:
        generator = into if isinstance(into, torch.Generator) else torch.Generator(entry["generator"])
        generator.set_state(tensor)
        return generator
    return tensor if place is None else place(tensor, bool(entry.get("host")))


def _items(into: object, number: int) -> list[object]:
    """The present items of a sequence of this length, or Nones."""
    if not isinstance(into, list | tuple):
        return [None] * number
    items = list(cast(list[object], into))
    if len(items) != number and any(has_state(item) or isinstance(item, torch.Generator) for item in items):
        raise ValueError(f"{number} values, not {len(items)}")
    return items if len(items) == number else [None] * number
