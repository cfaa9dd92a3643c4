"""The full network on disk: `model.safetensors`, its tensors under the names that the network itself gives them.

The metadata holds the scale of each chain's branches.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from resist.errors import UserError
from resist.runs.tensor_file import read_tensors, verify_tensors, write_tensors
from resist.subnet.chains import Chain
from resist.subnet.scaling import scale_branches

FILE = "model.safetensors"
FORMAT = "resist full network 2"


def save_full(model: nn.Module, chains: Sequence[Chain], scales: Sequence[float], path: Path) -> None:
    """Write the weights of a full network. `path` appears complete or not at all.

    Args:
        model: The full network, on any device.
        chains: Its chains.
        scales: The scale of each chain's branches.
        path: File to write.

    Raises:
        UserError: The file cannot be written.
    """
    named = {chain.name: scale for chain, scale in zip(chains, scales, strict=True)}
    write_tensors(path, model.state_dict(), FORMAT, {"scales": named})


def load_full(model: nn.Module, chains: Sequence[Chain], path: Path) -> nn.Module:
    """Load a full network into `model` and scale its branches as they were when it was saved.

    Args:
        model: The network that config.json describes; it may be on the meta device.
        chains: The chains to scale; none to leave the branches as they are.
        path: File to read.

    Returns:
        `model`.

    Raises:
        UserError: The file is missing, damaged, of another version, or of another network.
    """
    tensors, scales = read_full(path)
    expected = model.state_dict()
    wrong = [n for n, t in expected.items() if n not in tensors or tensors[n].shape != t.shape]
    wrong += [n for n in tensors if n not in expected]
    if wrong:
        raise UserError(f"{path} holds another network than config.json describes: {wrong[0]!r} differs")
    missing = [chain.name for chain in chains if chain.name not in scales]
    if missing:
        raise UserError(f"{path} has no scale for chain {', '.join(missing)}; it is damaged")
    model.load_state_dict(tensors, assign=True)
    scale_branches(model, chains, [scales[chain.name] for chain in chains])
    return model


def read_full(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Read the tensors of a full network by name, and the scale of each chain's branches.

    Raises:
        UserError: The file is missing, damaged, or of another version.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; the run has not finished")
    metadata = verify_tensors(path, FORMAT).metadata
    tensors = read_tensors(path, FORMAT)
    try:
        return tensors, {chain: float(scale) for chain, scale in metadata["scales"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} has no scales; it is damaged") from error
