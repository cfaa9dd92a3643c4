"""Tensor files: named tensors and JSON metadata in one `.safetensors` file, with a digest of both.

The final network, checkpoints, replicas and diverged weights are such files. Nothing that is read is unpickled.

Files are read by the safetensors library. They are written here: `safetensors.torch.save_file` writes to a temporary
file with a random name, which remains when the process is killed, and which other users may not read.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from resist.errors import UserError, first_line
from resist.runs.atomic import atomic_path, utf8_path

# The names that safetensors gives to types of numbers.
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
# Types that safetensors does not know: their bytes, as a last dimension more. The metadata names them.
AS_BYTES = {
    str(dtype): dtype
    for dtype in (torch.complex128, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
}
UNREADABLE = (OSError, SafetensorError, RuntimeError, ValueError, LookupError, TypeError, AttributeError)


class FormatError(UserError):
    """A file or a checkpoint in another format than the one that this version reads."""


@dataclass(frozen=True)
class Description:
    """The contents of a tensor file without its tensors.

    Attributes:
        metadata: The values given to `write_tensors`.
        digest: Digest of the format, the metadata and the tensors, as the file states it.
        names: Names of the tensors.
        types: Names of types that safetensors does not know, by tensor.
    """

    metadata: dict[str, Any]
    digest: str
    names: frozenset[str]
    types: dict[str, str]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], file_format: str, metadata: Mapping[str, object]) -> None:
    """Write a tensor file, which appears complete or not at all.

    Args:
        path: File to write; its folder must exist. An older file is replaced.
        tensors: Dense tensors on any device. They must not change before this function returns.
        file_format: Name and version of the contents, such as "resist checkpoint 3".
        metadata: Further values, which JSON can represent.

    Raises:
        UserError: The file cannot be written, or a tensor has a type that safetensors does not know.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (*DTYPES, *AS_BYTES.values()):
            raise UserError(f"{path}: tensor {name!r} has the type {tensor.dtype}, which safetensors cannot store")
    staged = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        metadata = json.loads(json.dumps(metadata))  # as it will be read: all keys are strings
        texts = {name: json.dumps(value) for name, value in metadata.items()}
        texts |= {"format": file_format, "digest": _digest(file_format, metadata, staged)}
        if types := {name: str(t.dtype) for name, t in staged.items() if t.dtype not in DTYPES}:
            texts["types"] = json.dumps(types)
        with atomic_path(path) as partial, partial.open("wb") as file:
            ordered = sorted(staged, key=lambda name: (-staged[name].element_size(), name))  # keeps numbers aligned
            file.write(_header(texts, {name: staged[name] for name in ordered}))
            for name in ordered:
                file.write(_raw(staged[name]))
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise UserError(f"{path} cannot be written: {reason}; make room there, or give another directory") from error


def read_description(path: Path, file_format: str) -> Description:
    """Read the metadata and the names of a tensor file, not its tensors.

    Raises:
        UserError: The file is missing or damaged.
        FormatError: The file has another format.
    """
    with _opened(path, file_format) as (_, description):
        return description


def verify_tensors(path: Path, file_format: str) -> Description:
    """Read all of a tensor file and compare it with its digest.

    Raises:
        UserError: The file is missing or damaged.
        FormatError: The file has another format.
    """
    with _opened(path, file_format) as (file, description):
        tensors = {name: _tensor(file, name, description) for name in description.names}
        if _digest(file_format, description.metadata, tensors) != description.digest:
            raise ValueError("its content does not match its digest")
        return description


def read_tensors(path: Path, file_format: str, wanted: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """Read the tensors of a file whose names are `wanted`, by default all, into CPU memory.

    The digest is not compared: see `verify_tensors`.

    Raises:
        UserError: The file is missing or damaged.
        FormatError: The file has another format.
    """
    with _opened(path, file_format) as (file, description):
        # A tensor as safetensors returns it is a view of the file, which may be replaced or removed.
        names = [name for name in description.names if wanted is None or wanted(name)]
        return {name: _tensor(file, name, description).clone() for name in names}


def _tensor(file: Any, name: str, description: Description) -> Tensor:
    """Read a tensor, in its own type."""
    tensor: Tensor = file.get_tensor(name)
    if name not in description.types:
        return tensor
    dtype = AS_BYTES[description.types[name]]
    return tensor.clone().view(dtype).reshape(tensor.shape[:-1])  # cloned, since the file aligns bytes only


@contextmanager
def _opened(path: Path, file_format: str) -> Iterator[tuple[Any, Description]]:
    """Open a tensor file; every error inside becomes a UserError that names the file."""
    try:
        if not path.is_file():
            raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is not a file")
        with utf8_path(path) as name, safe_open(name, framework="pt") as file:
            texts = dict(file.metadata() or {})
            if texts.get("format") != file_format:
                raise other_format(path, texts.get("format"), file_format)
            digest = texts.pop("digest")
            types = json.loads(texts.pop("types", "{}"))
            metadata = {name: json.loads(text) for name, text in texts.items() if name != "format"}
            yield file, Description(metadata, digest, frozenset(file.keys()), types)
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged: {_reason(error)}") from error


def other_format(source: object, actual: object, expected: str) -> FormatError:
    """The error for a file or a checkpoint of another format or version."""
    if not isinstance(actual, str):
        return FormatError(f"{source} is not a file of resist; give another one")
    remedy = "train again, or use the version of resist that wrote it"
    return FormatError(f"{source} has the format {actual!r}, not {expected!r}; {remedy}")


def _header(texts: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    """Everything before the numbers: the length of the JSON text, 8 bytes, and the text, padded to 8 bytes."""
    entries: dict[str, object] = {"__metadata__": texts}
    position = 0
    for name, tensor in tensors.items():
        end = position + tensor.nbytes
        known = tensor.dtype in DTYPES
        shape = [*tensor.shape, *([] if known else [tensor.element_size()])]
        dtype = DTYPES[tensor.dtype] if known else DTYPES[torch.uint8]
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    content = json.dumps(entries).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest(file_format: str, metadata: Mapping[str, object], tensors: Mapping[str, Tensor]) -> str:
    key = blake2b(json.dumps([file_format, metadata], sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        key.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        key.update(_raw(tensor))
    return key.hexdigest()


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyError):
        return f"it has no entry {first_line(error)}"
    return getattr(error, "strerror", None) or first_line(error)
