"""The full network on disk: `model.safetensors`, its tensors under the names that the network itself gives them.

The metadata holds, for each chain, its container, first and last block, and the scale of its branches.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from resist.errors import UserError
from resist.runs.tensor_file import read_tensors, verify_tensors, write_tensors
from resist.subnet.chains import Chain
from resist.subnet.scaling import scale_branches

FILE = "model.safetensors"
EMA_FILE = "model_ema.safetensors"  # of the averaged weights, of a run that has them
FORMAT = "resist full network 3"


@dataclass(frozen=True)
class ChainScale:
    """Scale of the branches of one chain.

    Attributes:
        container: As in `Chain`.
        first: As in `Chain`.
        last: As in `Chain`.
        scale: Factor of the branch of each of its blocks.
    """

    container: str
    first: int
    last: int
    scale: float


def save_full(model: nn.Module, chains: Sequence[Chain], scales: Sequence[float], path: Path) -> None:
    """Write the weights of a full network.

    `path` appears complete or not at all.

    Args:
        model: The full network, on any device.
        chains: Its chains.
        scales: The scale of each chain's branches.
        path: File to write.

    Raises:
        UserError: The file cannot be written.
    """
    scaled = [ChainScale(c.container, c.first, c.last, scale) for c, scale in zip(chains, scales, strict=True)]
    write_tensors(path, model.state_dict(), FORMAT, {"chains": [asdict(chain) for chain in scaled]})


def load_full(model: nn.Module, chains: Sequence[Chain], path: Path) -> nn.Module:
    """Load a full network, and scale its branches as saved.

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
    scale_of = {(c.container, c.first, c.last): c.scale for c in scales}
    try:
        scale_of_chains = [scale_of[chain.container, chain.first, chain.last] for chain in chains]
    except KeyError as error:
        container, first, last = error.args[0]
        raise UserError(f"{path} has no scale for chain {container}:{first}-{last}; it is damaged") from None
    model.load_state_dict(tensors, assign=True)
    scale_branches(model, chains, scale_of_chains)
    return model


def read_full(path: Path) -> tuple[dict[str, torch.Tensor], list[ChainScale]]:
    """Read the file of a full network.

    Args:
        path: File to read.

    Returns:
        The tensors by name, and the scale of each chain's branches.

    Raises:
        UserError: The file is missing, damaged, or of another version.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; the run has not finished")
    metadata = verify_tensors(path, FORMAT).metadata
    tensors = read_tensors(path, FORMAT)
    try:
        return tensors, [
            ChainScale(str(c["container"]), int(c["first"]), int(c["last"]), float(c["scale"]))
            for c in metadata["chains"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no scales; it is damaged") from error
