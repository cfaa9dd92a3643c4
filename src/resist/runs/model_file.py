"""The full network on disk: `model.safetensors`, its tensors under the names that the network itself gives them.

The metadata says what else is needed to read it: the format's version and the scale of each chain's branches.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from resist.errors import UserError
from resist.subnet.chains import Chain
from resist.subnet.scaling import scale_branches

FILE = "model.safetensors"
FORMAT = "resist full network 1"


def save_full(model: nn.Module, chains: Sequence[Chain], scales: Sequence[float], path: Path) -> None:
    """Write the weights of a full network. `path` appears complete or not at all."""
    named = {chain.name: scale for chain, scale in zip(chains, scales, strict=True)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_tensors(path, tensors, {"format": FORMAT, "scales": json.dumps(named)})


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a file of tensors on the host, none of which overlap, that is there complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.unlink(missing_ok=True)
        save_file(dict(tensors), partial, metadata=metadata)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # as any other file: safetensors lets nobody else read what it writes
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error}; make room there, or give another directory") from error


def load_full(model: nn.Module, chains: Sequence[Chain], path: Path) -> nn.Module:
    """Fill `model`, which may be on the meta device, and scale its branches as they were when it was saved.

    Raises UserError in one line when the file is missing, damaged, of another version, or of another network.
    """
    tensors, scales = read_full(path)
    expected = model.state_dict()
    wrong = [n for n, t in expected.items() if n not in tensors or tensors[n].shape != t.shape]
    wrong += [n for n in tensors if n not in expected]
    if wrong:
        raise UserError(f"{path} holds another network than config.json describes: {wrong[0]} differs")
    missing = [chain.name for chain in chains if chain.name not in scales]
    if missing:
        raise UserError(f"{path} says no scale for chain {', '.join(missing)}; it is damaged")
    model.load_state_dict(tensors, assign=True)
    scale_branches(model, chains, [scales[chain.name] for chain in chains])
    return model


def read_full(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The tensors of a full network by name, and the scale of each chain's branches.

    Raises UserError in one line when the file is missing, damaged, or of another version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{path} is not there; the run did not come to its end") from error
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it, or train anew") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}; another program wrote it")
    try:
        return tensors, {chain: float(scale) for chain, scale in json.loads(metadata["scales"]).items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} says no scales; it is damaged") from error
