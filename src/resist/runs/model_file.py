"""The full network on disk: `model.safetensors`, its tensors under the names that the network itself gives them.

The metadata holds, for each chain, its container, first and last child, and the scale of its branches; and the modules
that are scaled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from resist.blocks.chain import Chain
from resist.errors import UserError
from resist.runs.tensor_file import read_tensors, verify_tensors, write_tensors
from resist.subnet.scaling import ScaleRecord, records_for, scale_blocks

FILE = "model.safetensors"
EMA_FILE = "model_ema.safetensors"  # of the averaged weights, of a run that has them
FORMAT = "resist full network 4"


@dataclass(frozen=True)
class ChainScale:
    """Scale of the branches of one chain.

    Attributes:
        container: As in `Chain`.
        first: As in `Chain`.
        last: As in `Chain`.
        scale: Factor of the branch of each of its blocks.
        blocks: The modules that are scaled, as in `resist.subnet.scaling.records_of`.
    """

    container: str
    first: int
    last: int
    scale: float
    blocks: Mapping[str, ScaleRecord]


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
    scaled = [
        ChainScale(c.container, c.first, c.last, scale, records_for(c, scale))
        for c, scale in zip(chains, scales, strict=True)
    ]
    write_tensors(path, model.state_dict(), FORMAT, {"chains": [asdict(chain) for chain in scaled]})


def load_full(model: nn.Module, path: Path, *, scaled: bool = True) -> nn.Module:
    """Load a full network, and scale its branches as saved.

    Args:
        model: The network that config.json describes; it may be on the meta device.
        path: File to read.
        scaled: Scale the branches. Otherwise they are left as they are.

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
    model.load_state_dict(tensors, assign=True)
    for chain in scales if scaled else ():
        scale_blocks(model, chain.blocks)
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
            ChainScale(str(c["container"]), int(c["first"]), int(c["last"]), float(c["scale"]), dict(c["blocks"]))
            for c in metadata["chains"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has no scales; it is damaged") from error
