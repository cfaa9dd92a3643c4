"""Exported files: complete, never overwritten, readable without this package.

- `.safetensors`: the state dict, and the metadata (strings by name; values that are not text are JSON).
- `.pt`, `.pth`: for `torch.load(weights_only=True)`: the plain state dict; if a scale is kept, a dict of "state_dict"
  and the metadata.
- `.pt2`: a program for `torch.export.load(...).module()`, with the metadata in its extra file "metadata.json".
- `.onnx`: see `resist.export.onnx`.
"""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from resist.errors import UserError, first_line
from resist.export.comparing import detached
from resist.runs.atomic import utf8_path
from resist.subnet.scaling import scale_blocks

FORMAT = "resist export 1"
SUFFIXES = (".safetensors", ".pt", ".pth")


def check_target(path: Path, suffixes: tuple[str, ...]) -> None:
    """Check that a new file can be written.

    Args:
        path: The file.
        suffixes: Allowed suffixes.

    Raises:
        UserError: The suffix is wrong, the file exists, or its directory is missing or not writable.
    """
    if path.suffix not in suffixes:
        suffix = f"the suffix {path.suffix}" if path.suffix else "no suffix"
        raise UserError(f"-o {path} has {suffix}; give it one of {', '.join(suffixes)}")
    if path.exists() or path.is_symlink():
        raise UserError(f"-o {path} exists already and is never overwritten; give another file, or remove it")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"-o {path} cannot be written: {parent} is not a writable directory; give another place")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy the model's state dict to CPU memory; tensors share no storage."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def write_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict in the format of the file's suffix.

    Args:
        path: A new file with one of `SUFFIXES`.
        state: Tensors by name, in CPU memory.
        metadata: Strings by name. "scale" is "none", "folded" or "kept".

    Raises:
        UserError: The file exists or cannot be written.
    """
    check_target(path, SUFFIXES)
    if path.suffix == ".safetensors":
        content = save(dict(state), dict(metadata))
    else:
        buffer = io.BytesIO()
        plain = metadata.get("scale") != "kept"
        torch.save(dict(state) if plain else {"state_dict": dict(state), **metadata}, buffer)
        content = buffer.getvalue()
    write_file(path, content)


def write_program(path: Path, model: nn.Module, images: Tensor, metadata: Mapping[str, str]) -> None:
    """Trace a model for any batch size and write the program.

    Args:
        path: A new file with the suffix .pt2.
        model: The network, in eval mode.
        images: Example input (batch, channels, height, width), batch at least 2.
        metadata: Strings by name.

    Raises:
        UserError: torch.export cannot trace the model, or the file exists or cannot be written.
    """
    check_target(path, (".pt2",))
    try:
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(detached(model), (images,), dynamic_shapes=({0: batch},))
    except Exception as error:  # any error of the tracer or of the network's code
        raise UserError(
            f"torch.export cannot trace this network ({first_line(error)}); give `to=safetensors`"
        ) from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(dict(metadata))})
    write_file(path, buffer.getvalue())


def load_scaled(model: nn.Module, path: Path | str) -> nn.Module:
    """Load an exported .safetensors file, and apply its scales by hooks.

    Args:
        model: A network of the exported architecture; it is changed in place.
        path: The file.

    Returns:
        `model`.

    Raises:
        UserError: The file is missing, damaged, not an export, or of another network.
    """
    try:
        with utf8_path(Path(path)) as readable, safe_open(readable, framework="pt") as file:
            metadata = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a .safetensors file of resist export") from error
    file_format = metadata.get("format")
    if file_format != FORMAT:
        raise UserError(f"{path} has the format {file_format!r}, not {FORMAT!r}; give a file of resist export")
    try:
        model.load_state_dict(state)
        return scale_blocks(model, json.loads(metadata["scales"]))
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is of another network; build {metadata.get('create', 'its own')}") from error


def write_file(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it to `path`, which must still be free. Raises UserError where it cannot."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            _rename(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except FileExistsError as error:
        raise UserError(f"-o {path} exists already and is never overwritten; give another file") from error
    except OSError as error:
        raise UserError(f"-o {path} cannot be written: {error.strerror}; make room, or give another place") from error


def _rename(partial: Path, path: Path) -> None:
    try:
        os.link(partial, path)  # unlike a rename, a link never replaces a file
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError from None
        partial.rename(path)
