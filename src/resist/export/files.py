"""Exported files: complete or not there, never over another file, and readable without this package.

.safetensors   the state dict, and beside it the metadata (strings by name; what is not text is JSON)
.pt, .pth      what `torch.load(weights_only=True)` reads: the plain state dict; with a scale that is kept, a dict of
               "state_dict" and the metadata
.pt2           a program that `torch.export.load(...).module()` runs; the metadata is in its extra file "metadata.json"
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

from resist.errors import UserError
from resist.export.folding import detached
from resist.subnet.scaling import scale_blocks

FORMAT = "resist export 1"
SUFFIXES = (".safetensors", ".pt", ".pth")


def check_target(path: Path, suffixes: tuple[str, ...]) -> None:
    """Raise UserError where `path` cannot be written anew."""
    if path.suffix not in suffixes:
        raise UserError(f"-o {path} ends in {path.suffix or 'nothing'}; give it one of {', '.join(suffixes)}")
    if path.exists() or path.is_symlink():
        raise UserError(f"-o {path} exists already and is never overwritten; give another file, or remove it")
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"-o {path} cannot be written: {parent} is not a directory that you may write to")


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, every tensor in memory of its own on the host."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }


def write_state(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a state dict in the format that the suffix of `path` names (see the head of this file)."""
    check_target(path, SUFFIXES)
    if path.suffix == ".safetensors":
        content = save(dict(state), dict(metadata))
    else:
        buffer = io.BytesIO()
        plain = metadata.get("scale") != "kept"
        torch.save(dict(state) if plain else {"state_dict": dict(state), **metadata}, buffer)
        content = buffer.getvalue()
    _write(path, content)


def write_program(path: Path, model: nn.Module, images: Tensor, metadata: Mapping[str, str]) -> None:
    """Trace `model` on `images`, with any number of them, and write the program.

    Raises UserError where torch.export cannot trace it.
    """
    check_target(path, (".pt2",))
    try:
        many = torch.export.Dim("batch", min=1)
        program = torch.export.export(detached(model), (images,), dynamic_shapes=({0: many},))
    except Exception as error:  # whatever the tracer raises
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise UserError(f"torch.export cannot trace this network ({reason}); give --to safetensors") from error
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(dict(metadata))})
    _write(path, buffer.getvalue())


def load_scaled(model: nn.Module, path: Path | str) -> nn.Module:
    """Give `model` the weights of an exported .safetensors file, and the scale that was kept, if one was, by hooks.

    Raises UserError in one line when the file is missing, damaged, not an export, or of another network.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}; give a .safetensors file of resist export") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}; another program wrote it")
    try:
        model.load_state_dict(state)
        return scale_blocks(model, json.loads(metadata["scales"]))
    except (RuntimeError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is of another network; build {metadata.get('create', 'its own')}") from error


def _write(path: Path, content: bytes) -> None:
    """Write a file under another name, then give it its own, which must still be free."""
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
        os.link(partial, path)  # unlike a renaming, this never replaces
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise FileExistsError from None
        partial.rename(path)
